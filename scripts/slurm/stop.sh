#!/usr/bin/env bash
# Stop the private Slurm of start.sh: its jobs, then its daemons, by their pid files. stop.sh FOLDER [--purge]; --purge removes FOLDER too.
set -u
folder=$(cd "${1:?say which: stop.sh FOLDER}" && pwd) || exit 2
export SLURM_CONF=$folder/slurm.conf
rm -f "$folder/run/watched"
pid_of() { # of a daemon that was started from this folder, nothing otherwise
  local pid
  pid=$(cat "$folder/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -e "$folder/" && echo "$pid"
}
running() { # a zombie that its parent has not looked after yet has ended
  local line
  line=$(grep '^State:' "/proc/$1/status" 2>/dev/null) || return 1
  case "$line" in *Z*) return 1 ;; esac
}
if pid_of slurmctld >/dev/null; then
  timeout 20 scancel --full --user="$(id -un)" 2>/dev/null
  for _ in $(seq 100); do [ -z "$(timeout 5 squeue -h -t R,CG 2>/dev/null)" ] && break; sleep 0.1; done
fi
for daemon in slurmd slurmctld munged; do
  pid=$(pid_of "$daemon") || continue
  kill -TERM "$pid" 2>/dev/null
  for _ in $(seq 100); do running "$pid" || break; sleep 0.05; done
  running "$pid" && kill -KILL "$pid" 2>/dev/null
  rm -f "$folder/run/$daemon.pid"
done
rm -f "$folder"/run/munge.sock*
[ "${2:-}" = --purge ] && [ -f "$folder/slurm.conf" ] && rm -rf "$folder"
exit 0
