"""Placing one file of a converted case: linked where it already is what is wanted, else written with its geometry."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, ImageError, OutputError
from seerseg.paths import write_atomically
from seerseg.volume import Grid, Volume, read_grid, read_labels, read_volume, source_of, write_labels, write_volume
from seerseg.volume.orientation import lattice_map


def put_image(image: Path | Volume | bytes, path: Path) -> Grid:
    """Place one channel: a .nii.gz of three dimensions is linked (copied across file systems), anything else written anew with its
    geometry. Every voxel is decoded once, so a damaged file is found here. Returns the grid that the new file is read back on."""
    if isinstance(image, bytes):
        _write_picture_bytes(image, path)
        return read_volume(path).grid
    volume = read_volume(image) if isinstance(image, Path) else image
    picture = volume.source is not None and volume.source.format == "png"
    if isinstance(image, Path) and path.name.endswith(image.suffix if picture else ".nii.gz") and (picture or _plain_nifti(image, volume)):
        _link(image, path)
    elif path.name.endswith(".nii.gz"):
        write_volume(volume, path, as_source=True)
    else:
        write_picture(volume.array[0], path)
    grid = read_grid(path)[0]
    if not grid.close_to(volume.grid):
        raise OutputError(f"{path} does not lie where {volume.name or 'its source'} lay. Please report this.")
    return grid


def _plain_nifti(path: Path, volume: Volume) -> bool:
    return path.name.endswith(".nii.gz") and volume.source is not None and volume.source.format == "nifti" and volume.source.ndim == 3


def put_label(label: Path | NDArray[Any], image: Path | Volume | bytes, grid: Grid, path: Path) -> list[str]:
    """Place a label map on the grid of its image; a file that already is that is linked."""
    source = read_grid(image)[1] if isinstance(image, Path) else image.source if isinstance(image, Volume) else None
    notes: list[str] = []
    if isinstance(label, Path):
        array, moved = label_on(label, grid)
        notes += [moved] if moved else []
        stored = read_grid(label)
        same = stored[0].close_to(grid) and source is not None and np.allclose(stored[1].affine, source.affine, atol=1e-3)
        if same and label.name.endswith(".nii.gz") and path.name.endswith(".nii.gz") and stored[1].ndim == 3:
            _link(label, path)
            return notes
    else:
        array = label
        if tuple(array.shape) != grid.shape_zyx:
            raise GeometryError(f"The label of {path.name} has {array.shape} voxels, its image {grid.shape_zyx} (z, y, x).")
    if path.name.endswith(".nii.gz"):
        write_labels(array, grid, source if source is not None else source_of(grid), path)
    else:
        write_picture(array[0], path)
    return notes


def label_on(path: Path, grid: Grid) -> tuple[NDArray[Any], str]:
    """A label file on the image's grid, exactly; one of the same shape within half a voxel takes the image's place, with a note."""
    own, _ = read_grid(path)
    if own.shape_zyx == grid.shape_zyx and not own.close_to(grid):
        distance = own.corner_distance_mm(grid)
        if distance <= 0.5 * min(grid.spacing_zyx):
            return read_labels(path)[0], f"the label's corners lay {distance:.3g} mm off the image's; it was given the image's place"
    array, on = read_labels(path)
    if on.close_to(grid):
        return array, ""
    lattice = lattice_map(on, grid)
    if lattice is None or not lattice.covers(on.shape_zyx, grid.shape_zyx):
        far = on.corner_distance_mm(grid)
        apart = f"{far:.3g} mm apart" if np.isfinite(far) else f"{on.shape_zyx} against {grid.shape_zyx} voxels"
        raise GeometryError(f"{path} lies on another grid than its image ({apart}). Resample it, or mend the header of one of them.")
    return np.ascontiguousarray(lattice.place(array, grid.shape_zyx)), ""


def write_picture(array_yx: NDArray[Any], path: Path) -> None:
    """A 2D array (Y, X) of 0 to 255 in canonical order as a grey PNG in display order (left of the picture = patient's right)."""
    from PIL import Image

    if array_yx.min() < 0 or array_yx.max() > 255:
        raise ImageError(f"Cannot write {path}: its values reach from {array_yx.min()} to {array_yx.max()}, a picture holds 0 to 255.")
    shown = np.ascontiguousarray(array_yx[::-1, ::-1].astype(np.uint8))
    write_atomically(path, lambda temporary: Image.fromarray(shown).save(temporary, format="PNG"))


def _write_picture_bytes(data: bytes, path: Path) -> None:
    """A picture file's bytes as a PNG of the same pixels; ImageError when they are no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            colour = "RGB" if image.mode in ("P", "CMYK", "YCbCr") else "L"
            shown = image if image.mode in ("L", "RGB", "RGBA", "I;16") else image.convert(colour)
            write_atomically(path, lambda temporary: shown.save(temporary, format="PNG"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(f"The picture for {path.name} cannot be read ({error}). Get the source again.") from error


def _link(source: Path, path: Path) -> None:
    """A hard link to the source, or a copy where links cannot be; atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        os.link(source.resolve(), temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            remedy = "Free space or choose another folder, then run the command again."
            raise OutputError(f"Cannot write {path}: {error.strerror}. {remedy}") from error

        def copy(temporary: Path) -> None:
            shutil.copyfile(source, temporary)

        write_atomically(path, copy)
        return
    path.unlink(missing_ok=True)  # rename does nothing when both names already are one file
    temporary.replace(path)
