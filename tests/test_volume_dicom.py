"""DICOM series: read where they say they lie, and refused by name when a volume made of them would lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

from seerseg.errors import GeometryError, ImageError
from seerseg.volume import image_stem, is_image, read_grid, read_volume, write_labels

STORAGE = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
UPRIGHT = np.eye(3)


def write_slice(
    path: Path,
    pixels: NDArray[Any],
    position: Any,
    *,
    axes: Any = UPRIGHT,
    modality: str = "CT",
    series: str = "1.2.3",
    description: str = "",
    slope: float = 1,
    inter: float = 0,
    spacing: Any = (0.8, 0.6),
    **tags: Any,
) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = STORAGE[modality]
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.SeriesDescription = modality, series, description
    data.StudyInstanceUID, data.PatientName = "1.2", "Doe^Jane"
    data.Rows, data.Columns = pixels.shape[:2]
    colour = pixels.ndim == 3
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        data.PlanarConfiguration = 0
    bits = pixels.dtype.itemsize * 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if position is not None:
        data.ImagePositionPatient = [f"{v:.6f}" for v in position]
        data.ImageOrientationPatient = [f"{v:.8f}" for v in (*axes[:, 0], *axes[:, 1])]
    data.PixelSpacing, data.SliceThickness = list(spacing), 2.0
    data.RescaleSlope, data.RescaleIntercept = slope, inter
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


def write_series(
    folder: Path, voxels: NDArray[Any], *, axes: Any = UPRIGHT, positions: Any = None, names: str = "IM{:04d}", **more: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for z, plane in enumerate(voxels):
        at = np.array([10.0, -20, 30]) + axes[:, 2] * 2.5 * z if positions is None else positions[z]
        write_slice(folder / names.format((z * 7) % 101), plane, at, axes=axes, **more)
    return folder


def noise(shape: Any = (6, 5, 4), dtype: Any = np.int16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 2000, shape).astype(dtype)


@pytest.mark.parametrize("series", ["1.2.3", ""])
@pytest.mark.parametrize("angles", [(0, 0, 0), (12, -7, 20), (0, 90, 90), (0, 0, 180), (90, 0, 0)])
def test_a_series_lies_where_its_headers_say(tmp_path: Path, angles: Any, series: str) -> None:
    """Names without extension, shuffled, series id perhaps empty; text files beside it."""
    axes = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    folder = write_series(tmp_path / "scan", noise(), axes=axes, series=series, inter=-1024)
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "readme.txt").write_text("hello")
    assert is_image(folder)
    assert image_stem(folder) == "scan"
    volume = read_volume(folder)
    assert (volume.modality, volume.array.dtype, volume.name) == ("CT", np.int16, "scan")
    for z, y, x in ((0, 0, 0), (5, 4, 3), (2, 3, 1)):
        lps = np.array([10.0, -20, 30]) + axes @ [x * 0.6, y * 0.8, z * 2.5]
        voxel = volume.grid.to_voxel(lps * (-1, -1, 1))
        assert np.abs(voxel - np.rint(voxel)).max() < 1e-3
        assert volume.array[tuple(np.rint(voxel).astype(int))] == noise()[z, y, x] - 1024
    assert volume.source is not None
    write_labels(volume.array > 0, volume.grid, volume.source, tmp_path / "m.nii.gz")
    mask = nib.load(tmp_path / "m.nii.gz")
    assert mask.shape == (4, 5, 6)
    assert (np.asanyarray(mask.dataobj).T == (noise() > 1024)).all()
    assert b"Jane" not in (tmp_path / "m.nii.gz").read_bytes()


def test_it_agrees_with_simpleitk(tmp_path: Path) -> None:
    axes = Rotation.from_euler("xyz", (12, -7, 20), degrees=True).as_matrix()
    folder = write_series(tmp_path / "scan", noise(), axes=axes, modality="MR")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    _, source = read_grid(folder)
    np.testing.assert_allclose(source.affine[:3, 3] * (-1, -1, 1), image.GetOrigin(), atol=1e-4)
    columns = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    np.testing.assert_allclose(source.affine[:3, :3] * np.array([[-1], [-1], [1]]), columns, atol=1e-4)


def test_every_slice_has_its_own_rescaling(tmp_path: Path) -> None:
    """PET: the first slice's slope may be a whole number, the others' not."""
    for z, slope in enumerate((1, 0.25, 0.5)):
        write_slice(tmp_path / f"{z}.dcm", noise()[z], (0, 0, z), modality="PT", slope=slope)
    volume = read_volume(tmp_path)
    assert (volume.modality, volume.array.dtype) == ("PET", np.float32)
    expected = noise()[:3] * np.array([1, 0.25, 0.5])[:, None, None]
    np.testing.assert_allclose(volume.array, expected[:, ::-1, ::-1])


def test_unsigned_scans_and_single_files(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "one", noise(dtype=np.uint16)[:1] + np.uint16(40000), names="slice{}.dcm")
    volume = read_volume(folder)
    assert volume.array.shape == (1, 5, 4)
    assert volume.array.max() > 40000
    assert volume.grid.spacing_zyx == pytest.approx((2.0, 0.8, 0.6))
    assert (read_volume(folder / "slice0.dcm").array == volume.array).all()


def test_two_series_are_listed(tmp_path: Path) -> None:
    write_series(tmp_path, noise(), series="1.1", description="thorax 5mm", names="a{}")
    write_series(tmp_path, noise()[:4], series="1.2", description="abdomen", modality="MR", names="b{}")
    with pytest.raises(ImageError, match=r"holds 2 DICOM series: thorax 5mm \(CT, 6 files\); abdomen \(MR, 4 files\)\. Put each"):
        read_volume(tmp_path)


def test_gantry_tilt_is_refused_by_name(tmp_path: Path) -> None:
    axes = Rotation.from_euler("x", -15, degrees=True).as_matrix()
    write_series(tmp_path, noise(), axes=axes, positions=[(0, 0, 3 * z) for z in range(6)], GantryDetectorTilt=15)
    with pytest.raises(GeometryError, match=r"gantry tilt of 15\.0 degrees\. Correct it first"):
        read_volume(tmp_path)


def test_a_tilt_that_only_the_header_names_is_noted(tmp_path: Path) -> None:
    _, source = read_grid(write_series(tmp_path, noise(), GantryDetectorTilt=15))
    assert "gantry tilt of 15 degrees, but" in source.notes[0]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([0, 2, 4, 8, 10, 12], r"is missing slices: 4\.00 mm between IM0014 and IM0021, 2\.00 mm elsewhere"),
        ([0, 2, 4, 6.7, 8, 10], r"has unevenly spaced slices: 2\.70 mm between IM0014 and IM0021"),
        ([0, 2, 4, 4, 6, 8], r"IM0014 and IM0021 lie at the same position \(1 such pairs\)"),
    ],
)
def test_missing_uneven_and_doubled_slices_are_refused_by_name(tmp_path: Path, at: list[float], message: str) -> None:
    write_series(tmp_path, noise(), positions=[(0, 0, z) for z in at])
    for read in (read_grid, read_volume):
        with pytest.raises(GeometryError, match=message):
            read(tmp_path)


def test_slices_that_leave_the_line_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, noise(), positions=[(3 * (z == 2), 0, 2 * z) for z in range(6)])
    with pytest.raises(GeometryError, match=r"do not lie on one line: IM0014 is 3\.0 mm off"):
        read_volume(tmp_path)


def test_scouts_colour_frames_and_lost_positions_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scout", noise())
    write_slice(folder / "scout.dcm", noise()[0], (0, 0, 0), axes=Rotation.from_euler("x", 90, degrees=True).as_matrix())
    with pytest.raises(GeometryError, match=r"scout\.dcm is oriented differently from"):
        read_volume(folder)
    folder = write_series(tmp_path / "size", noise())
    write_slice(folder / "other.dcm", noise((7, 8)), (0, 0, 0))
    with pytest.raises(GeometryError, match=r"mixes slices of \(4, 5\) and \(8, 7\) pixels \(other\.dcm\)"):
        read_volume(folder)
    write_slice(tmp_path / "colour.dcm", np.zeros((5, 4, 3), np.uint8), (0, 0, 0))
    with pytest.raises(ImageError, match=r"colour\.dcm is a colour DICOM image"):
        read_volume(tmp_path / "colour.dcm")
    write_slice(tmp_path / "frames.dcm", noise((5, 4)), (0, 0, 0), NumberOfFrames=3, PixelData=noise((3, 5, 4)).tobytes())
    with pytest.raises(ImageError, match=r"frames\.dcm is a DICOM file of 3 frames\. Convert it"):
        read_volume(tmp_path / "frames.dcm")
    folder = write_series(tmp_path / "lost", noise()[:2], positions=[None, None])
    with pytest.raises(GeometryError, match="does not say where its slice lies"):
        read_volume(folder)
    write_slice(tmp_path / "alone.dcm", noise((5, 4)), None)
    assert read_grid(tmp_path / "alone.dcm")[1].laterality == "assumed"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_series(tmp_path, noise((3, 40, 40)))
    path = folder / "IM0007"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ImageError, match="IM0007"):
        read_volume(folder)
    path.write_bytes(whole[:300])
    with pytest.raises(ImageError, match="IM0007"):
        read_volume(folder)
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(2000))
    path.write_bytes(whole)
    assert read_volume(folder).array.shape == (3, 40, 40)


def test_contours_and_reports_beside_the_slices_are_passed_over(tmp_path: Path) -> None:
    folder = write_series(tmp_path, noise())
    for name, uid in (("rtstruct.dcm", "1.2.840.10008.5.1.4.1.1.481.3"), ("report", "1.2.840.10008.5.1.4.1.1.88.11")):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(str(folder / name), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID, data.Modality = uid, generate_uid(), "9.9", "RTSTRUCT"
        data.save_as(folder / name, enforce_file_format=True)
    assert read_volume(folder).array.shape == noise().shape


def test_compressed_series(tmp_path: Path) -> None:
    voxels = noise((3, 64, 64))
    folder = write_series(tmp_path, voxels)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(pydicom.uid.RLELossless)
        data.save_as(path)
    assert (read_volume(folder).array == voxels[:, ::-1, ::-1]).all()
