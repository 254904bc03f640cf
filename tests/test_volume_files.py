"""Every kind of file in, NIfTI out: values, types, positions, and one sentence for what cannot be read."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from seerseg.errors import GeometryError, ImageError, OutputError
from seerseg.volume import (
    Mask,
    image_stem,
    is_image,
    read_case,
    read_grid,
    read_labels,
    read_legend,
    read_segmentation_names,
    read_volume,
    source_of,
    write_labels,
    write_volume,
)

SHEARED = np.array([[0.9, 0.2, 0.0, -20], [0.0, 1.1, 0.3, 5], [0.1, 0.0, 3.0, 40], [0, 0, 0, 1]])


def nifti(path: Path, array: NDArray[Any], affine: Any = None, *, sform: int = 1, qform: int = 0, kind: Any = nib.Nifti1Image) -> Path:
    image = kind(array, np.diag([1.0, 1, 1, 1]) if affine is None else affine)
    image.set_sform(image.affine, code=sform)
    image.header["qform_code"] = qform
    nib.save(image, path)
    return path


def ramp(dtype: Any = np.int16, shape: Any = (4, 5, 6)) -> NDArray[Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# types and values


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_whole_numbers_of_any_type_and_endianness_become_int16(tmp_path: Path, dtype: str, endian: str, kind: Any) -> None:
    array = ramp(endian + dtype)
    header = kind.header_class(endianness=endian)
    header.set_data_dtype(array.dtype)
    image = kind(array, SHEARED, header)
    image.set_sform(SHEARED, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert volume.array.dtype == np.int16
    assert (volume.array == ramp().T).all()
    np.testing.assert_allclose(volume.grid.affine, SHEARED, atol=1e-5)
    assert volume.source is not None
    write_labels(volume.array > 50, volume.grid, volume.source, tmp_path / "mask.nii")
    mask = nib.load(tmp_path / "mask.nii")
    assert type(mask) is (nib.Nifti1Image if kind is nib.Nifti1Image else nib.Nifti2Image)
    assert (np.asanyarray(mask.dataobj) == (ramp() > 50)).all()
    assert (mask.affine == nib.load(tmp_path / "a.nii.gz").affine).all()


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (ramp() + 0.25, np.float32),
        (ramp(np.float64) * 1000, np.float32),
        (ramp(np.uint16) + 60000, np.float32),
        (ramp(np.int32) * 100000, np.float32),
        (ramp(np.float64) - 32768, np.int16),
        (ramp(np.uint16) + 32648, np.int16),
        (ramp(np.uint16) + 32649, np.float32),
    ],
)
def test_types_are_reduced_only_where_nothing_is_lost(tmp_path: Path, array: NDArray[Any], dtype: Any) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii", array))
    assert volume.array.dtype == dtype
    assert (volume.array == array.T).all()


def test_rounded_large_integers_are_noted(tmp_path: Path) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii", ramp(np.int32) + 20_000_000))
    assert volume.source is not None
    assert "integers beyond 16777216 were rounded" in volume.source.notes[0]


@pytest.mark.parametrize(("slope", "inter", "dtype"), [(1, -1024, np.int16), (2, 7, np.int16), (0.5, 0, np.float32), (1000, 3, np.float32)])
@pytest.mark.parametrize("stored", [np.int16, np.uint8, np.float32])
def test_slope_and_intercept(tmp_path: Path, slope: float, inter: float, dtype: Any, stored: Any) -> None:
    path = nifti(tmp_path / "a.nii", ramp(stored))
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(raw)
    volume = read_volume(path)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, ramp(float).T * slope + inter)


def test_voxels_that_are_not_finite_become_the_smallest(tmp_path: Path) -> None:
    array = ramp(np.float32) + 0.5
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    volume = read_volume(nifti(tmp_path / "a.nii", array))
    assert volume.source is not None
    assert volume.source.notes == ("3 voxels were not finite and were read as 1.5, the smallest finite value",)
    assert np.isfinite(volume.array).all()
    assert volume.array[0, 0, 0] == volume.array[1, 1, 1] == volume.array[2, 2, 2] == 1.5
    array[:] = np.nan
    with pytest.raises(ImageError, match=r"a\.nii holds no finite voxel"):
        read_volume(nifti(tmp_path / "a.nii", array))


def test_a_constant_image_is_read_and_noted(tmp_path: Path) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii", np.full((3, 3, 3), 7, np.int16)))
    assert volume.source is not None
    assert volume.source.notes == ("every voxel has the value 7",)


@pytest.mark.parametrize(
    ("dtype", "word"), [(np.complex64, "complex"), ([("R", "u1"), ("G", "u1"), ("B", "u1")], r"colour \(RGB\)")], ids=["complex", "rgb"]
)
def test_several_numbers_per_voxel_are_refused(tmp_path: Path, dtype: Any, word: str) -> None:
    with pytest.raises(ImageError, match=rf"a\.nii\.gz holds {word} values"):
        read_volume(nifti(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), dtype)))


# dimensions


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1), (4, 5, 1, 1)])
def test_singleton_dimensions_are_squeezed_and_given_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii", ramp(shape=shape)))
    assert volume.array.shape == (*shape[:3], 1)[2::-1]
    assert volume.source is not None
    assert volume.source.ndim == len(shape)
    write_labels(volume.array > 3, volume.grid, volume.source, tmp_path / "m.nii")
    assert nib.load(tmp_path / "m.nii").shape == shape
    assert (np.asanyarray(nib.load(tmp_path / "m.nii").dataobj) == (ramp(shape=shape) > 3)).all()


@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (1, 4, 5, 6), (4, 5, 6, 1, 3)])
def test_time_and_packed_channels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=rf"a\.nii has the shape {'x'.join(map(str, shape))}: \d volumes in one file"):
        read_grid(nifti(tmp_path / "a.nii", ramp(shape=shape)))


# position


def test_sform_before_qform_before_assumption(tmp_path: Path) -> None:
    """A scanner's qform beside an aligned sform that swaps the sides: the sform counts."""
    path = tmp_path / "a.nii"
    mirrored = np.diag([-2.0, 2, 2, 1])
    for sform, qform, expected, laterality in ((2, 1, 2, "known"), (0, 1, -2, "known"), (0, 0, -2, "assumed")):
        image = nib.Nifti1Image(ramp(), np.diag([2.0, 2, 2, 1]))
        image.set_qform(mirrored, code=1)
        image.set_sform(np.diag([2.0, 2, 2, 1]), code=2)
        nib.save(image, path)
        raw = bytearray(path.read_bytes())
        raw[252:256] = np.array([qform, sform], "<i2").tobytes()
        path.write_bytes(raw)
        _, source = read_grid(path)
        assert source.affine[0, 0] == expected
        assert source.laterality == laterality
        assert bool(source.notes) == (sform == 2 or not qform)
        assert not sform or "sform and qform differ by up to 16.0 mm" in source.notes[0]
        volume = read_volume(path)
        assert volume.source is not None
        write_labels(volume.array > 0, volume.grid, volume.source, tmp_path / "m.nii")
        header, mask = nib.load(path).header, nib.load(tmp_path / "m.nii").header
        for name in ("sform_code", "qform_code", "pixdim", "quatern_b", "srow_x", "srow_y", "srow_z", "xyzt_units", "qoffset_x", "dim"):
            assert (header[name] == mask[name]).all(), name


def test_a_broken_qform_counts_only_without_an_sform(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", ramp(), qform=1)
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([3, 4, 5], "<f4").tobytes()
    raw[123] = 1
    path.write_bytes(raw)
    assert read_grid(path)[1].notes == ("the header says metres or micrometres; coordinates were read as millimetres",)
    raw[254:256] = b"\0\0"
    path.write_bytes(raw)
    with pytest.raises(GeometryError, match=r"a\.nii has a qform that is no rotation"):
        read_grid(path)


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [1e30, 0, 0, 0], [0, 1, 0, 0]])
def test_singular_and_infinite_affines_are_refused(tmp_path: Path, row: Any) -> None:
    path = nifti(tmp_path / "a.nii", ramp())
    raw = bytearray(path.read_bytes())
    raw[280:296] = np.array(row, "<f4").tobytes()
    path.write_bytes(raw)
    for read in (read_grid, read_volume, read_labels):
        with pytest.raises(GeometryError, match=r"a\.nii has an affine that is singular or not finite"):
            read(path)


def test_zero_sized_images_are_refused(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", ramp())
    raw = bytearray(path.read_bytes())
    raw[42:44] = b"\0\0"
    path.write_bytes(raw)
    with pytest.raises(ImageError, match=r"a\.nii holds no voxels: its header gives the shape \(0, 5, 6\)"):
        read_grid(path)


# damaged and foreign files


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd", "a.png", "a.jpg", "a.bmp", "a.tif", "a.seg.nrrd"])
@pytest.mark.parametrize("content", [b"", b"hello, this is no image at all" * 30, b"\x1f\x8b\x08\0garbage", b"NRRD0004\n", b"NDims = 3\n"])
def test_what_is_no_image_gets_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_volume, read_labels, read_grid):
        with pytest.raises(ImageError, match=name):
            read(path)


def test_what_does_not_exist_or_has_another_ending_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"There is no file .*nothing\.nii"):
        read_volume(tmp_path / "nothing.nii")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImageError, match=r"notes\.txt is no image that SeerSeg reads\. It reads \.nii\.gz"):
        read_volume(tmp_path / "notes.txt")
    with pytest.raises(ImageError, match="holds no readable DICOM file"):
        read_volume(tmp_path)


def test_a_checksum_that_disagrees_is_noticed(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", ramp())
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ImageError, match=r"a\.nii\.gz is damaged"):
        read_volume(path)


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = nifti(tmp_path / name, ramp())
        raw = bytearray(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
        raw[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)) if name.endswith("gz") else raw)
        with pytest.raises(ImageError, match="was cut short: its header promises 65536000000000 bytes"):
            read_volume(path)


# labels


def test_label_types_and_values(tmp_path: Path) -> None:
    for array, dtype in (
        (ramp(np.float64), np.uint8),
        (ramp(np.int32) + 200, np.uint16),
        (ramp(np.int16) - 1, np.int16),
        (ramp(np.int32) * 1000, np.int32),
    ):
        labels, grid = read_labels(nifti(tmp_path / "l.nii", array))
        assert labels.dtype == dtype
        assert grid.shape_zyx == labels.shape
        assert (labels == array.T).all()
    for array, value in ((ramp(np.float32) + 0.5, "0.5"), (np.full((2, 2, 2), np.nan, np.float32), "nan")):
        with pytest.raises(ImageError, match=rf"l\.nii is no label map: it holds the value {value}"):
            read_labels(nifti(tmp_path / "l.nii", array))
    with pytest.raises(ImageError, match="reach from 1e\\+12"):
        read_labels(nifti(tmp_path / "l.nii", np.full((2, 2, 2), 1e12)))


def test_masks_are_small_deterministic_and_carry_their_legend(tmp_path: Path) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii.gz", ramp()))
    assert volume.source is not None
    legend = {1: "left lung", 300: "Milz (größer)"}
    for name in ("m1.nii.gz", "m2.nii.gz"):
        write_labels(np.where(volume.array > 7, 300, 1), volume.grid, volume.source, tmp_path / name, legend=legend)
    assert (tmp_path / "m1.nii.gz").read_bytes() == (tmp_path / "m2.nii.gz").read_bytes()
    mask = nib.load(tmp_path / "m1.nii.gz")
    assert mask.get_data_dtype() == np.uint16
    assert (np.asanyarray(mask.dataobj) == np.where(ramp() > 7, 300, 1)).all()
    assert mask.header.extensions[0].get_code() == 6
    assert read_legend(tmp_path / "m1.nii.gz") == read_segmentation_names(tmp_path / "m1.nii.gz") == legend
    assert read_legend(tmp_path / "a.nii.gz") == {}
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "m1.nii.gz"))).max() == 300
    with pytest.raises(ValueError, match="whole numbers from 0"):
        write_labels(ramp(np.int16).T - 1, volume.grid, volume.source, tmp_path / "m3.nii.gz")


def test_free_text_of_the_scan_does_not_reach_the_mask(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(), np.eye(4))
    for name in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[name] = b"DOE^JANE"
    image.header["cal_max"] = 300
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.source is not None
    write_labels(volume.array > 7, volume.grid, volume.source, tmp_path / "m.nii")
    assert b"JANE" not in (tmp_path / "m.nii").read_bytes()
    assert nib.load(tmp_path / "m.nii").header["cal_max"] == 0


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii", ramp()))
    assert volume.source is not None
    with pytest.raises(OutputError, match=r"m\.nrrd: masks are written as NIfTI"):
        write_labels(volume.array > 7, volume.grid, volume.source, tmp_path / "m.nrrd")
    with pytest.raises(OutputError, match=r"Cannot write .*m\.nii"):
        write_labels(volume.array > 7, volume.grid, volume.source, tmp_path / "a.nii" / "m.nii")
    write_volume(volume, tmp_path / "same.nii", as_source=True)
    assert (read_volume(tmp_path / "same.nii").array == volume.array).all()


# NRRD and MetaImage


def nrrd(path: Path, array_zyx: NDArray[Any], *lines: str, data: bytes | None = None) -> Path:
    kinds = {"i2": "int16", "u1": "uint8", "f4": "float", "i4": "int"}
    sizes = " ".join(str(n) for n in array_zyx.shape[::-1])
    header = ["NRRD0004", f"type: {kinds[array_zyx.dtype.str[1:]]}", f"dimension: {array_zyx.ndim}", f"sizes: {sizes}", *lines]
    header += ["endian: little", "encoding: raw"]
    path.write_bytes("\n".join(header).encode() + b"\n\n" + (array_zyx.tobytes() if data is None else data))
    return path


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", (-1, -1, 1)), ("LPS", (-1, -1, 1)), ("right-anterior-superior", (1, 1, 1)), ("LAS", (-1, 1, 1))],
)
def test_sheared_nrrd_in_every_space(tmp_path: Path, space: str, signs: tuple[int, int, int]) -> None:
    path = nrrd(
        tmp_path / "a.nrrd",
        ramp(shape=(6, 5, 4)),
        f"space: {space}",
        "space directions: (0.9,0,0.1) (0.2,1.1,0) (0,0.3,3)",
        "space origin: (-20,5,40)",
    )
    volume = read_volume(path)
    assert volume.source is not None
    np.testing.assert_allclose(volume.source.affine, np.diag([*signs, 1]) @ SHEARED)
    assert volume.source.laterality == "known"
    voxel = volume.grid.to_voxel((np.diag([*signs, 1]) @ SHEARED @ [3, 1, 2, 1])[:3])
    assert volume.array[tuple(np.rint(voxel).astype(int))] == ramp(shape=(6, 5, 4))[2, 1, 3]
    write_labels(volume.array > 7, volume.grid, volume.source, tmp_path / "m.nii")
    mask = nib.load(tmp_path / "m.nii")
    np.testing.assert_allclose(mask.affine, volume.source.affine, rtol=1e-6)
    assert (mask.header["sform_code"], mask.header["qform_code"]) == (1, 0)
    assert (np.asanyarray(mask.dataobj) == (ramp(shape=(6, 5, 4)).T > 7)).all()


def test_orthogonal_sources_that_are_no_nifti_get_both_forms(tmp_path: Path) -> None:
    path = nrrd(
        tmp_path / "a.nrrd",
        ramp(shape=(6, 5, 4)),
        "space: LPS",
        "space directions: (0,2,0) (2,0,0) (0,0,-3)",
        "space origin: (1,2,3)",
    )
    volume = read_volume(path)
    assert volume.source is not None
    write_labels(volume.array > 7, volume.grid, volume.source, tmp_path / "m.nii.gz")
    header = nib.load(tmp_path / "m.nii.gz").header
    np.testing.assert_allclose(header.get_qform(), volume.source.affine, atol=1e-5)
    np.testing.assert_allclose(header.get_sform(), volume.source.affine, atol=1e-5)
    assert (header["sform_code"], header["qform_code"]) == (1, 1)
    again = sitk.ReadImage(str(tmp_path / "m.nii.gz"))
    original = sitk.ReadImage(str(path))
    np.testing.assert_allclose(again.GetDirection(), original.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(again.GetOrigin(), original.GetOrigin(), atol=1e-5)


def test_an_nrrd_without_orientation_is_read_with_a_note(tmp_path: Path) -> None:
    _, source = read_grid(nrrd(tmp_path / "a.nrrd", ramp(), "spacings: 1 2 3"))
    assert source.laterality == "assumed"
    assert "left and right are assumed" in source.notes[0]
    np.testing.assert_allclose(np.abs(np.diag(source.affine)), [1, 2, 3, 1])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "a.nii.gz"])
def test_what_simpleitk_writes_lies_where_simpleitk_says(tmp_path: Path, name: str, compress: bool) -> None:
    image = sitk.GetImageFromArray(ramp(np.float32) + 0.5)
    turned = np.array([[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]])
    image.SetDirection(turned.ravel().tolist())
    image.SetSpacing((0.7, 1.3, 5.0))
    image.SetOrigin((-3.25, 12.5, 100.125))
    sitk.WriteImage(image, str(tmp_path / name), compress)
    volume = read_volume(tmp_path / name)
    assert volume.source is not None
    assert volume.source.laterality == "known"
    for index in ((0, 0, 0), (3, 1, 2), (5, 4, 3)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        voxel = volume.grid.to_voxel(world)
        assert np.abs(voxel - np.rint(voxel)).max() < 1e-3
        assert volume.array[tuple(np.rint(voxel).astype(int))] == image[index]
    labels, _ = read_labels(_cast(image, tmp_path / name), volume.grid)
    assert (labels == np.floor(volume.array)).all()


def _cast(image: Any, path: Path) -> Path:
    sitk.WriteImage(sitk.Cast(image, sitk.sitkUInt8), str(path))
    return path


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_two_and_four_dimensions_through_simpleitk(tmp_path: Path, name: str) -> None:
    flat = sitk.GetImageFromArray(ramp(shape=(5, 4)))
    flat.SetSpacing((0.5, 2.0))
    sitk.WriteImage(flat, str(tmp_path / name))
    volume = read_volume(tmp_path / name)
    assert volume.array.shape == (1, 5, 4)
    assert sorted(volume.array.ravel()) == list(range(20))
    assert volume.grid.spacing_zyx == pytest.approx((1, 2, 0.5))
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(ramp())]), str(tmp_path / name))
    assert (read_volume(tmp_path / name).array == ramp()[:, ::-1, ::-1]).all()
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(ramp())] * 3), str(tmp_path / name))
    with pytest.raises(ImageError, match="3 volumes in one file"):
        read_volume(tmp_path / name)


def test_colour_is_not_channels(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        with pytest.raises(ImageError, match=rf"{name} holds 3 values per voxel"):
            read_volume(tmp_path / name)


def test_truncated_nrrd_and_metaimage(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16))
    for name in ("a.nrrd", "a.mha"):
        for compress in (False, True):
            sitk.WriteImage(image, str(tmp_path / name), compress)
            whole = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(whole[:-300])
            with pytest.raises(ImageError, match=rf"{name} (was cut short|is damaged)"):
                read_volume(tmp_path / name)


def test_damaged_text_headers(tmp_path: Path) -> None:
    for lines, word in (
        (["space: LPS", "space directions: (1,0,0) (0,1,0)"], "damaged NRRD header"),
        (["kinds: domain domain"], "3 sizes but kinds domain domain"),
        (["space: LPS", "space directions: (1,0,0) (2,0,0) (0,0,1)"], "singular or not finite"),
        (["space: LPS", "space directions: (1,0,0) (0,nan,0) (0,0,1)"], "singular or not finite"),
    ):
        with pytest.raises(ImageError, match=rf"a\.nrrd .*{word}"):
            read_grid(nrrd(tmp_path / "a.nrrd", ramp(), *lines))
    meta = "NDims = 3\nDimSize = 6 5 4\n{}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    for line, word in (
        ("ElementSpacing = 1 1", "2 numbers where 3 belong"),
        ("TransformMatrix = 1 0 0 0 1 0", "damaged MetaImage header"),
        ("TransformMatrix = 1 0 0 1 0 0 0 0 1", "singular or not finite"),
        ("NDims = 2", "NDims is 2, DimSize has 3"),
        ("ElementNumberOfChannels = 2", "holds 2 values per voxel"),
    ):
        (tmp_path / "a.mha").write_bytes(meta.format(line).encode() + ramp().tobytes())
        with pytest.raises(ImageError, match=rf"a\.mha .*{word}"):
            read_grid(tmp_path / "a.mha")
    (tmp_path / "a.mha").write_bytes(meta.format("Comment = x").encode() + ramp().tobytes())
    assert read_grid(tmp_path / "a.mha")[1].laterality == "assumed"
    (tmp_path / "a.mhd").write_text(meta.format("Comment = x").replace("LOCAL", "gone.raw"))
    lines = ["NRRD0004", "type: int16", "dimension: 3", "sizes: 6 5 4", "endian: little", "encoding: raw", "data file: gone.raw", "", ""]
    (tmp_path / "a.nhdr").write_text("\n".join(lines))
    for name in ("a.mhd", "a.nhdr"):
        with pytest.raises(ImageError, match=rf"{name} is damaged"):
            read_volume(tmp_path / name)


def test_slicer_segmentations(tmp_path: Path) -> None:
    """One layer over a part of the scan; two layers that share values; the layout of Slicer 4.10 without layers and values."""
    where = ("space: LPS", "space directions: (-1,0,0) (0,-1,0) (0,0,1)", "space origin: (0,0,0)")
    scan = read_grid(nrrd(tmp_path / "scan.nrrd", ramp(shape=(6, 5, 4)), *where))[0]
    part = np.zeros((2, 2, 2), np.uint8)
    part[0, 1, 1] = 4
    named = ("Segment0_Name:=left lung", "Segment0_LabelValue:=4", "Segment0_Layer:=0")
    path = nrrd(tmp_path / "part.seg.nrrd", part, *where[:2], "space origin: (-1,-2,3)", *named)
    labels, _ = read_labels(path, scan)
    assert np.argwhere(labels).tolist() == [[3, 3, 2]]
    assert labels[3, 3, 2] == 4
    assert read_segmentation_names(path) == {4: "left lung"}
    layers = np.zeros((6, 5, 4, 2), np.uint8)
    layers[1, 1, 1, 0] = layers[2, 2, 2, 1] = layers[1, 1, 1, 1] = 1
    four = ("space: LPS", "kinds: list domain domain domain", "space directions: none (-1,0,0) (0,-1,0) (0,0,1)", "space origin: (0,0,0)")
    new = [f"Segment{k}_{key}:={value}" for k in (0, 1) for key, value in (("Name", f"s{k}"), ("LabelValue", 1), ("Layer", k))]
    for lines in (new, ["Segment0_Name:=s0", "Segment1_Name:=s1"]):
        path = nrrd(tmp_path / "two.seg.nrrd", layers, *four, *lines)
        labels, _ = read_labels(path, scan)
        assert labels[1, 1, 1] == labels[2, 2, 2] == 2
        assert np.count_nonzero(labels) == 2
        assert read_segmentation_names(path) == {1: "s0", 2: "s1"}
        with pytest.raises(ImageError, match="2 values per voxel"):
            read_volume(path)
    beyond = nrrd(tmp_path / "far.seg.nrrd", layers, *four, "Segment0_Name:=s0", "Segment0_Layer:=7")
    with pytest.raises(ImageError, match="names segment 's0' in layer 7, which it does not hold"):
        read_labels(beyond)


def test_the_chest_of_slicerio(ct_chest: Path, tmp_path: Path) -> None:
    volume = read_volume(ct_chest / "CTChest4.nrrd")
    assert volume.array.dtype == np.int16
    assert volume.array.min() == -3024
    names = read_segmentation_names(ct_chest / "Segmentation.seg.nrrd")
    labels, grid = read_labels(ct_chest / "Segmentation.seg.nrrd", volume.grid)
    side = {name: Mask(labels == value, grid).centroid_mm for value, name in names.items()}
    assert side["right lung"] is not None
    assert side["left lung"] is not None
    assert side["right lung"][0] > 0 > side["left lung"][0]
    assert volume.source is not None
    write_labels(labels, grid, volume.source, tmp_path / "m.nii.gz", legend=names)
    again, _ = read_labels(tmp_path / "m.nii.gz", volume.grid)
    assert (again == labels).all()
    both, _ = read_labels(ct_chest / "SegmentationOverlapping.seg.nrrd", volume.grid)
    sphere = {v: k for k, v in read_segmentation_names(ct_chest / "SegmentationOverlapping.seg.nrrd").items()}["overlapping sphere"]
    assert np.count_nonzero(both == sphere) == 19139


def test_development_scans_lie_where_nibabel_says(development_data: Path, tmp_path: Path) -> None:
    scans = [development_data / "ct_torso/image.nii.gz", *sorted((development_data / "mr_hippocampus/imagesTr").iterdir())[::40]]
    for path in scans:
        volume = read_volume(path)
        reference = nib.as_closest_canonical(nib.load(path))
        np.testing.assert_allclose(volume.array, np.asarray(reference.dataobj).T, rtol=1e-6)
        np.testing.assert_allclose(volume.grid.affine, reference.affine)
        assert volume.source is not None
        write_labels(volume.array > 100, volume.grid, volume.source, tmp_path / "m.nii.gz")
        assert nib.load(tmp_path / "m.nii.gz").header.get_best_affine().tolist() == nib.load(path).header.get_best_affine().tolist()


# pictures


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif"])
def test_grey_pictures_keep_their_values(tmp_path: Path, name: str) -> None:
    grey = ramp(np.uint8, (5, 7))
    Image.fromarray(grey).save(tmp_path / name)
    volume = read_volume(tmp_path / name)
    assert volume.array.shape == (1, 5, 7)
    assert (volume.array[0] == grey[::-1, ::-1]).all()  # left of the picture is the patient's right, its top is anterior
    assert volume.source is not None
    assert (volume.source.format, volume.source.laterality, volume.source.ndim) == ("png", "assumed", 2)
    write_labels(volume.array > 9, volume.grid, volume.source, tmp_path / "m.nii.gz")
    assert (np.asanyarray(nib.load(tmp_path / "m.nii.gz").dataobj) == (grey.T > 9)).all()


def test_16_bit_colour_and_palette_pictures(tmp_path: Path) -> None:
    Image.fromarray(ramp(np.uint16, (5, 7)) * 900).save(tmp_path / "deep.png")
    assert read_volume(tmp_path / "deep.png").array.max() == 34 * 900
    colour = np.zeros((5, 7, 3), np.uint8)
    colour[..., 0] = 255
    Image.fromarray(colour).save(tmp_path / "red.jpg", quality=100)
    red = read_volume(tmp_path / "red.jpg")
    assert red.source is not None
    assert "colour was read as luminance" in red.source.notes
    assert abs(int(red.array[0, 0, 0]) - 76) <= 1
    with pytest.raises(ImageError, match=r"red\.jpg is a colour picture"):
        read_labels(tmp_path / "red.jpg")
    palette = Image.fromarray(ramp(np.uint8, (5, 7)) % 3).convert("P")
    palette.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "labels.png")
    assert np.unique(read_labels(tmp_path / "labels.png")[0]).tolist() == [0, 1, 2]
    page = Image.fromarray(ramp(np.uint8, (5, 7)))
    page.save(tmp_path / "two.tif", save_all=True, append_images=[page])
    with pytest.raises(ImageError, match=r"two\.tif holds 2 pages"):
        read_volume(tmp_path / "two.tif")


# cases


def test_channels_of_one_case(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1, 2, 1])
    first = nifti(tmp_path / "c_0000.nii.gz", ramp(), affine)
    flipped = affine @ np.array([[-1.0, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    second = nifti(tmp_path / "c_0001.nii.gz", np.ascontiguousarray(ramp()[::-1]), flipped)
    t1, t2 = read_case([first, second], modalities=["MR", "MR"], name="c")
    assert (t1.array == t2.array).all()
    assert (t1.channel, t2.channel, t2.modality, t2.name) == (0, 1, "MR", "c")
    moved = affine.copy()
    moved[:3, 3] = 0.5, 0, 0
    third = nifti(tmp_path / "c_0002.nii.gz", ramp(np.float32), moved)
    with pytest.raises(GeometryError, match=r"c_0002\.nii\.gz and .*c_0000\.nii\.gz .* up to 0\.5 mm apart.*--resample_channels"):
        read_case([first, third])
    _, shifted = read_case([first, third], resample_channels=True)
    assert shifted.grid.close_to(t1.grid)
    assert shifted.array[0, 0, 2] == (ramp()[1, 0, 0] + ramp()[2, 0, 0]) / 2
    cropped = nifti(tmp_path / "c_0003.nii.gz", ramp(shape=(2, 2, 2)), affine)
    with pytest.raises(GeometryError, match=r"\(2x2x2 and 6x5x4 voxels in z, y, x; their centres 4\.39 mm apart\)"):
        read_case([first, cropped])


def test_names() -> None:
    for name in ("a.nii.gz", "A.NII", "b.nrrd", "b.seg.nrrd", "c.mha", "c.mhd", "d.png", "d.JPG"):
        assert is_image(name)
    for name in ("a.txt", ".nii.gz", "a.gz", "nii.gz", "a.json", "a.dcm"):
        assert not is_image(name)
    assert image_stem("x/case_0000.nii.gz") == "case_0000"
    assert image_stem("x/seg.1.seg.nrrd") == "seg.1"
    assert image_stem("x/series") == "series"


def test_importing_volume_costs_numpy_only() -> None:
    code = "import sys, seerseg.volume; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"nibabel", "SimpleITK", "scipy", "PIL", "torch", "monai", "skimage"} & set(loaded)


def test_arrays_without_a_file(tmp_path: Path) -> None:
    grid = read_grid(nifti(tmp_path / "a.nii", ramp(), SHEARED))[0]
    write_labels(ramp().T > 5, grid, source_of(grid), tmp_path / "m.nii.gz")
    assert (read_labels(tmp_path / "m.nii.gz", grid)[0] == (ramp().T > 5)).all()
