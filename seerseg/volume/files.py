"""Reading and writing scans and label maps, whatever file they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, ImageError
from seerseg.volume.dicom import is_dicom_file, is_dicom_folder, open_dicom
from seerseg.volume.grid import Grid, SourceGeometry, Volume
from seerseg.volume.itk import open_metaimage, open_nrrd, open_picture, segmentation_names
from seerseg.volume.nifti import open_channels, open_nifti, read_legend, write_nifti
from seerseg.volume.orientation import canonical_grid, check_overlap, lattice_map, source_of
from seerseg.volume.resampling import resample
from seerseg.volume.stored import Stored, canonical_integers, canonical_intensities

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGE_ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd", *PICTURE_ENDINGS)


def _ending(path: Path) -> str | None:
    return next((e for e in IMAGE_ENDINGS if path.name.lower().endswith(e) and len(path.name) > len(e)), None)


def is_image(path: str | Path) -> bool:
    """Whether the name ends as an image's does (nothing is opened), or a folder holds DICOM files of its own (they are looked at)."""
    path = Path(path)
    return _ending(path) is not None or is_dicom_folder(path)


def image_stem(path: str | Path) -> str:
    """The name without its image ending: "a/case_0000.nii.gz" -> "case_0000"; a folder's or other file's name as it is."""
    path = path if isinstance(path, Path) else Path(path)  # making a path costs more than all the rest, and there are many
    ending = _ending(path)
    return path.name[: -len(ending)] if ending else path.name


def open_stored(path: str | Path, *, labels: bool = False) -> Stored:
    """Read the header of any supported image; ImageError or GeometryError with a sentence when that is impossible."""
    path = Path(path)
    ending = _ending(path)
    try:
        if path.is_dir() or (ending is None and is_dicom_file(path)):
            return open_dicom(path)
        if not path.is_file():
            raise ImageError(f"There is no file {path}.")
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror}.") from error
    if ending in (".nii", ".nii.gz"):
        return open_nifti(path)
    if ending in (".nrrd", ".nhdr", ".seg.nrrd"):
        return open_nrrd(path, labels=labels)
    if ending in (".mha", ".mhd"):
        return open_metaimage(path)
    if ending is not None:
        return open_picture(path, labels=labels)
    raise ImageError(f"{path} is no image that SeerSeg reads. It reads {', '.join(IMAGE_ENDINGS)} and folders of DICOM files.")


def read_volume(path: str | Path, *, channel: int = 0, modality: str | None = None, name: str = "") -> Volume:
    """Read one channel of a scan as a canonical volume, int16 where lossless, else float32.

    modality: as given, else what the file says (DICOM), else None. What was decided on the way is in `source.notes`.
    """
    stored = open_stored(path)
    array, notes = canonical_intensities(stored)
    source = replace(stored.source, notes=(*stored.source.notes, *notes))
    return Volume(array, stored.grid, modality or stored.modality, channel, source, name or image_stem(path))


def read_channels(path: str | Path, *, modality: str | None = None) -> list[Volume]:
    """Every channel of a 4D NIfTI file as a volume of its own; one volume for any other image. Faults as `read_volume`."""
    path = Path(path)
    if _ending(path) not in (".nii", ".nii.gz") or not path.is_file():
        return [read_volume(path, modality=modality)]
    volumes = []
    for channel, stored in enumerate(open_channels(path)):
        array, notes = canonical_intensities(stored)
        source = replace(stored.source, notes=(*stored.source.notes, *notes))
        volumes.append(Volume(array, stored.grid, modality, channel, source, image_stem(path)))
    return volumes


def read_grid(path: str | Path) -> tuple[Grid, SourceGeometry]:
    """The canonical grid and the source geometry, from the header only."""
    stored = open_stored(path)
    return stored.grid, stored.source


def read_case(
    paths: Sequence[Path], *, modalities: Sequence[str | None] | None = None, resample_channels: bool = False, name: str = ""
) -> list[Volume]:
    """One volume per channel, all on the first channel's grid.

    A channel stored in other orientation but on the same voxels is flipped exactly. One on another grid is a
    GeometryError naming both files and the distance in mm, unless `resample_channels` (linear, 0 outside).
    """
    volumes: list[Volume] = []
    for channel, path in enumerate(paths):
        volume = read_volume(path, channel=channel, modality=modalities[channel] if modalities else None, name=name)
        volumes.append(_onto(volume, volumes[0], path, paths[0], resample_channels) if volumes else volume)
    return volumes


def _onto(volume: Volume, first: Volume, path: Path, first_path: Path, allowed: bool) -> Volume:
    """A further channel on the first channel's grid."""
    array, source = volume.array, volume.source
    if not volume.grid.close_to(first.grid):
        lattice = lattice_map(volume.grid, first.grid)
        if lattice is not None and lattice.covers(volume.grid.shape_zyx, first.grid.shape_zyx):
            array = np.ascontiguousarray(lattice.place(volume.array, first.grid.shape_zyx))
        elif not allowed:
            raise GeometryError(
                f"{path} and {first_path} are channels of one case but lie on different grids ({_difference(volume.grid, first.grid)}). "
                "Resample them to one grid, or use --resample_channels to resample to the first channel."
            )
        else:
            check_overlap(volume.grid, first.grid, str(path))
            array = resample(volume.array, volume.grid, first.grid, order=1)
            if source is not None and first.source is not None:
                source = replace(first.source, notes=(*source.notes, "resampled to the grid of channel 0"))
    return Volume(array, first.grid, volume.modality, volume.channel, source, volume.name)


def _difference(grid: Grid, other: Grid) -> str:
    distance = grid.corner_distance_mm(other)
    if np.isfinite(distance):
        return f"their corners are up to {distance:.3g} mm apart"
    shapes = " and ".join("x".join(map(str, g.shape_zyx)) for g in (grid, other))
    return f"{shapes} voxels in z, y, x; their centres {np.linalg.norm(grid.corners_mm.mean(0) - other.corners_mm.mean(0)):.3g} mm apart"


def read_labels(path: str | Path, like: Grid | None = None) -> tuple[NDArray[Any], Grid]:
    """Read a label map as canonical integers (Z, Y, X): the smallest of uint8, uint16, int16 and int32.

    With `like` the labels come on that grid: exactly where both are parts of one lattice (flipped, permuted, cropped),
    else the nearest neighbour in world position. GeometryError when the fields of view do not overlap.
    """
    stored = open_stored(path, labels=True)
    if like is not None:
        check_overlap(stored.grid, like, str(path))
    array = canonical_integers(stored)
    if like is None or stored.grid.close_to(like, 1e-6):
        return array, like or stored.grid
    lattice = lattice_map(stored.grid, like)
    if lattice is not None:
        return np.ascontiguousarray(lattice.place(array, like.shape_zyx)), like
    return resample(array, stored.grid, like, order=0), like


def read_segmentation_names(path: str | Path) -> dict[int, str]:
    """Label value -> name, where the file says so: 3D Slicer's segmentations, and masks that SeerSeg wrote; else {}.

    The values are those of `read_labels`, which numbers segments anew, in order, when layers share a value.
    """
    path = Path(path)
    ending = _ending(path)
    if ending in (".nii", ".nii.gz"):
        return read_legend(path)
    return segmentation_names(path) if ending in (".nrrd", ".nhdr", ".seg.nrrd") else {}


def write_labels(
    array_zyx: NDArray[Any], grid: Grid, source: SourceGeometry, path: str | Path, *, legend: dict[int, str] | None = None
) -> None:
    """Write a canonical mask or label map as NIfTI in its source's own orientation, affine and header geometry.

    The type is the smallest unsigned one. GeometryError when `grid` is not the source's canonical grid; OutputError when
    the file cannot be written. The legend, value -> name, is kept in a header extension (see `read_legend`).
    """
    path = Path(path)
    _check_source(grid, source, path)
    if array_zyx.dtype == np.bool_:
        array = array_zyx.view(np.uint8) if array_zyx.flags.c_contiguous else array_zyx.astype(np.uint8)
    else:
        high = int(array_zyx.max())
        if array_zyx.dtype.kind not in "iu" or int(array_zyx.min()) < 0 or high >= 1 << 32:
            raise ValueError(f"labels must be whole numbers from 0, not {array_zyx.dtype} reaching {array_zyx.min()}")
        array = array_zyx.astype(np.min_scalar_type(high), copy=False)
    write_nifti(array, source, path, label=True, legend=legend)


def write_volume(volume: Volume, path: str | Path, *, as_source: bool = False) -> None:
    """Write a volume as NIfTI: canonical, or with `as_source` in the orientation and header geometry of its source."""
    path = Path(path)
    source = volume.source if as_source and volume.source is not None else source_of(volume.grid)
    _check_source(volume.grid, source, path)
    array = volume.array.astype(np.uint8) if volume.array.dtype == np.bool_ else volume.array
    write_nifti(array, source, path, label=False)


def _check_source(grid: Grid, source: SourceGeometry, path: Path) -> None:
    expected = canonical_grid(source.shape_xyz, source.affine, source.orientation)
    if not grid.close_to(expected):
        raise GeometryError(
            f"Cannot write {path}: the mask lies on a grid of {grid.shape_zyx} voxels, {grid.corner_distance_mm(expected):.3g} mm "
            f"from that of its scan ({expected.shape_zyx}). Resample it first."
        )
