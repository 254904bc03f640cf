#!/usr/bin/env bash
# What can be checked of a challenge container without building it: the folder that `seerseg_challenge dockerize` makes is mounted as the
# image would hold it, read-only, in a root of its own, and its entry points run there as another user, without network, without the caller's
# environment, with nothing writable but /tmp and the outputs.
#
#   bash scripts/check_container.sh             part of a CT chest where slicerio is installed, else a phantom
#   bash scripts/check_container.sh --quick     a small phantom
#
# Exit codes: 0 all held; 1 something did not; 77 skipped, with the reason: no Linux, no unshare, no right to make namespaces.
# Python and its packages are those of SEERSEG_PYTHON (default: python), mounted where they lie: what is not checked is the building of
# the image (base image, pip install) and the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --inside ]; then # in fresh namespaces: lay out the root and become the image's user
  root=$2 context=$3 convention=$4 inputs=$5 outputs=$6
  shift 6
  mount --make-rprivate /
  mount --bind "$root" "$root"
  show() { # show SOURCE TARGET: read-only
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")" && touch "$root$2"; fi
    mount --bind "$1" "$root$2" && mount -o remount,bind,ro "$root$2"
  }
  for folder in /usr /bin /lib /lib64 $CHECK_PREFIXES; do
    [ -e "$folder" ] && [ ! -e "$root$folder" ] && show "$(readlink -f "$folder")" "$folder"
  done
  if [ -f /etc/ld.so.cache ]; then show /etc/ld.so.cache /etc/ld.so.cache; fi
  echo 'seerseg:x:65534:65534::/tmp:/bin/sh' >"$root/etc/passwd"
  mkdir -p "$root"/{tmp,proc,dev,opt/seerseg,opt/ml,workspace,input,output}
  show "$context/seerseg" /opt/seerseg/seerseg
  show "$context/parts" /opt/parts
  show "$context/model" /opt/ml/model
  show "$context/predict_$convention.sh" /workspace/predict.sh
  case $convention in npz) into=/workspace/inputs out=/workspace/outputs ;; *) into=/input out=/output ;; esac
  show "$inputs" "$into"
  mkdir -p "$root$out" && mount --bind "$outputs" "$root$out"
  mount -t tmpfs tmpfs "$root/tmp" && chmod 1777 "$root/tmp"
  mount -t proc proc "$root/proc"
  for device in null zero random urandom; do touch "$root/dev/$device" && mount --bind "/dev/$device" "$root/dev/$device"; done
  mount -o remount,bind,ro "$root"
  # The variables are the Dockerfile's.
  mapfile -t settings < <(awk '/^ENV /{on=1; sub(/^ENV /,"")} on{line=$0; sub(/ *\\$/,"",line); sub(/^ +/,"",line); print line; if ($0 !~ /\\$/) exit}' "$context/Dockerfile")
  clean=(/usr/bin/env -i "PATH=$CHECK_PATH" "OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}" "${settings[@]}" /bin/sh -c 'cd /workspace && exec "$@"' sh)
  if [ "$CHECK_ROOT" = yes ]; then
    exec chroot --userspec=65534:65534 --groups='' "$root" "${clean[@]}" "$@"
  fi
  exec chroot "$root" /usr/bin/unshare --user --map-user=65534 --map-group=65534 "${clean[@]}" "$@"
fi

skip() { echo "Skipped: $*"; exit 77; }
[ "$(uname -s)" = Linux ] || skip "namespaces are Linux's."
command -v unshare >/dev/null || skip "the command unshare is not here (package util-linux)."
namespaces=(--mount --net --pid --ipc --uts --fork)
export CHECK_ROOT=yes
if [ "$(id -u)" != 0 ]; then
  CHECK_ROOT=no
  namespaces=(--user --map-root-user "${namespaces[@]}")
fi
unshare "${namespaces[@]}" mount --make-rprivate / 2>/dev/null || skip "this user may not make namespaces here."

python=$(command -v "${SEERSEG_PYTHON:-python}") || skip "there is no ${SEERSEG_PYTHON:-python}; name one with SEERSEG_PYTHON."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
CHECK_PREFIXES=$("$python" -c 'import sys; print(*dict.fromkeys(p for p in (sys.base_prefix, sys.prefix) if not p.startswith("/usr")))')
CHECK_PATH="$(dirname "$python"):/usr/local/bin:/usr/bin:/bin"
export CHECK_PREFIXES CHECK_PATH

echo "Making the container's folder and the scans"
"$python" -m seerseg.cli.challenge dockerize -o "$work/context" --output_path images/lung-segmentation --modality CT --ct_window -160 1500 >/dev/null
"$python" scripts/check_container.py make "$work" "$@"
failed=0

# inside CONVENTION CASE COMMAND...: runs it in the root; stdout and stderr of the entry point go to $work/CASE.log
inside() {
  local convention=$1 case=$2
  shift 2
  mkdir -p "$work/outputs/$case" "$work/root_$case"
  chmod 777 "$work/outputs/$case"
  local code=0
  unshare "${namespaces[@]}" bash scripts/check_container.sh --inside "$work/root_$case" "$work/context" "$convention" \
    "$work/$case" "$work/outputs/$case" "$@" >"$work/$case.log" 2>&1 || code=$?
  return "$code"
}

# Each guard is seen to hold before anything is run behind it.
# shellcheck disable=SC2016  # expanded inside
probe='
n=0
[ "$(id -u)" != 0 ] || { echo "runs as root"; n=1; }
for place in / /opt/seerseg/seerseg /opt/ml/model /workspace /usr "$(dirname "$(command -v python)")"; do
  if touch "$place/probe" 2>/dev/null; then echo "$place can be written"; n=1; fi
done
touch /tmp/probe /workspace/outputs/probe || n=1
python - <<END || n=1
import os, socket
left = sorted(set(os.environ) - {"PATH", "OMP_NUM_THREADS", "PWD", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "LC_CTYPE", "_", "OLDPWD", "SHLVL"})
assert not left, left
try:
    socket.create_connection(("192.0.2.1", 80), 2)
except OSError as error:
    print("no network:", error)
else:
    raise SystemExit("there is a network")
import seerseg
assert seerseg.__file__.startswith("/opt/seerseg/"), seerseg.__file__
print("user", os.getuid(), "code", seerseg.__file__)
END
exit $n'
mkdir "$work/probe"
if inside npz probe /bin/sh -c "$probe"; then
  echo "ok      guards: not root, read-only tree, empty environment. $(tail -2 "$work/probe.log" | tr '\n' ';')"
else
  echo "FAILED  guards:" && cat "$work/probe.log" && exit 1
fi

cases=(npz npz_broken npz_hostile job job_broken)
running=()
for case in "${cases[@]}"; do
  convention=npz
  case $case in job*) convention=grand_challenge ;; esac
  inside "$convention" "$case" sh predict.sh &
  running+=($!)
done
for i in "${!cases[@]}"; do
  case=${cases[$i]} code=0
  wait "${running[$i]}" || code=$?
  if said=$("$python" scripts/check_container.py check "$work" "$case" "$code" 2>&1); then
    echo "ok      $case: $said"
  else
    echo "FAILED  $case: $said"
    sed 's/^/        | /' "$work/$case.log"
    failed=1
  fi
done
exit "$failed"
