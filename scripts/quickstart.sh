#!/usr/bin/env bash
# From a fresh clone to masks of a real CT: environment, installation, a scan from a package, free text in, masks out.
# Needs Python 3.11+ and pip, nothing else. Everything stays in this folder: .venv and quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

make_environment "${SEERSEG_VENV:-.venv}" .
"$ENV_BIN/python" -m pip --disable-pip-version-check -q install -c constraints.txt slicerio==1.4.0 2>&1 | grep -v '^WARNING: Location' || true
PATH="$PWD/$ENV_BIN:$ENV_BIN:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
data=quickstart/raw/Dataset901_CTChest
out=quickstart/predictions
started=$(date +%s)

say "A real CT of a chest, and 16 requests as people write them"
seerseg_sample ct_chest -o quickstart/raw

say "Predicting: free text in, one mask per request out"
seerseg_predict -i "$data/imagesTr" -o "$out" --requests "$data/requests.jsonl" --modality CT --per_request --overlay

say "Comparing with the labels that come with the scan"
seerseg_evaluate -d 901 --raw_folder quickstart/raw -i "$out" --split all --overlay quickstart/overlays -o quickstart/summary.json

say "Done in $(($(date +%s) - started)) s after installation"
cat >&2 <<TEXT
   masks      $PWD/$out/*.nii.gz   (open them over $PWD/$data/imagesTr/chest_001_0000.nii.gz in any viewer)
   pictures   $PWD/quickstart/overlays/
   words      $PWD/$out/chest_001.json   (what was asked, answered and drawn)
   numbers    $PWD/quickstart/summary.json

   Your own scans:  $ENV_BIN/seerseg_predict -i YOUR_FOLDER -o OUTPUT --prompt "plz outline the lft lnug"
TEXT
