"""A DICOM series in a folder. Headers and pixels by SimpleITK's GDCM; the position is checked slice by slice here.

Refused by name, as a volume made of them would lie: several series, gantry tilt, missing, uneven or doubled slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, ImageError
from seerseg.volume.grid import SourceGeometry
from seerseg.volume.stored import Stored, Voxels, check_stored

TILT_TOLERANCE_DEG = 0.2
GAP_TOLERANCE = 0.05
GAP_TOLERANCE_MM = 0.02
_MODALITIES = {"PT": "PET"}
_NO_IMAGES = tuple(b"1.2.840.10008.5.1.4.1.1." + kind for kind in (b"481.", b"88.", b"11.", b"104.", b"66"))
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    series: str
    description: str
    modality: str
    size: tuple[int, int]
    frames: int
    components: int
    pixel_id: int
    position: NDArray[np.float64] | None
    axes: NDArray[np.float64] | None
    spacing: tuple[float, float]
    thickness: float
    tilt: float


def is_dicom_file(path: Path) -> bool:
    """Whether the file carries the DICOM mark."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_folder(path: Path) -> bool:
    """Whether one of the folder's own files is DICOM (the mark is looked for in at most 64 of them)."""
    try:
        return path.is_dir() and any(is_dicom_file(p) for p in _files(path)[:64])
    except OSError:
        return False


def open_dicom(path: Path) -> Stored:
    """Read the headers of the one series in a folder, or of a single file (one slice)."""
    slices = _read_slices(path)
    slices, affine, notes, known = _place(path, slices)
    first = slices[0]
    shape_xyz = (first.size[0], first.size[1], len(slices))
    grid, orientation = check_stored(path, shape_xyz, affine)
    source = SourceGeometry(
        shape_xyz=shape_xyz,
        affine=affine,
        orientation=orientation,
        laterality="known" if known else "assumed",
        format="dicom",
        ndim=3,
        notes=notes,
    )
    return Stored(path, grid, source, lambda: _decode(path, slices, shape_xyz), _MODALITIES.get(first.modality, first.modality) or None)


def _holds_no_image(path: Path) -> bool:
    """Whether a DICOM file that GDCM cannot read is of a class without slices: contours, plans, reports, documents, raw data."""
    with path.open("rb") as file:
        block = file.read(1024)
    start = block.find(b"\x02\x00\x02\x00UI")
    return start >= 0 and block[start + 8 :].startswith(_NO_IMAGES)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name.upper() != "DICOMDIR")


def _read_slices(path: Path) -> list[_Slice]:
    try:
        files = _files(path) if path.is_dir() else [path]
    except OSError as error:
        raise ImageError(f"Cannot read the folder {path}: {error.strerror}.") from error
    slices = [s for s in (_read_slice(p) for p in files if is_dicom_file(p) or not p.suffix) if s is not None]
    if not slices:
        raise ImageError(f"{path} holds no readable DICOM file. Give the folder that holds the files of one series.")
    series: dict[str, list[_Slice]] = {}
    for one in slices:
        series.setdefault(one.series, []).append(one)
    if len(series) > 1:
        listed = "; ".join(f"{g[0].description or 'no description'} ({g[0].modality or '?'}, {len(g)} files)" for g in series.values())
        raise ImageError(f"{path} holds {len(series)} DICOM series: {listed}. Put each series into a folder of its own.")
    for one in slices:
        if one.components > 1:
            raise ImageError(f"{one.path} is a colour DICOM image. SeerSeg reads one number per voxel.")
        if one.frames > 1:
            raise ImageError(f"{one.path} is a DICOM file of {one.frames} frames. Convert it to NIfTI first, for example with dcm2niix.")
    return slices


def _read_slice(path: Path) -> _Slice | None:
    """The header of one file, None when GDCM cannot read it as an image."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        if is_dicom_file(path):
            if _holds_no_image(path):
                return None
            raise ImageError(f"{path} is a damaged DICOM file, or holds no image. Copy it again or take it out of the folder.") from None
        return None

    def text(tag: str) -> str:
        return str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> NDArray[np.float64] | None:
        try:
            values = np.array([float(n) for n in text(tag).split("\\")])
        except ValueError:
            return None
        return values if values.shape == (count,) and np.isfinite(values).all() else None

    size = reader.GetSize()
    spacing = numbers("0028|0030", 2)
    thickness, tilt = numbers("0018|0050", 1), numbers("0018|1120", 1)
    axes = numbers("0020|0037", 6)
    return _Slice(
        path=path,
        series=text("0020|000e"),
        description=text("0008|103e"),
        modality=text("0008|0060"),
        size=(int(size[0]), int(size[1])),
        frames=int(size[2]) if len(size) > 2 else 1,
        components=int(reader.GetNumberOfComponents()),
        pixel_id=int(reader.GetPixelIDValue()),
        position=numbers("0020|0032", 3),
        axes=axes.reshape(2, 3) if axes is not None else None,
        spacing=(float(spacing[0]), float(spacing[1])) if spacing is not None else (1.0, 1.0),
        thickness=float(thickness[0]) if thickness is not None and thickness[0] > 0 else 1.0,
        tilt=float(tilt[0]) if tilt is not None else 0.0,
    )


def _place(path: Path, slices: list[_Slice]) -> tuple[list[_Slice], NDArray[np.float64], tuple[str, ...], bool]:
    """(slices in order, stored affine in RAS, notes, whether the orientation is known)."""
    first = slices[0]
    odd = next((s for s in slices if s.size != first.size), None)
    if odd is not None:
        raise GeometryError(f"{path} mixes slices of {first.size} and {odd.size} pixels ({odd.path.name}). Take out the scouts.")
    if first.axes is None or first.position is None:
        if len(slices) > 1:
            raise GeometryError(f"{path}: {first.path.name} does not say where its slice lies. Export the series with image positions.")
        affine = np.diag([-first.spacing[1], -first.spacing[0], first.thickness, 1.0])
        return slices, affine, ("the DICOM file gives no orientation; left and right are assumed",), False
    right, down = first.axes
    normal = np.cross(right, down)
    if abs(float(np.linalg.norm(normal)) - 1) > 1e-2 or abs(float(right @ down)) > 1e-2:
        raise GeometryError(f"{path}: {first.path.name} has an image orientation that is not a pair of perpendicular directions.")
    normal /= np.linalg.norm(normal)
    for one in slices:
        if one.position is None or one.axes is None or np.abs(one.axes - first.axes).max() > 1e-3:
            raise GeometryError(f"{path}: {one.path.name} is oriented differently from {first.path.name}. Take out scouts and reformats.")
        if np.abs(np.array(one.spacing) - first.spacing).max() > 1e-3:
            raise GeometryError(f"{path}: {one.path.name} has pixels of another size than {first.path.name}.")
    order = sorted(slices, key=lambda s: float(s.position @ normal) if s.position is not None else 0.0)
    positions = np.array([s.position for s in order])
    step = _check_steps(path, order, positions, normal) if len(order) > 1 else normal * first.thickness
    affine = np.eye(4)
    affine[:3, :3] = np.stack([right * first.spacing[1], down * first.spacing[0], step], axis=1) * _LPS_TO_RAS[:, None]
    affine[:3, 3] = positions[0] * _LPS_TO_RAS
    notes: tuple[str, ...] = ()
    if abs(first.tilt) > TILT_TOLERANCE_DEG:
        notes = (f"the header names a gantry tilt of {first.tilt:g} degrees, but the slices lie straight above each other",)
    return order, affine, notes, True


def _check_steps(path: Path, order: list[_Slice], positions: NDArray[np.float64], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vector from slice to slice; GeometryError for tilt and for missing, uneven or doubled slices."""
    along = positions @ normal
    gaps = np.diff(along)
    typical = float(np.median(gaps))
    doubled = np.flatnonzero(gaps < max(1e-3, 1e-2 * typical))
    if doubled.size:
        k = int(doubled[0])
        raise GeometryError(
            f"{path}: {order[k].path.name} and {order[k + 1].path.name} lie at the same position ({doubled.size} such pairs), as in a "
            "series of several phases, echoes or doubled files. Keep one volume per folder."
        )
    bad = np.flatnonzero(np.abs(gaps - typical) > max(GAP_TOLERANCE_MM, GAP_TOLERANCE * typical))
    if bad.size:
        k = int(bad[0])
        missing = gaps[k] / typical
        what = "is missing slices" if abs(missing - round(missing)) < 0.1 and round(missing) > 1 else "has unevenly spaced slices"
        raise GeometryError(
            f"{path} {what}: {gaps[k]:.2f} mm between {order[k].path.name} and {order[k + 1].path.name}, {typical:.2f} mm elsewhere. "
            "Complete the series, or resample it to even slices first."
        )
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(order) - 1)
    sideways = step - (step @ normal) * normal
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(sideways), step @ normal)))
    if tilt > TILT_TOLERANCE_DEG:
        raise GeometryError(f"{path} was scanned with a gantry tilt of {tilt:.1f} degrees. Correct it first, for example with dcm2niix.")
    off = np.linalg.norm(positions - (positions[0] + np.arange(len(order))[:, None] * step), axis=1)
    if off.max() > max(0.1, 0.25 * typical):
        far = order[int(off.argmax())].path.name
        raise GeometryError(f"{path} has slices that do not lie on one line: {far} is {off.max():.1f} mm off. Resample the series first.")
    return step


def _decode(path: Path, slices: list[_Slice], shape_xyz: tuple[int, int, int]) -> Voxels:
    import SimpleITK as sitk

    kinds = {s.pixel_id for s in slices}
    if kinds <= {sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkInt16}:
        kind = sitk.sitkInt16
    elif kinds <= {sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkInt16, sitk.sitkUInt16, sitk.sitkInt32}:
        kind = sitk.sitkInt32
    else:
        kind = sitk.sitkFloat32
    out = np.empty(shape_xyz[::-1], dtype={sitk.sitkInt16: np.int16, sitk.sitkInt32: np.int32, sitk.sitkFloat32: np.float32}[kind])
    for z, one in enumerate(slices):
        try:
            image = sitk.ReadImage(str(one.path), kind, imageIO="GDCMImageIO")
        except RuntimeError as error:
            raise ImageError(f"{one.path} is damaged or was cut short, or its compression is not supported. Copy it again.") from error
        plane = sitk.GetArrayViewFromImage(image)
        out[z] = plane.reshape(plane.shape[-2:])
    return Voxels(out.T)
