#!/usr/bin/env bash
# The small reproduction: from raw scans to the table of what each part brings, on MSD hippocampus with the committed split.
#   bash scripts/reproduce_mini.sh OUT [--data DIR] [--sft_minutes M] [--grpo_minutes M] [--limit N]
# DIR is the dataset in the raw layout (imagesTr, labelsTr, dataset.json); without it ../shared/data/mr_hippocampus beside the project.
# Under 90 minutes on 2 cores. Writes OUT/table.json, OUT/table.md and everything they were made from. Stages that are done are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${SEERSEG_VENV:-.venv-train}" ".[train,report]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 MPLBACKEND=Agg
exec "$ENV_BIN/python" scripts/reproduce_mini.py "$@"
