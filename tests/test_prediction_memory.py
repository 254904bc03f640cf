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
from prediction_cases import environment

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
