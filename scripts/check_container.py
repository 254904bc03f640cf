"""Scans for scripts/check_container.sh, and what their answers must be.

python scripts/check_container.py make WORK [--quick]      WORK/npz, npz_broken, npz_hostile, job, job_broken: one case each
python scripts/check_container.py check WORK CASE CODE     the entry point's exit code and files
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from seerseg.volume import Volume, read_volume, source_of, write_metaimage

WINDOW = (-160.0, 1500.0)  # lung
PROMPTS = {"1": "Right lung in chest CT", "2": "Left lung", "instance_label": 0}
RELATIVE = Path("images") / "lung-segmentation" / "output.mha"


def scan(quick: bool) -> Volume:
    """A canonical CT: 120 mm of the chest that slicerio carries, else a phantom."""
    spec = None if quick else find_spec("slicerio")
    if spec is not None and spec.submodule_search_locations:
        chest = read_volume(Path(spec.submodule_search_locations[0]) / "data" / "CTChest4.nrrd", modality="CT")
        low, high = (12, 16, 4), (24, 112, 124)
        part = np.ascontiguousarray(chest.array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
        return Volume(part, chest.grid.crop(low, high), "CT")
    from seerseg.volume import Grid
    from seerseg_data.phantoms import phantom

    made = phantom("chest", 3, spacing_zyx_mm=(10.0, 7.0, 7.0))
    return Volume(made.array_zyx, Grid(made.array_zyx.shape, made.affine), "CT")


def make(work: Path, quick: bool) -> None:
    volume = scan(quick)
    low = WINDOW[0] - WINDOW[1] / 2
    grey = (np.clip((volume.array.astype(np.float32) - low) / WINDOW[1], 0, 1) * 255).astype(np.uint8)
    spacing = np.array(volume.grid.spacing_zyx[::-1])
    stored = np.ascontiguousarray(grey[:, ::-1, ::-1])  # (D, H, W): up, back, left
    for case in ("npz", "npz_broken", "npz_hostile"):
        (work / case).mkdir()
    np.savez_compressed(work / "npz" / "CT_chest_1.npz", imgs=stored, spacing=spacing, text_prompts=PROMPTS)
    whole = (work / "npz" / "CT_chest_1.npz").read_bytes()
    (work / "npz_broken" / "CT_chest_2.npz").write_bytes(whole[: len(whole) // 2])
    hostile = np.empty((), dtype=object)
    hostile[()] = _Hostile()
    np.savez_compressed(work / "npz_hostile" / "CT_chest_3.npz", imgs=stored, spacing=spacing, text_prompts=hostile)
    for case in ("job", "job_broken"):
        place = work / case / "images" / "chest-ct"
        place.mkdir(parents=True)
        source = source_of(volume.grid)
        write_metaimage(volume.array.T, source, place / "5a1c.mha")
        (work / case / "what-to-segment.json").write_text(json.dumps(["right lung", "left lung"]))
        sockets = (
            {"slug": "chest-ct", "kind": "Image", "super_kind": "Image", "relative_path": "images/chest-ct"},
            {"slug": "what-to-segment", "kind": "Anything", "super_kind": "Value", "relative_path": "what-to-segment.json"},
        )
        (work / case / "inputs.json").write_text(
            json.dumps([{"file": None, "image": None, "value": None, "interface": s} for s in sockets])
        )
    broken = work / "job_broken" / "images" / "chest-ct" / "5a1c.mha"
    broken.write_bytes(broken.read_bytes()[:-1000])


class _Hostile:
    """Unpickled carelessly, it makes a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return (os.mkdir, ("/tmp/was_run",))


def check(work: Path, case: str, code: int) -> str:
    """A sentence when all is as it must be; AssertionError else."""
    log = (work / f"{case}.log").read_text()
    files = [p for p in (work / "outputs" / case).rglob("*") if p.is_file()]
    must(code == 0, f"exit code {code}")
    must("Traceback" not in log, "a traceback")
    must(len(files) == 1, f"files {files}")
    source = next(work.glob(f"{case}/*.npz")) if case.startswith("npz") else next(work.glob(f"{case}/images/*/*.mha"))
    if case.startswith("npz"):
        must(files[0].name == source.name, f"it is called {files[0].name}")
        drawn = np.load(files[0])["segs"]
        shape = np.load(work / "npz" / "CT_chest_1.npz")["imgs"].shape
        must(drawn.shape == shape and drawn.dtype == np.uint8, f"shape {drawn.shape}, {drawn.dtype}")
    else:
        must(files[0].relative_to(work / "outputs" / case) == RELATIVE, f"it lies at {files[0]}")
        written, whole = sitk.ReadImage(str(files[0])), sitk.ReadImage(str(next((work / "job").glob("images/*/*.mha"))))
        for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            must(getattr(written, name)() == getattr(whole, name)(), f"{name}: {getattr(written, name)()}, {getattr(whole, name)()}")
        drawn = sitk.GetArrayFromImage(written)
    counts = {int(v): int(n) for v, n in zip(*np.unique(drawn, return_counts=True), strict=True) if v}
    if case in ("npz", "job"):
        must(set(counts) == {1, 2}, f"values {counts}")
        return f"one case in, one file out, exit 0; voxels by value {counts}"
    reason = next((line for line in log.splitlines() if "an empty answer was written" in line), "")
    must(not counts, f"it is not empty: {counts}")
    must(bool(reason), "no reason was logged")
    return f"an empty answer of the scan's shape, exit 0; logged: {reason}"


def must(held: bool, otherwise: str) -> None:
    """Not assert: it must hold under python -O too."""
    if not held:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), "--quick" in sys.argv)
    else:
        print(check(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
