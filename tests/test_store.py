"""The store gives back exactly what was put in, decodes only what is asked for, and never gives wrong voxels."""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seerseg.errors import DatasetError, GeometryError, OutputError, StoreError
from seerseg.store import SourceFile, StoredCase, StoreLayout, case_path, hash_source, open_case, stored_cases, verify_case, write_case
from seerseg.store.sealed import FOOTER
from seerseg.views import ViewSpec, render
from seerseg.volume import Grid, SourceGeometry, Volume

AFFINE = np.array([[1.5, 0.1, 0, -20], [0, 2.0, 0, -31], [0, 0, 3.0, 7], [0, 0, 0, 1]])
SMALL = StoreLayout(axis=0, slab=2, chunk_bytes=1024)
ORIENTATION = np.array([[0.0, -1.0], [1.0, -1.0], [2.0, 1.0]])


def grid_of(shape: tuple[int, int, int]) -> Grid:
    return Grid(shape, AFFINE)


def volume_of(array: np.ndarray, *, modality: str | None = "MR", channel: int = 0) -> Volume:
    z, y, x = array.shape
    source = SourceGeometry((x, y, z), AFFINE * np.array([-1, -1, 1, 1]), ORIENTATION, bytes(range(64)), notes=("as a test has it",))
    return Volume(array, grid_of(array.shape), modality, channel, source, "case")


def noise(shape: tuple[int, ...], dtype: Any = np.int16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3000, shape).astype(dtype)


@pytest.fixture
def stored(tmp_path: Path) -> StoredCase:
    """Many small chunks, a label map, and a block of zeros as padded scans have."""
    array = noise((20, 30, 26))
    array[:6] = 0
    labels = (array > 1500).astype(np.uint8) * 2
    return write_case(
        tmp_path, "case", [volume_of(array)], (labels, grid_of(array.shape)), SMALL, sources=[SourceFile("a.nii.gz", 5, "ff")]
    )


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 19), st.integers(1, 40), st.integers(1, 33)),
    st.sampled_from([np.int16, np.float32]),
    st.builds(StoreLayout, axis=st.integers(0, 2), slab=st.integers(1, 6), chunk_bytes=st.sampled_from([1024, 4096, 1 << 17])),
    st.integers(1, 3),
    st.data(),
)
def test_what_was_written_is_read(
    tmp_path: Path, shape: tuple[int, int, int], dtype: Any, layout: StoreLayout, channels: int, data: st.DataObject
) -> None:
    arrays = [noise(shape, dtype, seed) for seed in range(channels)]
    labels = np.random.default_rng(9).integers(0, 3, shape)
    write_case(tmp_path, "c", [volume_of(a, channel=i) for i, a in enumerate(arrays)], (labels, grid_of(shape)), layout)
    case = pickle.loads(pickle.dumps(open_case(tmp_path, "c")))  # as a worker process gets it
    channel = data.draw(st.integers(0, channels - 1))
    lo = tuple(data.draw(st.integers(0, size)) for size in shape)
    hi = tuple(data.draw(st.integers(low, size)) for low, size in zip(lo, shape, strict=True))
    inside = tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))
    assert case.channels == channels
    assert case.dtype == dtype
    assert np.array_equal(case.volume(channel).array, arrays[channel])
    assert np.array_equal(case.read_patch(lo, hi, channel), arrays[channel][inside])
    assert np.array_equal(case.read_label_patch(lo, hi), labels[inside])
    for axis in (0, 1, 2):
        index = data.draw(st.integers(0, shape[axis] - 1))
        assert np.array_equal(case.read_slice(axis, index, channel), np.take(arrays[channel], index, axis))
        assert np.array_equal(case.read_label_slice(axis, index), np.take(labels, index, axis))


def test_a_stored_channel_is_the_volume_it_was_made_from(stored: StoredCase) -> None:
    array = noise((20, 30, 26))
    array[:6] = 0
    given, read = volume_of(array), stored.volume()
    assert read.content_hash == given.content_hash == stored.content_hash()
    assert Volume(read.array, read.grid, read.modality).content_hash == given.content_hash  # not merely remembered
    assert read.percentiles == given.percentiles == stored.percentiles() == dict(stored.channel().percentiles)
    assert read.source is not None
    assert read.source.to_json() == given.source.to_json() == stored.source.to_json()  # type: ignore[union-attr]
    assert np.array_equal(stored.grid.affine, AFFINE)
    assert stored.sources == (SourceFile("a.nii.gz", 5, "ff"),)
    assert stored.label_counts() == {0: int((array <= 1500).sum()), 2: int((array > 1500).sum())}
    labels, grid = stored.labels() or pytest.fail("the labels are gone")
    assert labels.dtype == np.uint8
    assert grid.close_to(stored.grid)


@pytest.mark.parametrize(
    ("dtype", "values", "kept"),
    [
        (np.int16, [-1024, 3000], "int16"),
        (np.uint8, [0, 255], "int16"),
        (np.int32, [-32768, 32767], "int16"),
        (np.uint16, [0, 40000], "float32"),
        (np.float32, [0.25, np.nan], "float32"),
        (np.float64, [0.25, 7], "float32"),
    ],
)
def test_voxels_are_int16_where_lossless_else_float32(tmp_path: Path, dtype: Any, values: list[float], kept: str) -> None:
    array = np.resize(np.array(values, dtype), (3, 4, 5))
    case = write_case(tmp_path, "c", [volume_of(array)], None, StoreLayout())
    assert case.dtype == kept
    assert np.array_equal(case.volume().array, array.astype(kept), equal_nan=kept == "float32")
    assert case.labels() is None
    assert not case.has_labels


@pytest.mark.parametrize(("highest", "kept"), [(1, "uint8"), (255, "uint8"), (256, "uint16"), (70000, "uint32")])
def test_labels_are_kept_in_the_smallest_unsigned_type(tmp_path: Path, highest: int, kept: str) -> None:
    labels = np.zeros((3, 4, 5), np.int64)
    labels[1, 2, 3] = highest
    case = write_case(tmp_path, "c", [volume_of(noise((3, 4, 5)))], (labels, grid_of((3, 4, 5))), StoreLayout())
    read, _ = case.labels() or pytest.fail("the labels are gone")
    assert read.dtype == kept
    assert np.array_equal(read, labels)
    assert case.label_counts() == {0: 59, highest: 1}


def test_any_blosc2_reads_the_file(stored: StoredCase, tmp_path: Path) -> None:
    frame = blosc2.open(str(case_path(tmp_path, "case")), mode="r")
    assert np.array_equal(frame[0], stored.volume().array)
    assert frame.schunk.vlmeta["seerseg"]["grid"] == stored.grid.to_json()
    labels = blosc2.open(str(stored.label_path), mode="r")
    assert np.array_equal(labels[:], (stored.labels() or [None])[0])


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_views_of_the_store_are_views_of_the_volume(stored: StoredCase, plane: str) -> None:
    spec = ViewSpec(plane=plane, size_px=56)
    for one, other in zip(render(stored.channel(), spec).views, render(stored.volume(), spec).views, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def touched_by(case: StoredCase, slices: list[int]) -> set[int]:
    counts = [-(-size // step) for size, step in zip(case.image.shape, case.image.chunk, strict=True)]
    slabs = {index // case.image.chunk[1] for index in slices}
    return {n for n, position in enumerate(itertools.product(*map(range, counts))) if position[1] in slabs}


def test_rendering_eight_views_decodes_no_other_slab(tmp_path: Path) -> None:
    array = noise((120, 40, 44))
    case = write_case(tmp_path, "c", [volume_of(array)], None, StoreLayout(slab=4, chunk_bytes=4096))
    intact = render(case.volume(), ViewSpec(size_px=56))
    shown = [view.index for view in intact.views]
    needed = touched_by(case, shown)
    assert len(needed) <= 8 / 30 * len(case.image.table) + 1
    data = bytearray(case.image.path.read_bytes())
    for number, entry in enumerate(case.image.table):
        if number not in needed:
            data[int(entry["offset"]) : int(entry["offset"] + entry["length"])] = bytes(int(entry["length"]))
    case.image.path.write_bytes(data)
    damaged = open_case(tmp_path, "c")
    for one, other in zip(render(damaged.channel(), ViewSpec(size_px=56)).views, intact.views, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
    with pytest.raises(StoreError, match=r"c\.b2nd is damaged.*seerseg_preprocess"):
        damaged.volume()
    with pytest.raises(StoreError, match="is damaged"):
        damaged.read_slice(1, 3)
    with pytest.raises(StoreError, match="is damaged"):
        verify_case(tmp_path, "c")


def read_everything(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    case = open_case(folder, "case")
    labels, _ = case.labels() or pytest.fail("the labels are gone")
    assert np.array_equal(case.read_slice(0, 3), case.volume().array[3])
    assert case.percentiles().keys() == {"0.5", "5", "50", "95", "99.5", "min", "max"}
    assert case.source.to_json()["orientation"] == ORIENTATION.tolist()
    return case.volume().array, labels


@settings(max_examples=400)
@given(st.sampled_from(["cases", "labels"]), st.sampled_from(["flip", "cut", "grow", "fill", "swap"]), st.floats(0, 1), st.integers(1, 255))
@example("cases", "cut", 0.0, 1)
@example("cases", "cut", 0.9999, 1)
def test_damaged_files_are_refused_or_read_right(
    stored: StoredCase, tmp_path: Path, which: str, how: str, where: float, value: int
) -> None:
    expected = read_everything(tmp_path)
    path = tmp_path / which / "case.b2nd"
    whole = path.read_bytes()
    data = bytearray(whole)
    at = min(int(where * len(data)), len(data) - 1)
    if how == "flip":
        data[at] ^= value
    elif how == "cut":
        del data[at:]
    elif how == "grow":
        data += bytes([value]) * (at + 1)
    elif how == "fill":
        data[at : at + 4096] = bytes([value]) * len(data[at : at + 4096])
    else:
        data = data[at:] + data[:at]
    refused = ""
    path.write_bytes(data)
    try:
        found = read_everything(tmp_path)
    except StoreError as error:
        refused = str(error)
    finally:
        path.write_bytes(whole)
    if refused:
        assert "seerseg_preprocess" in refused
        assert str(path) in refused
    else:
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("where", np.linspace(0, 1, 40).tolist())
def test_verifying_finds_a_single_changed_bit_anywhere(stored: StoredCase, tmp_path: Path, where: float) -> None:
    verify_case(tmp_path, "case")
    for path in (case_path(tmp_path, "case"), stored.label_path):
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"damaged|without a seal"):
            verify_case(tmp_path, "case")
        data[int(where * (len(data) - 1))] ^= 1
        path.write_bytes(data)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_foreign_bytes_are_no_store_file(tmp_path: Path, data: bytes) -> None:
    case_path(tmp_path, "x").parent.mkdir(exist_ok=True)
    case_path(tmp_path, "x").write_bytes(data)
    with pytest.raises(StoreError, match=r"cut short, or was not written by SeerSeg"):
        open_case(tmp_path, "x")


def test_missing_foreign_outdated_and_mixed_up_files_are_named(stored: StoredCase, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no preprocessed file .*nothere\.b2nd.*seerseg_preprocess"):
        open_case(tmp_path, "nothere")
    with pytest.raises(StoreError, match="no name for a case"):
        open_case(tmp_path, "../case")
    foreign = case_path(tmp_path, "foreign")
    blosc2.asarray(np.zeros((1, 4, 4, 4), np.float32), urlpath=str(foreign))
    with pytest.raises(StoreError, match="not written by SeerSeg"):
        open_case(tmp_path, "foreign")
    shutil.copy(stored.label_path, case_path(tmp_path, "label"))
    with pytest.raises(StoreError, match="not the image of a case"):
        open_case(tmp_path, "label")
    foreign.unlink()
    foreign.mkdir()
    with pytest.raises(StoreError, match="Cannot read"):
        open_case(tmp_path, "foreign")


def test_a_file_of_another_schema_is_outdated(stored: StoredCase, tmp_path: Path) -> None:
    from seerseg.store import sealed

    path = case_path(tmp_path, "case")
    data = path.read_bytes()
    magic, text_bytes, table_bytes, *others, _ = FOOTER.unpack(data[-FOOTER.size :])
    start = len(data) - FOOTER.size - table_bytes - text_bytes
    seal = data[start : -FOOTER.size].replace(b'"schema": 1', b'"schema": 7', 1)
    footer = FOOTER.pack(magic, text_bytes, table_bytes, *others, sealed._digest(seal, text_bytes, table_bytes, *others))
    path.write_bytes(data[:start] + seal + footer)
    with pytest.raises(StoreError, match=r"has schema version 7, this SeerSeg reads version 1.*seerseg_preprocess"):
        open_case(tmp_path, "case")


def test_labels_of_another_writing_are_not_taken(stored: StoredCase, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_case(other, "case", [stored.volume()], (np.ones(stored.grid.shape_zyx, np.uint8), stored.grid), SMALL)
    shutil.copy(other / "labels/case.b2nd", stored.label_path)
    with pytest.raises(StoreError, match="does not belong to"):
        open_case(tmp_path, "case").labels()
    stored.label_path.unlink()
    with pytest.raises(StoreError, match="no preprocessed file"):
        open_case(tmp_path, "case").labels()


def test_a_file_replaced_while_open_is_noticed_not_mixed(stored: StoredCase, tmp_path: Path) -> None:
    write_case(tmp_path, "case", [volume_of(noise((20, 30, 26), seed=5))], None, SMALL)
    with pytest.raises(StoreError, match="written anew"):
        stored.read_slice(0, 1)
    assert not stored.label_path.exists()
    assert stored_cases(tmp_path) == ["case"]


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    volume, grid = volume_of(noise((4, 5, 6))), grid_of((4, 5, 6))
    labels = np.zeros((4, 5, 6), np.int16)
    with pytest.raises(DatasetError, match="no channel"):
        write_case(tmp_path, "c", [], None, SMALL)
    with pytest.raises(GeometryError, match="Channel 1 of case c"):
        write_case(tmp_path, "c", [volume, volume_of(noise((4, 5, 7)))], None, SMALL)
    with pytest.raises(GeometryError, match="label map of case c"):
        write_case(tmp_path, "c", [volume], (labels[:2], grid), SMALL)
    with pytest.raises(DatasetError, match="negative or fractional"):
        write_case(tmp_path, "c", [volume], (labels - 1, grid), SMALL)
    with pytest.raises(DatasetError, match="negative or fractional"):
        write_case(tmp_path, "c", [volume], (labels + 0.5, grid), SMALL)
    with pytest.raises(StoreError, match="no name for a case"):
        write_case(tmp_path, "a/b", [volume], None, SMALL)
    assert not list(tmp_path.rglob("*.b2nd"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="Choose a folder"):
        write_case(tmp_path / "file", "c", [volume], None, SMALL)


@pytest.mark.parametrize(("axis", "index"), [(0, 20), (0, -1), (3, 0), (2, 26)])
def test_slices_outside_are_an_index_error(stored: StoredCase, axis: int, index: int) -> None:
    with pytest.raises(IndexError):
        stored.read_slice(axis, index)
    with pytest.raises(IndexError):
        stored.read_slice(0, 0, channel=1)
    with pytest.raises(IndexError):
        stored.read_patch((0, 0, 0), (21, 3, 3))


@given(
    st.tuples(*[st.integers(1, 700)] * 3),
    st.sampled_from(["uint8", "int16", "float32"]),
    st.integers(0, 2),
)
def test_chunks_are_bounded_slabs(shape: tuple[int, int, int], dtype: str, axis: int) -> None:
    layout = StoreLayout(axis=axis)
    chunk = layout.chunk_zyx(shape, dtype)
    assert all(1 <= step <= size for step, size in zip(chunk, shape, strict=True))
    assert np.prod(chunk) * np.dtype(dtype).itemsize <= layout.chunk_bytes
    plane = [a for a in (0, 1, 2) if a != axis]
    if any(chunk[a] < shape[a] for a in plane):
        assert chunk[axis] == min(layout.slab, shape[axis])


def test_the_planned_layout_of_a_large_scan() -> None:
    assert StoreLayout().chunk_zyx((300, 512, 512), "int16") == (2, 128, 256)
    assert StoreLayout(axis=2).chunk_zyx((300, 512, 512), "int16") == (128, 256, 2)
    assert StoreLayout(slab=4).chunk_zyx((300, 512, 512), "int16") == (4, 128, 128)
    assert StoreLayout().chunk_zyx((35, 50, 36), "int16") == (35, 50, 36)
    assert StoreLayout().chunk_zyx((1, 800, 600), "float32") == (1, 128, 256)


def test_the_digest_of_a_source_is_that_of_its_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one" / "a.bin", tmp_path / "other" / "a.bin"
    for path, data in ((one, b"abc"), (other, b"abd")):
        path.parent.mkdir()
        path.write_bytes(data)
    assert hash_source(one).size_bytes == 3
    assert hash_source(one).digest != hash_source(other).digest
    assert hash_source(one.parent).digest != hash_source(other.parent).digest
    other.write_bytes(b"abc")
    assert hash_source(one) == hash_source(other)
