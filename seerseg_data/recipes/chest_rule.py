"""Lungs, airways, spine and ribs of a chest CT by classical rules: labels for scans that come without them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Bool = NDArray[np.bool_]

RIGHT_LUNG, LEFT_LUNG, AIRWAYS, SPINE, RIBS = 1, 2, 3, 4, 5
_BONE_HU = 170
_RIB_REACH_MM = 13


def chest_rule(hu: NDArray[Any], spacing_mm: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Labels of a chest CT in Hounsfield units, both (Z, Y, X) RAS+: the five values above, else 0.

    Lungs: -1000..-400 HU not joined to the border of the axial slices, airways (dark blobs near the midline) taken
    out, each axial part given to the side of its centre. Bone: over 170 HU; the spine lies behind and between the
    lungs, ribs within 13 mm of a lung's hull.
    """
    air = _air(hu)
    lungs = _large_parts(air, share=0.05)
    middle = float(np.argwhere(lungs)[:, 2].mean())
    airways = _airways(hu, air, middle, spacing_mm)
    lungs &= ~airways
    right = _right_of(lungs, middle, spacing_mm)
    lungs = ndimage.binary_closing(np.pad(lungs, 6), ndimage.generate_binary_structure(3, 1), iterations=max(1, round(5 / spacing_mm[1])))[
        6:-6, 6:-6, 6:-6
    ]
    lungs &= ~airways
    out = np.zeros(hu.shape, dtype=np.uint8)
    out[lungs & right] = RIGHT_LUNG
    out[lungs & ~right] = LEFT_LUNG
    out[airways] = AIRWAYS
    ribs, spine = _bones(hu, lungs, middle, spacing_mm)
    out[ribs] = RIBS
    out[spine & (out != RIGHT_LUNG) & (out != LEFT_LUNG)] = SPINE
    return out


def _air(hu: NDArray[Any]) -> Bool:
    """Under -400 HU and, in its axial slice, not joined to the border."""
    dark = hu < -400
    outside = np.zeros_like(dark)
    for k in range(len(hu)):
        parts, _ = ndimage.label(dark[k])
        rim = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
        outside[k] = np.isin(parts, rim[rim > 0])
    return dark & ~outside


def _large_parts(mask: Bool, *, share: float) -> Bool:
    """The connected parts of more than this share of the largest one's voxels."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.isin(parts, np.flatnonzero(sizes > share * sizes.max()))


def _airways(hu: NDArray[Any], air: Bool, middle: float, spacing_mm: NDArray[np.float64]) -> Bool:
    """The darkest blobs near the midline, 60 to 500 mm2 in their slice, grown by a voxel."""
    seed = np.zeros_like(air)
    for k in range(len(hu)):
        blobs, count = ndimage.label((hu[k] < -900) & air[k])
        for blob in range(1, count + 1):
            where = np.argwhere(blobs == blob)
            area = len(where) * spacing_mm[1] * spacing_mm[2]
            if 60 < area < 500 and abs(where[:, 1].mean() - middle) * spacing_mm[2] < 20:
                seed[k][blobs == blob] = True
    grown: Bool = ndimage.binary_dilation(seed, iterations=1) & ndimage.binary_dilation(seed, np.ones((1, 3, 3)))
    return grown & (hu < -400)


def _right_of(lungs: Bool, middle: float, spacing_mm: NDArray[np.float64]) -> Bool:
    """Every voxel's side, by the nearest axial part; a part that lies well on both sides is cut at the midline."""
    right = np.zeros_like(lungs)
    for k in range(len(lungs)):
        blobs, count = ndimage.label(ndimage.binary_opening(lungs[k]))
        for blob in range(1, count + 1):
            beyond = float((np.nonzero(blobs == blob)[1] > middle).mean())
            right[k] |= (blobs == blob) & (np.arange(lungs.shape[2])[None, :] > middle if 0.15 < beyond < 0.85 else beyond > 0.5)
    open_lungs = np.stack([ndimage.binary_opening(plane) for plane in lungs])
    nearest = ndimage.distance_transform_edt(~open_lungs, sampling=spacing_mm, return_distances=False, return_indices=True)
    of_nearest: Bool = right[tuple(nearest)]
    return of_nearest


def _bones(hu: NDArray[Any], lungs: Bool, middle: float, spacing_mm: NDArray[np.float64]) -> tuple[Bool, Bool]:
    """(ribs, spine): ribs lie outside the lungs' hull and beside the spine; the spine may still reach into a lung."""
    bone = ndimage.gaussian_filter(hu, [0, 0.6, 0.6]) > _BONE_HU
    bone = ndimage.binary_closing(bone, np.ones((1, 3, 3)))
    y_back = np.array([np.argwhere(lungs[k])[:, 0].min() if lungs[k].any() else -1 for k in range(len(hu))], dtype=float)
    known = np.flatnonzero(y_back >= 0)
    y_back = ndimage.gaussian_filter1d(np.interp(np.arange(len(hu)), known, y_back[known]), 3)
    centre = np.array([_bone_middle(bone[k], y_back[k], middle, spacing_mm) for k in range(len(hu))])
    centre = ndimage.median_filter(centre, 7, mode="nearest")
    near_x = np.abs(np.arange(hu.shape[2])[None, None, :] - centre[:, None, None]) * spacing_mm[2]
    depth = (np.arange(hu.shape[1])[None, :, None] - y_back[:, None, None]) * spacing_mm[1]
    spine_zone = (near_x < 30) & (depth < 52) & (depth > -45)
    spine = ndimage.binary_opening(bone & spine_zone, np.ones((1, 2, 2)))
    spine = ndimage.binary_fill_holes(ndimage.binary_closing(spine, np.ones((1, 5, 5)))) if spine.any() else spine
    hull = np.zeros_like(lungs)
    for k in range(len(hu)):
        if lungs[k].any():
            hull[k] = ndimage.binary_closing(np.pad(lungs[k], 40), iterations=20)[40:-40, 40:-40]
    distance = ndimage.distance_transform_edt(~hull, sampling=spacing_mm)
    front = (depth > 110) & (near_x < 32)
    ribs = bone & (distance < _RIB_REACH_MM) & (distance > 0) & ~spine_zone & ~front
    parts, _ = ndimage.label(ribs)
    sizes_mm3 = np.bincount(parts.ravel()) * float(np.prod(spacing_mm))
    sizes_mm3[0] = 0
    return np.isin(parts, np.flatnonzero(sizes_mm3 > 250)), spine


def _bone_middle(bone: Bool, back: float, middle: float, spacing_mm: NDArray[np.float64]) -> float:
    """The x where bone is thickest from behind, near the middle."""
    low, high = int(max(0, back - 45 / spacing_mm[1])), int(min(bone.shape[0], back + 50 / spacing_mm[1]))
    left, right = int(max(0, middle - 35 / spacing_mm[2])), int(min(bone.shape[1], middle + 35 / spacing_mm[2]))
    profile = bone[low:high, left:right].sum(0).astype(float)
    return left + float((profile * np.arange(len(profile))).sum() / profile.sum()) if profile.sum() > 5 else middle
