# Sourced by quickstart.sh and test.sh. Makes a virtual environment with SeerSeg in it and sets $ENV_BIN.
#
#   make_environment FOLDER EXTRAS     e.g. make_environment .venv ".[dev]"
#
# A torch that the found Python already has, in whatever environment that is, is kept: the new environment then sees that
# one's packages behind its own. Otherwise the version in constraints.txt is installed first, so that nothing later
# replaces it. Environment variables:
#   SEERSEG_PYTHON   the Python to use (default: the first of python3, python3.13, ... that is 3.11 or newer)
#   SEERSEG_TORCH    what to install as torch (default: torch); pass pip's own options too, e.g. a wheel's path

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
die() { printf 'Error: %s\n' "$*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${SEERSEG_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "SeerSeg needs Python 3.11 or newer. Install it, or name it with SEERSEG_PYTHON=/path/to/python."
}

# The folder of a usable torch in the given Python, or nothing.
torch_folder() {
  "$1" -c '
import os, torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if (2, 8) <= version < (3, 0):
    print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null || true
}

make_environment() {
  local folder=$1 extras=$2 python existing
  python=$(find_python)
  ENV_BIN="$folder/bin"
  if [ ! -x "$ENV_BIN/python" ]; then
    say "Making the environment $folder"
    "$python" -m venv "$folder" || die "Could not make $folder. On Debian and Ubuntu: apt-get install python3-venv"
    existing=$(torch_folder "$python")
    if [ -n "$existing" ]; then
      say "Using the torch in $existing"
      echo "$existing" >"$("$ENV_BIN/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/existing_torch.pth"
    fi
  fi
  local pip=("$ENV_BIN/python" -m pip --disable-pip-version-check -q)
  if ! "$ENV_BIN/python" -W ignore -c 'import torch' 2>/dev/null; then
    say "Installing torch (the largest part)"
    # shellcheck disable=SC2086
    "${pip[@]}" install -c constraints.txt ${SEERSEG_TORCH:-torch} 2>&1 | grep -v '^WARNING: Location' || true
    "$ENV_BIN/python" -W ignore -c 'import torch' || die "torch could not be installed; see the lines above."
  fi
  say "Installing SeerSeg"
  # an existing torch may be another version than the tested one: then it is the constraint
  local constraints="$folder/constraints.txt"
  { grep -v '^torch==' constraints.txt; "$ENV_BIN/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; } >"$constraints"
  "${pip[@]}" install -c "$constraints" -e "$extras" 2>&1 | grep -v '^WARNING: Location' || true
  "$ENV_BIN/python" -c 'import seerseg, click' || die "SeerSeg could not be installed; see the lines above."
}
