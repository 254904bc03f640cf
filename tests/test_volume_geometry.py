"""Left is left: what a voxel shows keeps its place in the patient, through every orientation, file and resampling."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import inv_ornt_aff
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from seerseg.errors import GeometryError
from seerseg.volume import (
    Grid,
    SourceGeometry,
    Volume,
    read_grid,
    read_labels,
    read_volume,
    resample,
    source_of,
    write_labels,
    write_volume,
)
from seerseg.volume.orientation import LatticeMap, lattice_map, to_canonical, to_stored

ORIENTATIONS = [
    np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)], dtype=float)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def affine_of(orientation: NDArray[Any], spacing: Any, angles_deg: Any = (0, 0, 0), shear: Any = (0, 0, 0), origin: Any = (0, 0, 0)) -> Any:
    """Stored axis i runs along canonical axis orientation[i, 0] with sign orientation[i, 1], then tilted and sheared."""
    signed = np.zeros((3, 3))
    for stored, (axis, sign) in enumerate(orientation):
        signed[int(axis), stored] = sign
    sheared = np.eye(3) + np.array([[0, shear[0], shear[1]], [0, 0, shear[2]], [0, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix() @ sheared @ signed @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine.astype(np.float32).astype(float)


small = st.integers(1, 6)
shapes = st.tuples(small, small, small)
spacings = st.tuples(*[st.floats(0.3, 7.0)] * 3)
angles = st.one_of(st.just((0.0, 0.0, 0.0)), st.tuples(*[st.floats(-15, 15)] * 3))
shears = st.one_of(st.just((0.0, 0.0, 0.0)), st.tuples(*[st.floats(-0.15, 0.15)] * 3))
origins = st.tuples(*[st.floats(-300, 300)] * 3)
affines = st.builds(affine_of, st.sampled_from(ORIENTATIONS), spacings, angles, shears, origins)
seeds = st.integers(0, 2**32 - 1)


def save(array: NDArray[Any], affine: Any, path: Path) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


@settings(max_examples=150)
@given(shape=shapes, affine=affines, seed=seeds)
def test_every_stored_voxel_keeps_its_world_position(tmp_path: Path, shape: Any, affine: Any, seed: int) -> None:
    array = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape).astype(np.int16)
    volume = read_volume(save(array, affine, tmp_path / "scan.nii"))
    assert volume.array.dtype == np.int16
    assert volume.array.flags.c_contiguous
    assert (nib.orientations.io_orientation(volume.grid.affine) == [[0, 1], [1, 1], [2, 1]]).all()
    ijk = np.array(list(np.ndindex(*shape)))
    world = ijk @ affine[:3, :3].T + affine[:3, 3]
    zyx = volume.grid.to_voxel(world)
    assert np.abs(zyx - np.rint(zyx)).max() < 1e-3
    assert (volume.array[tuple(np.rint(zyx).astype(int).T)] == array[tuple(ijk.T)]).all()


@settings(max_examples=100)
@given(shape=shapes, affine=affines, seed=seeds)
def test_a_mask_goes_back_into_the_stored_orientation(tmp_path: Path, shape: Any, affine: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(-1000, 1000, shape).astype(np.int16)
    path = save(array, affine, tmp_path / "scan.nii.gz")
    volume = read_volume(path)
    assert volume.source is not None
    write_labels(volume.array > 0, volume.grid, volume.source, tmp_path / "mask.nii.gz")
    scan, mask = nib.load(path), nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == scan.shape
    assert (mask.affine == scan.affine).all()
    assert mask.get_data_dtype() == np.uint8
    assert (np.asanyarray(mask.dataobj) == (array > 0)).all()
    again, grid = read_labels(tmp_path / "mask.nii.gz", volume.grid)
    assert grid is volume.grid
    assert (again == (volume.array > 0)).all()


@settings(max_examples=80)
@given(shape=shapes, affine=affines, seed=seeds, dtype=st.sampled_from([np.int16, np.float32, np.bool_]))
def test_written_volumes_read_back_the_same(tmp_path: Path, shape: Any, affine: Any, seed: int, dtype: Any) -> None:
    array = (np.random.default_rng(seed).normal(size=shape) * 50).astype(dtype)
    grid = read_grid(save(np.zeros(shape[::-1], np.uint8), affine, tmp_path / "grid.nii"))[0]
    array = array.reshape(grid.shape_zyx)
    write_volume(Volume(array, grid), tmp_path / "again.nii.gz")
    again = read_volume(tmp_path / "again.nii.gz")
    np.testing.assert_allclose(again.array, array, rtol=1e-6)
    np.testing.assert_allclose(again.grid.affine, grid.affine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label_orientation", ORIENTATIONS[::5], ids=str)
def test_a_label_stored_in_any_other_orientation_is_flipped_exactly(tmp_path: Path, label_orientation: Any) -> None:
    """The array is mirrored or permuted against its image, the world positions agree: LAS against LPS and all their kin."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, (3, 5, 7)).astype(np.uint8)
    tilt = affine_of(ORIENTATIONS[0], (0.9, 1.1, 4.0), (4, -7, 9), (0, 0, 0), (12, -30, 5))
    like = Grid((3, 5, 7), tilt)
    stored = np.ascontiguousarray(to_stored(labels, label_orientation))
    assert (to_canonical(stored, label_orientation) == labels).all()
    path = save(stored, tilt @ np.linalg.inv(inv_ornt_aff(label_orientation, stored.shape)), tmp_path / "label.nii")
    found, _ = read_labels(path, like)
    assert (found == labels).all()


def test_las_against_lps(tmp_path: Path) -> None:
    right = np.zeros((10, 8, 6), np.uint8)
    right[1, 2, 3] = 1
    las = affine_of(np.array([[0, -1], [1, 1], [2, 1]]), (2, 2, 2), origin=(10, -6, -4))
    world = las @ [1, 2, 3, 1]
    lps = affine_of(np.array([[0, -1], [1, -1], [2, 1]]), (2, 2, 2), origin=(10, 8, -4))
    image = read_volume(save(np.zeros((10, 8, 6), np.int16), lps, tmp_path / "image.nii"))
    labels, grid = read_labels(save(right, las, tmp_path / "label.nii"), image.grid)
    (where,) = np.argwhere(labels)
    np.testing.assert_allclose(grid.to_world(where), world[:3])


@settings(max_examples=60)
@given(shape=shapes, to_shape=shapes, affine=affines, seed=seeds, order=st.sampled_from([0, 1]), data=st.data())
def test_resampling_is_what_world_positions_say(shape: Any, to_shape: Any, affine: Any, seed: int, order: int, data: Any) -> None:
    """Against a loop over target voxels in float64. The target is aligned, flipped, scaled or oblique to the source."""
    rng = np.random.default_rng(seed)
    relative = data.draw(st.builds(affine_of, st.sampled_from(ORIENTATIONS), spacings, angles, shears, st.tuples(*[st.floats(-3, 3)] * 3)))
    grid = Grid(shape, affine)
    to = Grid(to_shape, affine @ relative)
    array = rng.integers(-100, 100, shape).astype(np.int16)
    found = resample(array, grid, to, order=order, fill=-999)
    assert found.shape == to_shape
    assert found.dtype == (np.float32 if order else np.int16)
    for target in np.ndindex(*to_shape):
        where = grid.to_voxel(to.to_world(np.array(target)))
        edge = np.abs(where + 0.5 - np.rint(where + 0.5)).min()
        if edge < 1e-2:
            continue  # on the border of two voxels float noise decides
        if (where < -0.5).any() or (where >= np.array(shape) - 0.5).any():
            assert found[target] == -999
        elif order == 0:
            assert found[target] == array[tuple(np.floor(where + 0.5).astype(int))]
        else:
            assert found[target] == pytest.approx(linear(array, where), abs=0.5)


def linear(array: NDArray[Any], where: NDArray[Any]) -> float:
    where = np.clip(where, 0, np.array(array.shape) - 1)
    low = np.minimum(np.floor(where).astype(int), np.maximum(0, np.array(array.shape) - 2))
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod([w if c else 1 - w for c, w in zip(corner, where - low, strict=True)])
        total += weight * float(array[tuple(np.minimum(low + corner, np.array(array.shape) - 1))])
    return total


@pytest.mark.parametrize("angles_deg", [(0, 0, 0), (20, 10, -5)])
@pytest.mark.parametrize("order", [0, 1])
def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch, angles_deg: Any, order: int) -> None:
    grid = Grid((9, 8, 7), np.eye(4))
    to = Grid((30, 11, 5), affine_of(ORIENTATIONS[0], (0.7, 0.8, 0.3), angles_deg))
    array = np.random.default_rng(0).normal(size=grid.shape_zyx).astype(np.float32)
    whole = resample(array, grid, to, order=order, slab=False)
    monkeypatch.setattr("seerseg.volume.resampling.SLAB_VOXELS", 100)
    np.testing.assert_allclose(resample(array, grid, to, order=order), whole, atol=1e-5)


def test_masks_stay_masks_and_volumes_never_become_float64() -> None:
    grid, to = Grid((4, 4, 4), np.eye(4)), Grid((8, 8, 8), np.diag([0.5, 0.5, 0.5, 1.0]))
    mask = np.zeros(grid.shape_zyx, bool)
    mask[1, 2, 3] = True
    up = resample(mask, grid, to, order=0)
    assert up.dtype == np.bool_
    assert up.sum() == 8
    assert resample(mask, grid, to, order=1).dtype == np.float32
    assert resample(np.zeros(grid.shape_zyx), grid, to, order=1).dtype == np.float32


def test_a_voxel_owns_its_lower_edge_and_not_its_upper() -> None:
    """Half-open [i - 1/2, i + 1/2): doubling a grid gives every voxel exactly two children, whatever the affine's float noise."""
    for tilt in ((0, 0, 0), (10, 20, 3)):
        affine = affine_of(ORIENTATIONS[0], (0.9, 0.7, 3.1), tilt, origin=(101.3, -77.7, 13.1))
        grid = Grid((5, 6, 7), affine)
        fine = affine @ np.diag([0.5, 0.5, 0.5, 1.0])
        fine[:3, 3] = (affine @ [-0.25, -0.25, -0.25, 1])[:3]
        array = np.arange(grid.size).reshape(grid.shape_zyx)
        found = resample(array, grid, Grid((10, 12, 14), fine), order=0)
        assert (np.bincount(found.ravel()) == 8).all()
        at_edges = affine.copy()
        at_edges[:3, 3] = (affine @ [-0.5, -0.5, -0.5, 1])[:3]
        assert (resample(array, grid, Grid(grid.shape_zyx, at_edges), order=0) == array).all()


def test_resampling_refuses_what_is_not_its_grid() -> None:
    grid = Grid((4, 4, 4), np.eye(4))
    with pytest.raises(ValueError, match="shape"):
        resample(np.zeros((4, 4, 5)), grid, grid, order=0)
    with pytest.raises(ValueError, match="order"):
        resample(np.zeros((4, 4, 4)), grid, grid, order=3)


@settings(max_examples=60)
@given(shape=shapes, lo=st.tuples(*[st.integers(-4, 4)] * 3), size=shapes, orientation=st.sampled_from(ORIENTATIONS), seed=seeds)
def test_labels_of_a_cropped_region_stay_in_place(tmp_path: Path, shape: Any, lo: Any, size: Any, orientation: Any, seed: int) -> None:
    """As 3D Slicer saves segmentations: a part of the scan's lattice, or reaching beyond it, in any orientation."""
    affine = affine_of(ORIENTATIONS[0], (1.1, 0.8, 3.0), (7, 3, -5), origin=(10, 20, 30))
    like = Grid(shape, affine)
    lo_zyx = np.array(lo)
    labels = np.random.default_rng(seed).integers(1, 200, size).astype(np.uint8)
    part = affine.copy()
    part[:3, 3] = like.to_world(lo_zyx)
    stored = np.ascontiguousarray(to_stored(labels, orientation))
    path = save(stored, part @ np.linalg.inv(inv_ornt_aff(orientation, stored.shape)), tmp_path / "label.nii")
    expected = np.zeros(shape, np.uint8)
    for at in np.ndindex(*size):
        there = np.array(at) + lo_zyx
        if (there >= 0).all() and (there < shape).all():
            expected[tuple(there)] = labels[at]
    if not expected.any():
        with pytest.raises(GeometryError, match=r"label\.nii lies outside the field of view"):
            read_labels(path, like)
    else:
        found, grid = read_labels(path, like)
        assert grid is like
        assert (found == expected).all()


def test_labels_on_another_grid_are_read_by_world_position(tmp_path: Path) -> None:
    coarse = np.zeros((4, 4, 4), np.uint16)
    coarse[2, 1, 3] = 700
    path = save(coarse, affine_of(ORIENTATIONS[0], (4, 4, 4), origin=(1.5, 1.5, 1.5)), tmp_path / "label.nii")
    like = Grid((16, 16, 16), np.eye(4))
    labels, _ = read_labels(path, like)
    assert labels.dtype == np.uint16
    assert (labels[12:16, 4:8, 8:12] == 700).all()
    assert np.count_nonzero(labels) == 64


def test_labels_of_elsewhere_are_refused(tmp_path: Path) -> None:
    path = save(np.ones((4, 4, 4), np.uint8), affine_of(ORIENTATIONS[0], (1, 1, 1), origin=(200, 0, 0)), tmp_path / "label.nii")
    with pytest.raises(GeometryError, match=r"200 mm apart"):
        read_labels(path, Grid((4, 4, 4), np.eye(4)))


def test_lattices() -> None:
    grid = Grid((3, 4, 5), np.eye(4))
    assert lattice_map(grid, grid) == LatticeMap((0, 1, 2), (1, 1, 1), (0, 0, 0))
    for shift, expected in ((0.0005, True), (0.3, False)):
        moved = np.eye(4)
        moved[0, 3] = shift
        assert (lattice_map(Grid((3, 4, 5), moved), grid) is not None) == expected
    assert lattice_map(Grid((3, 4, 5), np.diag([2.0, 1, 1, 1])), grid) is None
    assert lattice_map(Grid((300, 400, 500), np.diag([1.0001, 1, 1, 1])), grid) is None


def test_a_mask_of_another_grid_is_not_written(tmp_path: Path) -> None:
    grid = Grid((3, 4, 5), np.eye(4))
    with pytest.raises(GeometryError, match=r"mask\.nii"):
        write_labels(np.zeros((3, 4, 6), bool), Grid((3, 4, 6), np.eye(4)), source_of(grid), tmp_path / "mask.nii")
    with pytest.raises(GeometryError, match=r"mask\.nii"):
        write_labels(np.zeros((3, 4, 5), bool), Grid((3, 4, 5), np.diag([2.0, 2, 2, 1])), source_of(grid), tmp_path / "mask.nii")


def test_sources_survive_json(tmp_path: Path) -> None:
    """The store keeps sources as JSON; a mask written from one is byte for byte the same."""
    affine = affine_of(ORIENTATIONS[7], (1, 2, 3), (5, 6, 7), (0.1, 0, 0))
    volume = read_volume(save(np.arange(24, dtype=np.int16).reshape(2, 3, 4), affine, tmp_path / "scan.nii.gz"))
    assert volume.source is not None
    kept = SourceGeometry.from_json(volume.source.to_json())
    for name, source in (("a.nii.gz", volume.source), ("b.nii.gz", kept)):
        write_labels(volume.array > 3, volume.grid, source, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_reading_a_scan_takes_the_memory_of_the_scan(tmp_path: Path, name: str) -> None:
    """A scan stored LPS in int16, as scanners and ITK write them: turned in place, nothing held twice."""
    array = np.random.default_rng(0).integers(0, 200, (128, 128, 120)).astype(np.int16)
    path = save(array, np.diag([-1.0, -1, 1, 1]), tmp_path / name)
    read_grid(path)
    tracemalloc.start()
    volume = read_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (volume.array == array.T[:, ::-1, ::-1]).all()
    assert peak < array.nbytes + 3_000_000
