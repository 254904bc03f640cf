"""Miniature copies of published datasets: their names, nesting, orientation and label values, a few voxels each."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

SHAPE_XYZ = (24, 20, 16)
SPACING_XYZ_MM = (2.0, 2.5, 3.0)


def affine() -> NDArray[np.float64]:
    """RAS, centred: x from -23 to 23 mm."""
    out = np.diag([*SPACING_XYZ_MM, 1.0])
    out[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(SHAPE_XYZ, SPACING_XYZ_MM, strict=True)]
    return out


def scan(seed: int = 0) -> NDArray[np.int16]:
    """(x, y, z) RAS: air, a body, and a bright corner at the right, the front and the top."""
    array = np.random.default_rng(seed).integers(-30, 60, SHAPE_XYZ).astype(np.int16)
    array[:3] = -1000
    array[-4:, -4:, -4:] = 900
    return array


def blob(x: slice, y: slice = slice(6, 14), z: slice = slice(4, 12), value: int = 1) -> NDArray[np.uint8]:
    array = np.zeros(SHAPE_XYZ, dtype=np.uint8)
    array[x, y, z] = value
    return array


RIGHT, LEFT = slice(15, 21), slice(4, 10)


def nifti(array_xyz: NDArray[np.generic], path: Path, codes: str = "RAS", *, moved_mm: float = 0.0) -> Path:
    """A RAS array stored with other axes ("IPL": first axis runs down, as KiTS stores it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = affine()
    place[:3, 3] += moved_mm
    image = nib.Nifti1Image(array_xyz, place)
    turn = ornt_transform(io_orientation(place), axcodes2ornt(tuple(codes)))
    nib.save(image.as_reoriented(turn), path)
    return path


def mha(array_xyz: NDArray[np.generic], path: Path) -> Path:
    """An .mha on the same place: ITK's axes are LPS."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_xyz[::-1, ::-1].T))
    image.SetSpacing(SPACING_XYZ_MM)
    place = affine()
    high = place[:3, 3] + (np.array(SHAPE_XYZ) - 1) * SPACING_XYZ_MM
    image.SetOrigin((-high[0], -high[1], place[2, 3]))
    sitk.WriteImage(image, str(path), True)
    return path


def centre_mm(path: Path, *values: int) -> NDArray[np.float64]:
    """World centroid of these values (of everything above 0 without any) in a label file, by nibabel alone."""
    image = nib.load(path)
    data = np.asanyarray(image.dataobj)
    mask = np.isin(data, values) if values else data > 0
    return np.asarray(nib.affines.apply_affine(image.affine, np.argwhere(mask).mean(axis=0)))
