"""The stated peak memory of prediction is held: bytes per voxel of the scan, over what the program itself needs.

Stated, s being 2 (int16) or 4 (where it must be float32) and n the number of distinct answers: s + n + 1, at least 2 s
(reading a scan that is stored in other axes), a constant of at most 28 MB, and what the segmenter needs for itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import reasoner_contract as contract
import tiny_vlms
from prediction_cases import environment

from seerseg.prediction.folder import default_limit_bytes
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.base import most_bytes
from seerseg.reasoners.cascade import CascadeReasoner
from seerseg.reasoners.committee import CommitteeReasoner
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.prefixes import LEAST_BYTES
from seerseg.reasoners.vlm import VlmReasoner, load_later
from seerseg.reasoners.vlm_loading import find
from seerseg.reasoners.vlm_loading import load as load_model

SHAPE_XYZ = (256, 256, 160)
CONSTANT_BYTES = 28 << 20

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from seerseg.prediction import Options, Predictor, predict_folder
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation
from seerseg.volume import Mask

class Thresholds:
    capabilities = Capabilities(text="open")
    card = ModelCard(name="thresholds", identity="1")
    def segment(self, volume, prompts):
        return [Segmentation(p, "ok", Mask(volume.array > int(p.text), volume.grid)) for p in prompts]
    def session(self, volume):
        raise RuntimeError

folder, prompts = Path(sys.argv[1]), sys.argv[2].split()
model = Predictor(Thresholds(), "verbatim", device="cpu")
predict_folder(folder / "small", folder / "out_small", model, prompts=prompts, options=Options(overlay=True))
Path("/proc/self/clear_refs").write_text("5")
read = lambda name: int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024
before = read("VmRSS")
report = predict_folder(folder / "large", folder / "out", model, prompts=prompts, options=Options(per_request=True, overlay=True))
assert report.exit_code == 0, report.results
print(read("VmHWM") - before)
"""


def write_scan(path: Path, shape_xyz: tuple[int, ...], dtype: type) -> None:
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 100, (16, 16, 16), dtype=np.int16)
    array = np.tile(noise, [n // 16 for n in shape_xyz])
    scaled = array.astype(np.float32) + np.float32(0.5) if dtype is np.float32 else array
    nib.Nifti1Image(scaled, np.diag([-0.8, -0.8, 1.0, 1])).to_filename(path)


@pytest.mark.parametrize(("dtype", "prompts"), [(np.int16, "50 60 70"), (np.int16, " ".join(["50"] * 8)), (np.float32, "50 60")])
def test_bytes_per_voxel(tmp_path: Path, dtype: type, prompts: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory can be asked of Linux alone")
    write_scan(tmp_path / "small" / "a.nii.gz", (32, 32, 32), dtype)
    write_scan(tmp_path / "large" / "a.nii.gz", SHAPE_XYZ, dtype)
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), prompts],
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},  # so that what is freed is given back, and not kept for later
    )
    assert made.returncode == 0, made.stderr
    scan, answers = np.dtype(dtype).itemsize, len(set(prompts.split()))
    stated = max(2 * scan, scan + answers + 1)
    used = (int(made.stdout) - CONSTANT_BYTES) / np.prod(SHAPE_XYZ)
    assert used < stated, f"{used:.2f} bytes per voxel over the constant, stated {stated}"


def test_what_the_reasoner_may_remember_is_counted(tmp_path: Path) -> None:
    """Weights and remembered prefixes of a model, loaded or not, are taken from what scans in flight may hold."""
    folder = tiny_vlms.qwen(tmp_path / "qwen", "3")
    reasoner = VlmReasoner(load_model(find(folder, offline=True), device="cpu", dtype=None), Decoding())
    weights = sum(weight.numel() * 4 for weight in reasoner.model.parameters())
    assert most_bytes(reasoner) == weights + max(LEAST_BYTES, weights // 4)
    assert most_bytes(VlmReasoner(reasoner.loaded, Decoding(kept_bytes=1 << 20))) == weights + (1 << 20)
    later = load_later(source=folder)
    assert most_bytes(later) == pytest.approx(most_bytes(reasoner), rel=0.01)
    assert not later.loaded
    rules = load_reasoner("lexicon")
    assert most_bytes(rules) == 0
    assert most_bytes(CascadeReasoner([rules, later])) == most_bytes(CommitteeReasoner([later, rules])) == most_bytes(later)
    ram = 4 << 30
    assert default_limit_bytes(0, ram) == ram // 4
    assert default_limit_bytes(most_bytes(later), ram) == (ram - most_bytes(later)) // 4
    assert default_limit_bytes(2 * ram, ram) == ram // 32, "a scan at a time still fits"
    assert most_bytes(load_reasoner("cascade")) > LEAST_BYTES


def test_what_is_remembered_stays_under_what_was_counted(tmp_path: Path) -> None:
    reasoner = load_later(source=tiny_vlms.qwen(tmp_path / "qwen", "3"))
    for seed in range(3):
        reasoner.reply([contract.dialogue(text, shown=contract.images(2, seed)) for text in ("left lung", "the ribs")])
    model = reasoner.made
    assert isinstance(model, VlmReasoner)
    held = model.decoder.prefixes.held_bytes
    weights = sum(weight.numel() * 4 for weight in model.model.parameters())
    assert 0 < held <= most_bytes(reasoner) - weights
