"""The canvas of a phantom: body coordinates of every voxel, shapes in them, intensities and labels being painted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]

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
"""Canonical name -> value in ``Phantom.labels_zyx`` of the healthy CT kinds; the same for every kind. 0 is everything else."""

_MORE_NAMES: Final = (
    "liver tumour",
    "right lung nodule",
    "left lung nodule",
    "right kidney cyst",
    "left kidney cyst",
    "right caudate nucleus",
    "left caudate nucleus",
    "right putamen",
    "left putamen",
    "right hippocampus",
    "left hippocampus",
    "corpus callosum",
    "fourth ventricle",
    "enhancing tumour",
    "non-enhancing tumour core",
    "peritumoural oedema",
    "brain metastasis",
)
MORE_LABELS: Final[dict[str, int]] = {name: value for value, name in enumerate(_MORE_NAMES, start=len(_NAMES) + 1)}
"""Names of the kinds with lesions and of head MR, after those of ``LABELS``."""
ALL_LABELS: Final[dict[str, int]] = {**LABELS, **MORE_LABELS}


class Body:
    """Coordinates (mm, warped) of every voxel, and the two arrays being painted. All arrays (Z, Y, X)."""

    def __init__(
        self,
        rng: np.random.Generator,
        axes_zyx_mm: list[NDArray[np.float64]],
        *,
        rotation_zyx: NDArray[np.float64] | None = None,
        quick: bool = False,
    ) -> None:
        """axes: mm positions of the voxels along each axis; rotation_zyx: (3, 3), turns the voxel grid about its centre.

        quick: bend and texture by products of three short matrices: the same shapes to within rounding, several times faster. The
        first kinds do without, as their arrays must stay as they are to the last bit.
        """
        shape = tuple(len(axis) for axis in axes_zyx_mm)
        grids: list[NDArray[Any]] = list(np.meshgrid(*axes_zyx_mm, indexing="ij", sparse=quick))
        if rotation_zyx is not None:
            grids = _turned(axes_zyx_mm, rotation_zyx)
        size = rng.uniform(0.88, 1.12) * rng.uniform(0.94, 1.06, 3)
        warped = []
        for i in range(3):
            knots = rng.normal(0, 1, (6, 6, 6))
            if quick:
                bend = _tensor_spline(knots, shape)
            else:
                at = np.meshgrid(*[np.linspace(1, 4, n) for n in shape], indexing="ij", sparse=False)
                bend = ndimage.map_coordinates(knots, at, order=3, output=np.float32)
            warped.append((grids[i] / size[i] + 5.0 * bend).astype(np.float32))
        self.quick = quick
        self.z, self.y, self.x = warped
        self.hu: Float = np.full(shape, -1000.0, dtype=np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(shape, dtype=np.uint8)
        planes = [tuple(other for other in range(3) if other != axis) for axis in range(3)]
        self._reach = [[(values.min(axis=p), values.max(axis=p)) for p in planes] for values in (self.x, self.y, self.z)]

    def window(self, low_xyz: Sequence[float], high_xyz: Sequence[float]) -> tuple[slice, slice, slice]:
        """Index ranges (z, y, x) outside of which no voxel lies in this box of body coordinates."""
        found = []
        for axis in range(3):
            may = np.ones(self.x.shape[axis], dtype=bool)
            for reach, low, high in zip(self._reach, low_xyz, high_xyz, strict=True):
                may &= (reach[axis][0] <= high) & (reach[axis][1] >= low)
            where = np.flatnonzero(may)
            found.append(slice(int(where[0]), int(where[-1]) + 1) if where.size else slice(0, 0))
        return found[0], found[1], found[2]

    def paint(self, where: Bool, hu: float, name: str | None = None) -> None:
        """Overwrite intensity where the mask holds; label it too, or clear the label when no name is given."""
        self.hu[where] = hu
        self.labels[where] = ALL_LABELS[name] if name else 0

    def ellipsoid(
        self, centre_xyz: tuple[float, float, float], radii_xyz: tuple[float, float, float], tilt: float = 0.0, power: float = 2.0
    ) -> Bool:
        """Super-ellipsoid |x/a|^p + ... <= 1 about centre, turned by `tilt` radians in the x-z plane."""
        inside = np.zeros(self.x.shape, dtype=bool)
        far = [max(radii_xyz[0], radii_xyz[2]), radii_xyz[1], max(radii_xyz[0], radii_xyz[2])] if tilt else list(radii_xyz)
        grow = 1.5 if tilt else 1.001  # the turned shape reaches as far as its diagonal
        low, high = ([c + sign * grow * f for c, f in zip(centre_xyz, far, strict=True)] for sign in (-1, 1))
        part = self.window(low, high)
        dx, dy, dz = self.x[part] - centre_xyz[0], self.y[part] - centre_xyz[1], self.z[part] - centre_xyz[2]
        if tilt:
            dx, dz = np.cos(tilt) * dx - np.sin(tilt) * dz, np.sin(tilt) * dx + np.cos(tilt) * dz
        radius = np.abs(dx / radii_xyz[0]) ** power + np.abs(dy / radii_xyz[1]) ** power + np.abs(dz / radii_xyz[2]) ** power
        inside[part] = radius <= 1
        return inside

    def tube(self, points_xyz: list[tuple[float, float, float]], radius: float | tuple[float, float]) -> Bool:
        """Voxels nearer than `radius` mm (start, end) to the polyline through the points."""
        first, last = (radius, radius) if isinstance(radius, (int, float)) else radius
        inside = np.zeros(self.x.shape, dtype=bool)
        knots = np.asarray(points_xyz, dtype=np.float32)
        low, high = knots.min(0) - max(first, last), knots.max(0) + max(first, last)
        part = self.window(low - 1e-3, high + 1e-3)
        x, y, z = self.x[part], self.y[part], self.z[part]
        near = (x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]) & (z >= low[2]) & (z <= high[2])
        if not near.any():
            return inside
        voxels = np.stack([x[near], y[near], z[near]], axis=1)
        hit = np.zeros(len(voxels), dtype=bool)
        for i in range(len(knots) - 1):
            step = knots[i + 1] - knots[i]
            along = np.clip((voxels - knots[i]) @ step / float(step @ step), 0, 1)
            distance2 = ((voxels - knots[i] - along[:, None] * step) ** 2).sum(1)
            fraction = (i + along) / (len(knots) - 1)
            hit |= distance2 <= (first + (last - first) * fraction) ** 2
        inside[part][near] = hit
        return inside

    def finish_mr(self, rng: np.random.Generator) -> NDArray[np.int16]:
        """Slight blur, a smooth bias field of up to a fifth, Rician noise; int16 in a scanner's own units (Z, Y, X)."""
        signal = ndimage.gaussian_filter(self.hu, 0.4)
        bias = _tensor_spline(rng.normal(0, 1, (6, 6, 6)), signal.shape)
        signal = signal * np.exp(0.06 * np.clip(bias, -3, 3)) * float(rng.uniform(0.7, 1.4))
        sigma = float(rng.uniform(8, 25))
        real = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
        imaginary = sigma * rng.standard_normal(signal.shape, dtype=np.float32)
        drawn: NDArray[np.int16] = np.clip(np.sqrt(real * real + imaginary * imaginary), 0, 32000).astype(np.int16)
        return drawn

    def finish(self, rng: np.random.Generator) -> NDArray[np.int16]:
        """Partial volume (slight blur), texture and noise; int16 Hounsfield units (Z, Y, X)."""
        hu = ndimage.gaussian_filter(self.hu, 0.4)
        grain = rng.normal(0, 1, [max(2, n // 4) for n in hu.shape]).astype(np.float32)
        if self.quick:
            coarse = _tensor_linear(grain, hu.shape)
        else:
            coarse = ndimage.zoom(grain, 4, order=1)
            padded = [(0, max(0, n - m)) for n, m in zip(hu.shape, coarse.shape, strict=True)]
            coarse = np.pad(coarse, padded, mode="edge")[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
        tissue = hu > -300
        hu = hu + tissue * 6.0 * coarse + rng.normal(0, rng.uniform(4, 18), hu.shape).astype(np.float32)
        drawn: NDArray[np.int16] = np.clip(np.round(hu), -1024, 3071).astype(np.int16)
        return drawn


def _along_axes(values: NDArray[Any], matrices: list[NDArray[Any]]) -> Float:
    """values (a, b, c) with a matrix (n, a), (m, b), (k, c) applied along each axis: (n, m, k)."""
    out = np.einsum("zyx,kx->zyk", values, matrices[2])
    out = np.einsum("zyk,my->zmk", out, matrices[1])
    return np.asarray(np.tensordot(matrices[0], out, axes=(1, 0)), dtype=np.float32)


def _tensor_spline(knots: NDArray[np.float64], shape: tuple[int, ...]) -> Float:
    """The cubic spline through 6 x 6 x 6 knots at positions 1 to 4 along each axis, as map_coordinates has it."""
    matrices = []
    for count in shape:
        distance = np.abs(np.linspace(1, 4, count)[:, None] - np.arange(6)[None])
        near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
        matrices.append(np.where(distance < 1, near, np.where(distance < 2, far, 0.0)).astype(np.float32))
    return _along_axes(ndimage.spline_filter(knots, order=3, output=np.float32), matrices)


def _tensor_linear(grain: Float, shape: tuple[int, ...]) -> Float:
    """Linear interpolation of a coarse grid that spans the fine one from end to end."""
    matrices = []
    for coarse, fine in zip(grain.shape, shape, strict=True):
        distance = np.abs(np.linspace(0, coarse - 1, fine)[:, None] - np.arange(coarse)[None])
        matrices.append(np.clip(1 - distance, 0, None).astype(np.float32))
    return _along_axes(grain, matrices)


def _turned(axes_zyx_mm: list[NDArray[np.float64]], rotation_zyx: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Positions (mm, z y x) of the voxels of a grid that is turned about its centre."""
    centres = [(axis[0] + axis[-1]) / 2 for axis in axes_zyx_mm]
    z, y, x = np.meshgrid(*[axis - centre for axis, centre in zip(axes_zyx_mm, centres, strict=True)], indexing="ij", sparse=True)
    return [rotation_zyx[i, 0] * z + rotation_zyx[i, 1] * y + rotation_zyx[i, 2] * x + centres[i] for i in range(3)]


def steps_mm(body: Body) -> tuple[float, float, float]:
    """Voxel size (z, y, x) in mm as drawn (the bending leaves the mean step nearly unchanged)."""
    steps = []
    for axis, values in enumerate((body.z, body.y, body.x)):
        count = values.shape[axis]
        ends = np.take(values, count - 1, axis=axis).mean() - np.take(values, 0, axis=axis).mean()
        steps.append(max(0.5, abs(float(ends)) / max(1, count - 1)))
    return (steps[0], steps[1], steps[2])
