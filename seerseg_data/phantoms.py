"""Procedural phantoms: scans with labels that need no download, for training the nano segmenter and for tests.

A phantom is drawn from implicit shapes in millimetres (x to the patient's right, y to the front, z up, as in NIfTI RAS+), bent by a smooth
random displacement, and sampled on the voxel grid asked for. The same (kind, seed, spacing, shape) gives the same arrays on any machine
with the same numpy and scipy. Left and right are never mirror images: the liver and the gallbladder lie on the right, the heart's apex, the
spleen and the stomach on the left, the right kidney lower than the left one. Nothing here is a measurement of a patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seerseg_data.phantom_body import ALL_LABELS, LABELS, Body, Bool
from seerseg_data.phantom_head import HeadMR, draw_head
from seerseg_data.phantom_torso import Torso

__all__ = ["ALL_LABELS", "KINDS", "LABELS", "Phantom", "phantom"]

KINDS: Final = ("chest", "abdomen", "pelvis", "torso", "head", "head_mr", "torso_lesions")
"""What can be asked for: CT of a field of view; MR of a head with tumours; CT of chest and abdomen with lesions. New ones come last:
the place is part of the seed."""

_QUICK: Final = ("head_mr", "torso_lesions")
_FIELD_MM: Final[dict[str, tuple[tuple[float, float], ...]]] = {  # (z, y, x) ranges in mm
    "chest": ((-40.0, 300.0), (-140.0, 130.0), (-200.0, 200.0)),
    "abdomen": ((-230.0, 90.0), (-140.0, 130.0), (-185.0, 185.0)),
    "pelvis": ((-340.0, -110.0), (-150.0, 130.0), (-200.0, 200.0)),
    "torso": ((-320.0, 300.0), (-140.0, 130.0), (-200.0, 200.0)),
    "head": ((-110.0, 100.0), (-115.0, 115.0), (-95.0, 95.0)),
    "head_mr": ((-90.0, 100.0), (-110.0, 110.0), (-90.0, 90.0)),
    "torso_lesions": ((-130.0, 270.0), (-125.0, 115.0), (-175.0, 175.0)),
}


@dataclass(frozen=True)
class Phantom:
    """One drawn scan.

    array_zyx: int16 (Z, Y, X), Hounsfield units (MR: the scanner's own).
    labels_zyx: uint8 (Z, Y, X), values of ``ALL_LABELS``. names: value -> canonical name of the
    structures that have voxels here. affine: float64 (4, 4), voxel (x, y, z) -> mm RAS+.
    """

    kind: str
    array_zyx: NDArray[np.int16]
    labels_zyx: NDArray[np.uint8]
    names: dict[int, str]
    affine: NDArray[np.float64]

    def mask(self, *names: str) -> Bool:
        """Boolean (Z, Y, X): the union of the named structures. KeyError for a name that is not in ``ALL_LABELS``."""
        return np.isin(self.labels_zyx, [ALL_LABELS[name] for name in names])


def phantom(
    kind: str = "torso",
    seed: int = 0,
    *,
    spacing_zyx_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    shape_zyx: tuple[int, int, int] | None = None,
    tilt_degrees: float = 0.0,
) -> Phantom:
    """Draw one phantom.

    kind: one of ``KINDS``. seed: chooses body size, organ sizes and places, bending and noise. shape_zyx: voxels; None covers the kind's
    whole field; a smaller shape cuts the field about its centre. tilt_degrees: the voxel grid is turned about its centre by this
    angle, about an axis chosen by the seed; the body stays where it is but for its bending by some mm. Of the last two kinds
    a seed gives the same body, lesions within a voxel or two, at any spacing.

    ValueError for an unknown kind or a spacing that is not positive.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown phantom kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if min(spacing_zyx_mm) <= 0:
        raise ValueError(f"Spacing must be positive millimetres, got {spacing_zyx_mm}.")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    field = _FIELD_MM[kind]
    spacing = np.asarray(spacing_zyx_mm, dtype=np.float64)
    if shape_zyx is None:
        z, y, x = (max(1, round((high - low) / step)) for (low, high), step in zip(field, spacing, strict=True))
        shape_zyx = (z, y, x)
    centre = np.array([(low + high) / 2 for low, high in field]) + rng.uniform(-8, 8, 3)
    origin = centre - (np.asarray(shape_zyx) - 1) / 2 * spacing
    turn = _rotation(seed, tilt_degrees)
    axes = [origin[i] + np.arange(shape_zyx[i]) * spacing[i] for i in range(3)]
    body = Body(rng, axes, rotation_zyx=turn if tilt_degrees else None, quick=kind in _QUICK)
    noise = np.random.default_rng([seed, KINDS.index(kind), 1])
    if kind == "head":
        draw_head(body, rng)
    elif kind == "head_mr":
        HeadMR(body, rng, noise).draw()
    else:
        torso = Torso(body, rng, noise=noise if kind in _QUICK else None, distract=kind != "torso_lesions")
        torso.draw()
        if kind == "torso_lesions":
            torso.draw_lesions()
    affine = np.eye(4)
    affine[[0, 1, 2], [0, 1, 2]] = spacing[::-1]
    affine[:3, 3] = origin[::-1]
    if tilt_degrees:
        middle = origin[::-1] + (np.asarray(shape_zyx)[::-1] - 1) / 2 * spacing[::-1]
        affine[:3, :3] = turn[::-1, ::-1] * spacing[::-1]
        affine[:3, 3] = middle - affine[:3, :3] @ ((np.asarray(shape_zyx)[::-1] - 1) / 2)
    array = body.finish_mr(rng) if kind == "head_mr" else body.finish(rng)
    present = set(np.unique(body.labels).tolist())
    return Phantom(kind, array, body.labels, {v: n for n, v in ALL_LABELS.items() if v in present}, affine)


def _rotation(seed: int, degrees: float) -> NDArray[np.float64]:
    """(3, 3) for (z, y, x) vectors: a turn by this angle about an axis chosen by the seed, which no other number depends on."""
    axis = np.random.default_rng([seed, 977]).normal(0, 1, 3)
    z, y, x = axis / np.linalg.norm(axis)
    cross = np.array([[0.0, -x, y], [x, 0.0, -z], [-y, z, 0.0]])
    angle = np.deg2rad(degrees)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
