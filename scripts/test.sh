#!/usr/bin/env bash
# The whole check, the same here and in CI: own environment, lint, types, tests.
#   bash scripts/test.sh            everything but the tests marked slow
#   bash scripts/test.sh --slow     those too
#   bash scripts/test.sh -- ARGS    further arguments for pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

marker=(-m "not slow and not gpu")
[ "${1:-}" = --slow ] && { marker=(-m "not gpu"); shift; }
[ "${1:-}" = -- ] && shift

make_environment "${SEERSEG_VENV:-.venv-test}" ".[dev]"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
python="$ENV_BIN/python"

say "Installed packages agree"
"$python" -m pip --disable-pip-version-check check
say "Lint"
"$python" -m ruff check .
"$python" -m ruff format --check .
say "Types"
"$python" -m mypy
say "Slurm, for the tests that start one (they are skipped where it cannot be had)"
bash scripts/slurm/install.sh || true
say "Tests"
exec "$python" -m pytest -q "${marker[@]}" "$@"
