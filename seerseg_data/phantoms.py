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
from scipy import ndimage

__all__ = ["KINDS", "LABELS", "Phantom", "phantom"]

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]

KINDS: Final = ("chest", "abdomen", "pelvis", "torso", "head")
"""Fields of view that can be asked for."""

_FIELD_MM: Final[dict[str, tuple[tuple[float, float], ...]]] = {  # (z, y, x) ranges in mm
    "chest": ((-40.0, 300.0), (-140.0, 130.0), (-200.0, 200.0)),
    "abdomen": ((-230.0, 90.0), (-140.0, 130.0), (-185.0, 185.0)),
    "pelvis": ((-340.0, -110.0), (-150.0, 130.0), (-200.0, 200.0)),
    "torso": ((-320.0, 300.0), (-140.0, 130.0), (-200.0, 200.0)),
    "head": ((-110.0, 100.0), (-115.0, 115.0), (-95.0, 95.0)),
}

_NAMES: Final = (
    "ribs",
    "cervical vertebral column",
    "thoracic vertebral column",
    "lumbar vertebral column",
    "sacrum",
    "sternum",
    "right lung",
    "left lung",
    "trachea",
    "heart",
    "aorta",
    "inferior vena cava",
    "liver",
    "spleen",
    "stomach",
    "gallbladder",
    "pancreas",
    "right kidney",
    "left kidney",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "colon",
    "small bowel",
    "urinary bladder",
    "right hip bone",
    "left hip bone",
    "right femur",
    "left femur",
    "right gluteus maximus",
    "left gluteus maximus",
    "right iliopsoas",
    "left iliopsoas",
    "right autochthonous back muscle",
    "left autochthonous back muscle",
    "right scapula",
    "left scapula",
    "right clavicle",
    "left clavicle",
    "spinal cord",
    "oesophagus",
    "intervertebral discs",
    "skull",
    "right cerebral hemisphere",
    "left cerebral hemisphere",
    "cerebellum",
    "brainstem",
    "right lateral ventricle",
    "left lateral ventricle",
    "right eyeball",
    "left eyeball",
    "right thalamus",
    "left thalamus",
    "mandible",
    "prostate",
)
LABELS: Final[dict[str, int]] = {name: value for value, name in enumerate(_NAMES, start=1)}
"""Canonical name -> value in ``Phantom.labels_zyx``; the same for every kind. 0 is everything else."""


@dataclass(frozen=True)
class Phantom:
    """One drawn scan.

    array_zyx: int16 (Z, Y, X), Hounsfield units. labels_zyx: uint8 (Z, Y, X), values of ``LABELS``. names: value -> canonical name of the
    structures that have voxels here. affine: float64 (4, 4), voxel (x, y, z) -> mm RAS+.
    """

    kind: str
    array_zyx: NDArray[np.int16]
    labels_zyx: NDArray[np.uint8]
    names: dict[int, str]
    affine: NDArray[np.float64]

    def mask(self, *names: str) -> Bool:
        """Boolean (Z, Y, X): the union of the named structures. KeyError for a name that is not in ``LABELS``."""
        return np.isin(self.labels_zyx, [LABELS[name] for name in names])


def phantom(
    kind: str = "torso",
    seed: int = 0,
    *,
    spacing_zyx_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    shape_zyx: tuple[int, int, int] | None = None,
) -> Phantom:
    """Draw one phantom.

    kind: one of ``KINDS``. seed: chooses body size, organ sizes and places, bending and noise. shape_zyx: voxels; None covers the kind's
    whole field; a smaller shape cuts the field about its centre. ValueError for an unknown kind or a spacing that is not positive.
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
    body = _Body(rng, [origin[i] + np.arange(shape_zyx[i]) * spacing[i] for i in range(3)])
    (_draw_head if kind == "head" else _draw_torso)(body, rng)
    affine = np.eye(4)
    affine[[0, 1, 2], [0, 1, 2]] = spacing[::-1]
    affine[:3, 3] = origin[::-1]
    return Phantom(kind, body.finish(rng), body.labels, {v: n for n, v in LABELS.items() if (body.labels == v).any()}, affine)


class _Body:
    """Coordinates (mm, warped) of every voxel, and the two arrays being painted. All arrays (Z, Y, X)."""

    def __init__(self, rng: np.random.Generator, axes_zyx_mm: list[NDArray[np.float64]]) -> None:
        shape = tuple(len(axis) for axis in axes_zyx_mm)
        grids = np.meshgrid(*axes_zyx_mm, indexing="ij")
        size = rng.uniform(0.88, 1.12) * rng.uniform(0.94, 1.06, 3)
        warped = []
        for i in range(3):
            knots = rng.normal(0, 1, (6, 6, 6))
            at = np.meshgrid(*[np.linspace(1, 4, n) for n in shape], indexing="ij", sparse=False)
            bend = ndimage.map_coordinates(knots, at, order=3, output=np.float32)
            warped.append((grids[i] / size[i] + 5.0 * bend).astype(np.float32))
        self.z, self.y, self.x = warped
        self.hu: Float = np.full(shape, -1000.0, dtype=np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(shape, dtype=np.uint8)

    def paint(self, where: Bool, hu: float, name: str | None = None) -> None:
        """Overwrite intensity where the mask holds; label it too, or clear the label when no name is given."""
        self.hu[where] = hu
        self.labels[where] = LABELS[name] if name else 0

    def ellipsoid(
        self, centre_xyz: tuple[float, float, float], radii_xyz: tuple[float, float, float], tilt: float = 0.0, power: float = 2.0
    ) -> Bool:
        """Super-ellipsoid |x/a|^p + ... <= 1 about centre, turned by `tilt` radians in the x-z plane."""
        dx, dy, dz = self.x - centre_xyz[0], self.y - centre_xyz[1], self.z - centre_xyz[2]
        if tilt:
            dx, dz = np.cos(tilt) * dx - np.sin(tilt) * dz, np.sin(tilt) * dx + np.cos(tilt) * dz
        radius = np.abs(dx / radii_xyz[0]) ** power + np.abs(dy / radii_xyz[1]) ** power + np.abs(dz / radii_xyz[2]) ** power
        return np.asarray(radius <= 1)

    def tube(self, points_xyz: list[tuple[float, float, float]], radius: float | tuple[float, float]) -> Bool:
        """Voxels nearer than `radius` mm (start, end) to the polyline through the points."""
        first, last = (radius, radius) if isinstance(radius, (int, float)) else radius
        inside = np.zeros(self.x.shape, dtype=bool)
        knots = np.asarray(points_xyz, dtype=np.float32)
        low, high = knots.min(0) - max(first, last), knots.max(0) + max(first, last)
        near = (
            (self.x >= low[0]) & (self.x <= high[0]) & (self.y >= low[1]) & (self.y <= high[1]) & (self.z >= low[2]) & (self.z <= high[2])
        )
        if not near.any():
            return inside
        voxels = np.stack([self.x[near], self.y[near], self.z[near]], axis=1)
        hit = np.zeros(len(voxels), dtype=bool)
        for i in range(len(knots) - 1):
            step = knots[i + 1] - knots[i]
            along = np.clip((voxels - knots[i]) @ step / float(step @ step), 0, 1)
            distance2 = ((voxels - knots[i] - along[:, None] * step) ** 2).sum(1)
            fraction = (i + along) / (len(knots) - 1)
            hit |= distance2 <= (first + (last - first) * fraction) ** 2
        inside[near] = hit
        return inside

    def finish(self, rng: np.random.Generator) -> NDArray[np.int16]:
        """Partial volume (slight blur), texture and noise; int16 Hounsfield units (Z, Y, X)."""
        hu = ndimage.gaussian_filter(self.hu, 0.4)
        coarse = ndimage.zoom(rng.normal(0, 1, [max(2, n // 4) for n in hu.shape]).astype(np.float32), 4, order=1)
        padded = [(0, max(0, n - m)) for n, m in zip(hu.shape, coarse.shape, strict=True)]
        coarse = np.pad(coarse, padded, mode="edge")[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
        tissue = hu > -300
        hu = hu + tissue * 6.0 * coarse + rng.normal(0, rng.uniform(4, 18), hu.shape).astype(np.float32)
        drawn: NDArray[np.int16] = np.clip(np.round(hu), -1024, 3071).astype(np.int16)
        return drawn


def _draw_torso(body: _Body, rng: np.random.Generator) -> None:
    def some(value: float, spread: float = 0.12) -> float:
        return float(value * rng.uniform(1 - spread, 1 + spread))

    def near(x: float, y: float, z: float, by: float = 6.0) -> tuple[float, float, float]:
        return (x + float(rng.uniform(-by, by)), y + float(rng.uniform(-by, by)), z + float(rng.uniform(-by, by)))

    x, y, z = body.x, body.y, body.z
    contrast = float(rng.choice([0.0, 60.0, 120.0]))  # enhancement of blood, HU
    fat_mm = float(rng.uniform(6, 28))
    # Outer wall: half axes in mm as functions of height; hips and shoulders are wider than the waist.
    half_x = 150 + 16 * np.tanh((z - 60) / 60) + 18 * np.exp(-(((z + 240) / 70) ** 2)) + 25 * np.exp(-(((z - 280) / 45) ** 2)) + fat_mm
    half_y = 98 + 8 * np.tanh((z - 40) / 60) + 12 * np.exp(-(((z + 220) / 70) ** 2)) - 22 * np.exp(-(((z - 300) / 45) ** 2)) + fat_mm
    wall = np.abs(x / half_x) ** 2.4 + np.abs(y / half_y) ** 2.4
    skin = wall <= 1
    body.paint(skin, some(-100, 0.1))
    muscle = (np.abs(x / (half_x - fat_mm)) ** 2.4 + np.abs(y / (half_y - fat_mm)) ** 2.4) <= 1
    body.paint(muscle, some(50))
    if rng.random() < 0.4:
        for side in (-1.0, 1.0):
            body.paint(body.tube([(side * 195, -10, 320), (side * 215, 0, -60)], 38), some(45))
    if rng.random() < 0.5:  # table
        body.paint((y < -half_y.max() - 8) & (y > -half_y.max() - 20) & (np.abs(x) < 180), 80)

    # Cage: an ellipse that closes towards the apex; z_fall undoes the ribs' descent towards the front. theta = 0 at the back.
    cage_x, cage_y, cage_at = some(128, 0.06), some(88, 0.06), -2.0
    apex_z = some(262, 0.04)
    theta = np.arctan2(np.abs(x) / cage_x, -(y - cage_at) / cage_y)
    fall = some(62, 0.2) * (1 - np.cos(theta)) / 2 + 22 * np.sin(theta)
    z_fall = z + fall
    close = np.sqrt(np.clip(1 - (np.clip(z_fall - 90, 0, None) / (apex_z + 40 - 90)) ** 2.6, 0.02, 1))
    radius = np.sqrt((x / (cage_x * close)) ** 2 + ((y - cage_at) / (cage_y * close)) ** 2)
    spine_y = -58 + 12 * np.sin((z + 60) / 95) - 10 * np.exp(-(((z + 240) / 60) ** 2))

    # Lungs between the domes of the diaphragm and the cage.
    dome_r, dome_l = some(62, 0.3), some(52, 0.3)
    dome = np.where(
        x > 0,
        dome_r - 0.010 * (x - 68) ** 2 - 0.011 * (y - 5) ** 2,
        dome_l - 0.010 * (x + 68) ** 2 - 0.011 * (y - 5) ** 2,
    )
    inner = radius <= some(0.89, 0.03)
    medial = 16 + 16 * np.exp(-(((z - 90) / 120) ** 2)) * np.clip((y + 70) / 60, 0, 1.2)
    chest = inner & (z > dome) & (z_fall < apex_z + 38)
    lung_hu = float(rng.uniform(-880, -740))
    lung_r, lung_l = chest & (x > medial), chest & (x < -medial)
    body.paint(inner & (z <= dome) & (z > -90), some(-95))  # abdominal fat under the domes
    abdomen = (z <= np.minimum(dome, 40)) & (
        (np.abs(x / (half_x - fat_mm - 22)) ** 2.4 + np.abs((y - 4) / (half_y - fat_mm - 16)) ** 2.4) <= 1
    )
    body.paint(abdomen, some(-95))
    body.paint(inner & (z > dome) & (z_fall < apex_z + 38), some(-20, 0.8))  # mediastinum: fat and vessels
    body.paint(lung_r, lung_hu, "right lung")
    body.paint(lung_l, lung_hu, "left lung")
    speck = ndimage.gaussian_filter(rng.normal(0, 1, x.shape).astype(np.float32), 0.7)
    vessels = (lung_r | lung_l) & (speck > 1.0) & (np.abs(x) < 110)
    body.hu[vessels] = -350  # vessels stay part of the lung
    if rng.random() < 0.35:  # effusion, dependent opacity: soft tissue that belongs to no lung
        side = rng.choice([-1.0, 1.0])
        body.paint((lung_r if side > 0 else lung_l) & (y < -45) & (z < dome + 40), 15)
    if rng.random() < 0.35:  # nodule inside a lung, still lung
        at = near(float(rng.choice([-75, 75])), 0, 110, 25)
        body.hu[body.ellipsoid(at, (some(11), some(11), some(11))) & (lung_r | lung_l)] = 30

    # Heart and great vessels. The apex points to the left (x < 0).
    heart_c = near(-18, 28, 62)
    body.paint(body.ellipsoid(heart_c, (some(56), some(42), some(46)), tilt=-0.5), 40 + 0.8 * contrast, "heart")
    blood = 42 + contrast * some(1.0, 0.3)
    aorta = [(-18.0, -22.0, 180.0), (-22.0, -40.0, 150.0), (-20.0, -38.0, 60.0), (-10.0, -32.0, 0.0), (-6.0, -28.0, -120.0)]
    body.paint(body.tube([(8, 20, 110), (14, 22, 150), (4, 8, 182), (-14, -12, 188), (-20, -32, 168)], some(14)), blood, "aorta")
    body.paint(body.tube(aorta, (some(13), some(9))), blood, "aorta")
    body.paint(body.tube([(18, 2, 60), (18, -18, 10), (16, -24, -130)], some(11)), blood - 0.3 * contrast, "inferior vena cava")
    body.paint(body.tube([(20, 5, 60), (18, 14, 150), (20, 10, 220)], some(9)), blood)
    trachea = body.tube([(0, -2, 330), (2, -8, 180)], some(9.5, 0.08))
    for side in (1.0, -1.0):
        trachea |= body.tube([(2, -8, 182), (side * 34, -12, 150)], (8.0, 6.0))
    body.paint(trachea & skin, -990, "trachea")
    body.paint(body.tube([(-3, -22, 330), (-4, -24, 100), (-14, -10, 45)], 7), 35, "oesophagus")

    # Upper abdomen.
    below = (z <= dome - 2) & skin
    big = body.ellipsoid(near(68, 6, 8), (some(62), some(70), some(78)), power=2.3)
    lobe = body.ellipsoid(near(-8, 34, 26), (some(70), some(36), some(34)), tilt=-0.25)
    body.paint((big | lobe) & below & (radius < 0.93), 55 + 0.45 * contrast, "liver")
    body.paint(
        body.ellipsoid(near(-92, -34, 2), (some(24), some(38), some(48)), tilt=0.3) & below & (radius < 0.93),
        48 + 0.55 * contrast,
        "spleen",
    )
    stomach = body.ellipsoid(near(-58, 26, 2), (some(34), some(34), some(46)), tilt=0.5) & below & (body.labels != LABELS["spleen"])
    body.paint(stomach, float(rng.uniform(5, 60)), "stomach")
    body.hu[stomach & (y > some(42, 0.3))] = -900
    if rng.random() < 0.85:
        body.paint(body.ellipsoid(near(46, 44, -48, 4), (some(15), some(17), some(27)), tilt=0.4), some(8, 0.8), "gallbladder")
    body.paint(body.tube([(30, 8, -52), (6, 18, -34), (-36, 4, -20), (-66, -22, -6)], (some(13), some(9))), 42 + 0.4 * contrast, "pancreas")
    body.paint(body.tube([(34, 24, -38), (44, 10, -56), (40, 4, -96), (2, 2, -104)], some(12)), some(25, 0.6), "duodenum")
    for side, name, drop in ((1.0, "right kidney", -62.0), (-1.0, "left kidney", -44.0)):
        at = near(side * 62, -44, drop)
        kidney = body.ellipsoid(at, (some(29), some(25), some(54)), tilt=-0.25 * side)
        body.paint(kidney, 32 + contrast, name)
        sinus = body.ellipsoid((at[0] - side * 14, at[1] + 4, at[2]), (12, 9, 20))
        body.paint(sinus, float(rng.choice([-60.0, 10.0])))
        gland = "right adrenal gland" if side > 0 else "left adrenal gland"
        body.paint(
            body.tube([(at[0] - side * 20, at[1] + 16, at[2] + 56), (at[0] - side * 32, at[1] + 24, at[2] + 44)], 5),
            35 + 0.3 * contrast,
            gland,
        )

    # Bowel: coils in the middle, the colon as a frame.
    coils = ndimage.gaussian_filter(rng.normal(0, 1, x.shape).astype(np.float32), [max(0.8, 9.0 / s) for s in _steps(body)])
    middle = body.ellipsoid((0, 34, -135), (80, 50, 70)) & (body.labels == 0) & abdomen
    body.paint(middle & (np.abs(coils) < coils.std() * 0.9), some(30, 0.5), "small bowel")
    frame = [
        (96, 0, -200),
        (104, 4, -100),
        (88, 24, -62),
        (20, 62, -92),
        (-60, 52, -60),
        (-100, -8, -40),
        (-102, -6, -150),
        (-84, 10, -205),
        (-20, -10, -225),
        (0, -40, -255),
    ]
    colon = body.tube([near(*p, by=7.0) for p in frame], some(21)) & (abdomen | muscle)
    free = colon & np.isin(body.labels, [0, LABELS["small bowel"]])
    body.paint(free, some(25, 0.7), "colon")
    body.hu[free & (coils > 0.3 * coils.std())] = -850

    # Pelvis.
    full = rng.uniform(0.6, 1.2)
    body.paint(body.ellipsoid(near(0, 42, -262), (some(44) * full, some(36) * full, some(34) * full)), some(6, 0.8), "urinary bladder")
    if rng.random() < 0.5:
        body.paint(body.ellipsoid(near(0, 24, -305, 3), (some(24), some(19), some(20))), 45, "prostate")
    for side, word in ((1.0, "right"), (-1.0, "left")):
        psoas = body.tube(
            [(side * 34, -44, -50), (side * 46, -30, -140), (side * 72, 10, -230), (side * 88, -2, -320)], (some(15), some(24))
        )
        body.paint(psoas & muscle, 55, f"{word} iliopsoas")
        back = body.tube(
            [(side * 34, -86, 150), (side * 36, -84, 40), (side * 38, -88, -150), (side * 26, -96, -215)], (some(21), some(27))
        )
        body.paint(back & muscle & (radius > 0.7), 48, f"{word} autochthonous back muscle")
        gluteus = body.ellipsoid(near(side * 78, -84, -268, 4), (some(62), some(34), some(66))) & muscle
        body.paint(gluteus, 52, f"{word} gluteus maximus")
        bowl = np.sqrt(((x - side * 30) / 92) ** 2 + ((y + 6) / 92) ** 2 + ((z + 190) / 118) ** 2)
        wing = (np.abs(bowl - 1) < 0.085) & (side * x > 34) & (z < -150) & (z > -262) & (y < 62) & (y > -80)
        socket = body.ellipsoid((side * 88, 2, -268), (34, 34, 34)) | body.tube([(side * 74, 26, -280), (side * 12, 56, -298)], 10)
        socket |= body.tube([(side * 78, -34, -280), (side * 58, -46, -318)], 12)
        body.paint((wing | socket) & muscle, 330, f"{word} hip bone")
        body.paint(body.ellipsoid((side * 92, 2, -272), (26, 26, 26)), 40)
        femur = body.ellipsoid((side * 92, 2, -272), (23, 23, 23)) | body.tube([(side * 92, 2, -272), (side * 136, -6, -310)], 16)
        femur |= body.tube([(side * 136, -6, -296), (side * 126, 0, -400)], 18)
        body.paint(femur, 380, f"{word} femur")

    # Skeleton of the trunk.
    pitch = some(23.5, 0.05)
    index = np.round((apex_z - 2 - z_fall) / pitch)
    along_z = (apex_z - 2 - z_fall) - index * pitch
    reach = np.where(index <= 6, 2.55, np.where(index <= 9, 2.55 - 0.25 * (index - 6), 1.25 - 0.3 * (index - 10)))
    thick = some(5.2, 0.15)
    off = (radius - 0.955) * 0.5 * (cage_x + cage_y) * close
    rib = ((off / thick) ** 2 + (along_z / (thick * 1.25)) ** 2 <= 1) & (index >= 0) & (index <= 11) & (theta < reach) & (theta > 0.22)
    body.paint(rib & skin, some(330, 0.25), "ribs")
    body.hu[rib & ((off / thick) ** 2 + (along_z / (thick * 1.25)) ** 2 < 0.25)] = some(160, 0.3)
    breast = (np.abs(x) < 17) & (np.abs(y - (cage_at + cage_y * 0.96 - 0.10 * np.clip(z - 120, 0, None))) < 7) & (z > 45) & (z < 195)
    body.paint(breast & skin, some(230), "sternum")
    for side, word in ((1.0, "right"), (-1.0, "left")):
        body.paint(body.tube([(side * 22, 58, 196), (side * 80, 40, 226), (side * 140, 0, 232)], 7.5) & skin, 350, f"{word} clavicle")
        blade = (np.abs(radius - 1.17) < 0.05) & (side * x > 60) & (y < -20) & (z > 90) & (z < 90 + 1.5 * (side * x - 40)) & (z < 225)
        blade |= body.tube([(side * 78, -82, 190), (side * 150, -30, 222)], 7.5)
        body.paint(blade & muscle, some(330), f"{word} scapula")
    width = np.interp(z, [-200, -60, 150, 270], [25, 23, 16, 12]).astype(np.float32)
    pace = np.interp(z, [-200, 0, 280], [36, 31, 20]).astype(np.float32)
    phase = np.cumsum(1 / np.interp(np.arange(-400, 420), [-200, 0, 280], [36, 31, 20]))
    level = np.interp(z, np.arange(-400, 420), phase).astype(np.float32) + float(rng.uniform(0, 1))
    gap = np.abs(level - np.round(level)) * pace < 3.2
    dy = y - spine_y
    corpus = (x / width) ** 2 + (dy / (width * 0.78)) ** 2 <= 1
    canal_y = spine_y - width * 0.78 - 9
    arch = ((x / 17) ** 2 + ((y - canal_y) / 15) ** 2 <= 1) & (np.abs(level - np.floor(level) - 0.55) < 0.36)
    spinous = (np.abs(x) < 4.5) & (y < canal_y - 9) & (y > canal_y - 44) & (np.abs(level - np.floor(level) - 0.6) < 0.3)
    transverse = (np.abs(x) < 38) & (np.abs(y - canal_y + 4) < 6) & (np.abs(level - np.floor(level) - 0.6) < 0.2)
    spine = (corpus | arch | spinous | transverse) & (z > -205)
    edges = [
        (-205.0, -10.0, "lumbar vertebral column"),
        (-10.0, 268.0, "thoracic vertebral column"),
        (268.0, 500.0, "cervical vertebral column"),
    ]
    bone = some(240, 0.25)
    for low, high, name in edges:
        body.paint(spine & (z >= low) & (z < high), bone, name)
        body.hu[(arch | spinous | transverse) & (z >= low) & (z < high)] = bone + 140
    body.paint(corpus & gap & (z > -205), 75, "intervertebral discs")
    tail = np.clip((-200 - z) / 90, 0, 1)
    sacrum = (np.abs(x) < 52 - 38 * tail) & (np.abs(y - (-62 - 40 * np.sin(np.pi * tail))) < 22 - 13 * tail) & (z < -200) & (z > -292)
    body.paint(sacrum & muscle, some(210), "sacrum")
    body.paint(((x / 9.5) ** 2 + ((y - canal_y) / 8.5) ** 2 <= 1) & (z > -240), 25, "spinal cord")
    outside = ~skin & (np.abs(x) <= half_x.max())
    body.labels[outside & (body.hu < -300)] = 0


def _draw_head(body: _Body, rng: np.random.Generator) -> None:
    def some(value: float, spread: float = 0.1) -> float:
        return float(value * rng.uniform(1 - spread, 1 + spread))

    x, y, z = body.x, body.y, body.z
    scalp = body.ellipsoid((0, 0, 5), (some(80, 0.05), some(98, 0.05), 92), power=2.2) | (
        body.ellipsoid((0, 22, -50), (62, 72, 75)) & (z < 10)
    )
    scalp |= body.tube([(0, -35, -70), (0, -40, -140)], 52)
    body.paint(scalp, some(-20, 0.9))
    outer = body.ellipsoid((0, -2, 8), (72, 90, 83), power=2.2) & (z > -52 - 0.25 * y)
    inner = body.ellipsoid((0, -2, 8), (66, 84, 77), power=2.2) & (z > -45 - 0.25 * y)
    body.paint(outer, some(900), "skull")
    body.paint(inner, 8)  # cerebrospinal fluid
    brain = body.ellipsoid((0, -2, 10), (63, 81, 73), power=2.2) & (z > -40 - 0.2 * y)
    folds = ndimage.gaussian_filter(rng.normal(0, 1, x.shape).astype(np.float32), [max(0.7, 4.0 / s) for s in _steps(body)])
    depth = (np.abs(x) / 63) ** 2.2 + (np.abs(y + 2) / 81) ** 2.2 + (np.abs(z - 10) / 73) ** 2.2
    upper = z > -26 - 0.25 * y
    for side, word in ((1.0, "right"), (-1.0, "left")):
        half = brain & upper & (side * x > 1.2)
        body.paint(half, 30, f"{word} cerebral hemisphere")
        body.hu[half & ((depth > 0.78) | (folds > folds.std()))] = 39
    body.paint(body.ellipsoid((0, -50, -38), (some(48), some(30), some(24))) & inner, 36, "cerebellum")
    body.paint(body.tube([(0, -16, -12), (0, -24, -50), (0, -32, -110)], (14, 9)), 33, "brainstem")
    for side, word in ((1.0, "right"), (-1.0, "left")):
        shift = float(rng.uniform(-3, 3))
        body.paint(body.ellipsoid((side * 12, -12 + shift, 12), (some(9), some(15), some(10))), 41, f"{word} thalamus")
        horn = body.tube([(side * 9, 38, 14), (side * 10, 5, 26), (side * 20, -36, 18), (side * 30, -30, -6)], some(5.5, 0.35))
        body.paint(horn & inner, 6, f"{word} lateral ventricle")
        body.paint(body.ellipsoid((side * 32, 74, -30), (19, 19, 17)) & scalp, -80)
        body.paint(body.ellipsoid((side * 32, 78, -30), (12.5, 12.5, 12.5)), 12, f"{word} eyeball")
    body.paint(
        (body.ellipsoid((0, 80, -56), (17, 18, 20)) | body.ellipsoid((0, 30, -62), (14, 20, 14))) & scalp, -980
    )  # air of nose and throat
    jaw = body.tube([(46, 10, -62), (42, 44, -100), (0, 82, -106), (-42, 44, -100), (-46, 10, -62)], 8)
    body.paint(jaw & scalp, some(800), "mandible")
    spine = body.ellipsoid((0, -42, -112), (17, 15, 60)) & (z < -56)
    body.paint(spine, some(280), "cervical vertebral column")
    body.paint(body.tube([(0, -50, -60), (0, -52, -160)], 7), 28, "spinal cord")


def _steps(body: _Body) -> tuple[float, float, float]:
    """Voxel size (z, y, x) in mm as drawn (the bending leaves the mean step nearly unchanged)."""
    steps = []
    for axis, values in enumerate((body.z, body.y, body.x)):
        count = values.shape[axis]
        ends = np.take(values, count - 1, axis=axis).mean() - np.take(values, 0, axis=axis).mean()
        steps.append(max(0.5, abs(float(ends)) / max(1, count - 1)))
    return (steps[0], steps[1], steps[2])
