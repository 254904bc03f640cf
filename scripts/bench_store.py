"""SeerSeg's store against nnU-Net's preprocessed layout: slices, patches, whole volumes, bytes, writing.

    python scripts/bench_store.py [--shape 300 512 512] [--repeats 15] [--image CT.nii.gz] [--layouts]

Both are written with the same blosc2 and read with one thread, warm page cache, reads interleaved; CPU time, medians. nnU-Net's side
is what nnU-Net 2.8.1 does for a 128-cube patch: normalised float32, block 32^3, chunk 96x128x128, LZ4HC level 5, the better of
NOFILTER and SHUFFLE by its own trial, read through a memory map. "as is": a scan that already had the target spacing, so
its values stay few; "resampled": interpolated, as most scans of a mixed set are. Without --image the volume is synthetic: a
body of smooth organs with 12 HU of noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np

from seerseg.store import StoredCase, StoreLayout, open_case, write_case
from seerseg.volume import Grid, Volume, read_volume

PATCH = 128
NNUNET_BLOCK, NNUNET_CHUNK = (1, 32, 32, 32), (1, 96, 128, 128)


def synthetic_ct(shape: tuple[int, int, int]) -> np.ndarray:
    generator = np.random.default_rng(0)
    array = np.empty(shape, np.int16)
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[1:])
    organs = [(*generator.uniform(-0.5, 0.5, 3), generator.uniform(0.1, 0.3), generator.uniform(-900, 400)) for _ in range(14)]
    for number, z in enumerate(np.linspace(-1, 1, shape[0])):
        plane = np.where((x[None] / 0.75) ** 2 + (y[:, None] / 0.55) ** 2 < 1, np.float32(40), np.float32(-1000))
        for oz, oy, ox, radius, value in organs:
            plane[(x[None] - ox) ** 2 + (y[:, None] - oy) ** 2 + (z - oz) ** 2 < radius**2] = value
        array[number] = (plane + generator.normal(0, 12, plane.shape)).clip(-1024, 3071)
    return array


def write_as_nnunet(array: np.ndarray, path: Path, resampled: bool) -> str:
    data = array.astype(np.float32)[None]
    if resampled:  # interpolation leaves no whole numbers
        data += np.random.default_rng(1).random(data.shape, np.float32) - 0.5
    low, high = np.percentile(array[::4, ::4, ::4][array[::4, ::4, ::4] > -950], (0.5, 99.5))
    data = (np.clip(data, low, high) - data.mean()) / data.std()
    middle = tuple(slice((s - min(s, c)) // 2, (s - min(s, c)) // 2 + min(s, c)) for s, c in zip(data.shape, NNUNET_CHUNK, strict=True))
    slab = np.ascontiguousarray(data[middle])
    blocks = tuple(min(b, s) for b, s in zip(NNUNET_BLOCK, slab.shape, strict=True))
    sizes = {}
    for kind in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE):
        trial = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1, "filters": [kind]}
        sizes[kind] = blosc2.asarray(slab, chunks=slab.shape, blocks=blocks, cparams=trial).schunk.cbytes
    best = min(sizes, key=sizes.__getitem__)
    settings = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1, "filters": [best]}
    blosc2.asarray(data, urlpath=str(path), chunks=NNUNET_CHUNK, blocks=NNUNET_BLOCK, cparams=settings)
    return str(best.name)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds, as everything here has one thread: other work on the machine disturbs them less than wall time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--layouts", action="store_true", help="also other chunk sizes and slab thicknesses")
    options = parser.parse_args()
    blosc2.set_nthreads(1)
    array = read_volume(options.image).array if options.image else synthetic_ct(tuple(options.shape))
    volume = Volume(array, Grid(array.shape, np.eye(4)), "CT")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare(volume, folder, options.repeats)
        if options.layouts:
            layouts(volume, folder, options.repeats)


def reads(shape: tuple[int, int, int], repeat: int) -> dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Name -> half-open box; another place each time, patches not aligned to any chunk."""
    generator = np.random.default_rng(repeat)
    boxes = {}
    for axis, plane in enumerate(("axial slice", "coronal slice", "sagittal slice")):
        index = int(generator.integers(shape[axis]))
        lo, hi = [0, 0, 0], list(shape)
        lo[axis], hi[axis] = index, index + 1
        boxes[plane] = tuple(lo), tuple(hi)
    lo = [int(generator.integers(max(1, size - PATCH + 1))) for size in shape]
    boxes[f"{PATCH}-cube patch"] = tuple(lo), tuple(min(low + PATCH, size) for low, size in zip(lo, shape, strict=True))
    if repeat % 5 == 0:
        boxes["whole volume"] = (0, 0, 0), shape
    return boxes  # type: ignore[return-value]


def compare(volume: Volume, folder: Path, repeats: int) -> None:
    z, y, x = volume.grid.shape_zyx
    print(f"{z}x{y}x{x} {volume.array.dtype}, blosc2 {blosc2.__version__}, medians of {repeats}, CPU time of one thread")
    write_s = seconds(lambda: write_case(folder, "case", [volume], None, StoreLayout()))
    bare = Volume(volume.array, volume.grid, volume.modality)
    measured_s = seconds(lambda: (bare.content_hash, bare.percentiles))
    peers = {name: folder / f"{name}.b2nd" for name in ("as is", "resampled")}
    filters: dict[str, str] = {}
    peer_write_s = {}
    for name, path in peers.items():
        began = time.process_time()
        filters[name] = write_as_nnunet(volume.array, path, name == "resampled")
        peer_write_s[name] = time.process_time() - began
    times: dict[str, dict[str, list[float]]] = {}
    for repeat in range(repeats):
        for what, (lo, hi) in {"open": ((0, 0, 0), (0, 0, 0)), **reads(volume.grid.shape_zyx, repeat)}.items():
            row = times.setdefault(what, {"ours": [], **{name: [] for name in peers}})
            inside = tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))
            for name, path in peers.items():
                began = time.process_time()
                frame = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
                if what != "open":
                    began = time.process_time()
                    frame[(0, *inside)]
                row[name].append(time.process_time() - began)
            began = time.process_time()
            case = open_case(folder, "case")
            if what != "open":
                began = time.process_time()
                read(case, lo, hi)
            row["ours"].append(time.process_time() - began)
    print(f"{'':16s}{'SeerSeg':>10s}" + "".join(f"{'nnU-Net ' + name:>20s}{'ratio':>7s}" for name in peers))
    for what, row in times.items():
        ours = statistics.median(row["ours"]) * 1e3
        line(what + " ms", ours, {name: statistics.median(row[name]) * 1e3 for name in peers})
    line(
        "on disk MiB",
        (folder / "cases/case.b2nd").stat().st_size / 2**20,
        {name: path.stat().st_size / 2**20 for name, path in peers.items()},
    )
    line("write s", write_s, peer_write_s)
    print(f"nnU-Net's trial chose {', '.join(f'{kind} ({name})' for name, kind in filters.items())}.")
    print(f"SeerSeg's writing includes reading back and comparing all voxels, and {measured_s:.2f} s for percentiles and content hash.")


def line(what: str, ours: float, theirs: dict[str, float]) -> None:
    print(f"{what:16s}{ours:10.2f}" + "".join(f"{value:20.2f}{value / ours:7.1f}" for value in theirs.values()))


def read(case: StoredCase, lo: tuple[int, int, int], hi: tuple[int, int, int]) -> object:
    flat = [axis for axis in range(3) if hi[axis] - lo[axis] == 1]
    return case.read_slice(flat[0], lo[flat[0]]) if len(flat) == 1 else case.read_patch(lo, hi)


def layouts(volume: Volume, folder: Path, repeats: int) -> None:
    print("\nOther layouts of SeerSeg's store, medians in ms")
    print(f"{'slab':>5s}{'KiB':>6s}{'chunk':>18s}{'axial':>8s}{'coronal':>9s}{'sagittal':>10s}{'patch':>8s}{'whole':>8s}{'MiB':>7s}")
    for slab in (1, 2, 4, 8, 16):
        for kib in (32, 64, 128, 256, 512):
            layout = StoreLayout(slab=slab, chunk_bytes=kib << 10)
            case = write_case(folder, f"{slab}-{kib}", [volume], None, layout)
            times: dict[str, list[float]] = {}
            for repeat in range(repeats):
                for what, (lo, hi) in reads(volume.grid.shape_zyx, repeat).items():
                    times.setdefault(what, []).append(seconds(lambda: read(case, lo, hi)))  # noqa: B023
            cells = [statistics.median(times[what]) * 1e3 for what in times]
            size = case.image.path.stat().st_size / 2**20
            row = "".join(f"{cell:{width}.2f}" for cell, width in zip(cells, (8, 9, 10, 8, 8), strict=True))
            print(f"{slab:5d}{kib:6d}{case.image.chunk[1:]!s:>18s}{row}{size:7.1f}", flush=True)
            case.image.path.unlink()


if __name__ == "__main__":
    main()
