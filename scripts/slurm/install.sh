#!/usr/bin/env bash
# Put Slurm's daemons and commands on a Debian or Ubuntu machine, for the tests; as root. No daemon is started, nothing is configured.
# Exit 0: they are there; 3: they cannot be had here (a sentence says why).
set -u
PATH=$PATH:/usr/sbin:/sbin
there() { command -v sbatch && command -v slurmctld && command -v slurmd && command -v munged; }
there >/dev/null && exit 0
[ "$(id -u)" = 0 ] || { echo "Slurm is not installed, and only root can install it: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 3; }
command -v apt-get >/dev/null || { echo "Slurm is not installed, and there is no apt-get to install it with." >&2; exit 3; }

# The packages start their daemons when they are installed, unless this file forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
fi
apt() { DEBIAN_FRONTEND=noninteractive timeout 180 apt-get -qq -y -o Acquire::http::Timeout=20 -o Acquire::Retries=1 "$@" >/dev/null 2>&1; }
packages=(slurmctld slurmd slurm-client munge)
apt install --no-install-recommends "${packages[@]}" || { apt update && apt install --no-install-recommends "${packages[@]}"; }
there >/dev/null && exit 0
echo "Slurm's packages could not be installed (no network, or no such packages)." >&2
exit 3
