"""Growing a structure from one slice by classical means: an intensity model, a distance prior, propagation from slice to slice.

Slices are 2D float32 crops (rows, columns); `spacing_mm` is (rows, columns), or (between slices, rows, columns). Evidence is in
nats, positive for the target. The constants were tuned on one CT (scripts/bench_grow.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Float = NDArray[np.float32]
Read = Callable[[int], Float]
Spacing2D = tuple[float, float]
Spacing = tuple[float, ...]
Box = tuple[slice, ...]

BINS = 72
"""Bins of the intensity histograms over the compressed scale."""
REACH = 6.0
"""The compressed scale ends here; asinh(6 scales) is 2.5, asinh(200 scales) is 6."""
CLIP = 3.0
"""Most that one voxel's intensity may say, in nats."""
SMOOTH_MM = 2.0
"""Width of the Gaussian that shares evidence between neighbours (never under 0.6 voxel)."""
OPEN_MM = 1.5
"""Bridges thinner than about twice this are cut."""


@dataclass(frozen=True, eq=False)
class Appearance:
    """How likely an intensity is inside against outside: log ratio of two histograms over asinh((x - centre) / scale), a scale that
    is fine around the target's own intensities and coarse far away, whatever the unit."""

    centre: float
    scale: float
    table: Float

    @classmethod
    def fit(cls, inside: Float, outside: Float) -> Appearance | None:
        """From samples of both sides (not finite ones are ignored); None when they are too few or alike."""
        inside, outside = inside[np.isfinite(inside)], outside[np.isfinite(outside)]
        if inside.size < 1 or outside.size < 4:
            return None
        centre = float(np.median(inside))
        spread = float(np.median(np.abs(inside - centre))) * 1.4826
        overall = float(np.std(np.concatenate([inside, outside]), dtype=np.float64))
        scale = max(spread, (0.02 if inside.size >= 8 else 0.1) * overall)
        if not (scale > 0 and np.isfinite(scale)):
            return None
        kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
        shares = []
        for side in (inside, outside):
            counts = np.bincount(_bins(side, centre, scale), minlength=BINS) / side.size
            shares.append(np.convolve(counts, kernel / kernel.sum(), mode="same") + 0.15 / BINS)
        table = np.clip(np.log(shares[0] / shares[1]), -CLIP, CLIP).astype(np.float32)
        if float(table.max() - table.min()) < 0.2:
            return None
        return cls(centre, scale, table)

    def score(self, image: Float) -> Float:
        """Evidence per pixel; what is not finite is outside."""
        finite = np.isfinite(image)
        filled = np.where(finite, image, np.float32(self.centre))
        return np.where(finite, self.table[_bins(filled, self.centre, self.scale)], np.float32(-CLIP))


def _bins(values: Float, centre: float, scale: float) -> NDArray[np.intp]:
    with np.errstate(over="ignore"):
        compressed = np.arcsinh((values - np.float32(centre)) / np.float32(scale))
    return ((np.clip(compressed, -REACH, REACH) + REACH) * ((BINS - 1) / (2 * REACH)) + 0.5).astype(np.intp)


# -------------------------------------------------------------------------------------------------------------- one slice


def smooth(evidence: Float, spacing_mm: tuple[float, ...]) -> Float:
    """Evidence shared with the neighbours."""
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(evidence, [max(0.6, SMOOTH_MM / s) for s in spacing_mm], mode="nearest"))


def signed_mm(mask: Bool, spacing_mm: Spacing2D) -> Float:
    """Distance to the mask's edge in mm, positive inside."""
    from scipy.ndimage import distance_transform_edt

    half = 0.5 * min(spacing_mm)
    inside = distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)[1:-1, 1:-1]
    outside = distance_transform_edt(~mask, sampling=spacing_mm)
    return np.where(mask, inside - half, half - outside).astype(np.float32)


def ball(radius_mm: float, spacing_mm: tuple[float, ...]) -> Bool:
    """A structuring element of that radius, at least the direct neighbours along axes near the finest spacing."""
    reach = [max(int(s <= min(spacing_mm) * 1.5), int(radius_mm // s)) for s in spacing_mm]
    offsets = np.ogrid[tuple(slice(-r, r + 1) for r in reach)]
    limit = max(radius_mm, min(spacing_mm) * 1.5) ** 2 + 1e-6
    return np.asarray(sum((o * s) ** 2 for o, s in zip(offsets, spacing_mm, strict=True)) <= limit)


def clean(mask: Bool, touching: Bool, spacing_mm: Spacing) -> Bool:
    """The mask without thin bridges and holes, only the parts that touch `touching`."""
    from scipy.ndimage import binary_fill_holes, binary_opening, label

    thick = binary_opening(mask, ball(OPEN_MM, spacing_mm))
    parts, _ = label(thick if thick.any() else mask)
    kept = np.unique(parts[touching])
    return np.asarray(binary_fill_holes(np.isin(parts, kept[kept > 0])))


def contrast(evidence: Float, mask: Bool, spacing_mm: Spacing) -> float:
    """Mean evidence in the mask less that in the ring around it."""
    from scipy.ndimage import binary_dilation

    ring = binary_dilation(mask, ball(2 * max(spacing_mm), spacing_mm)) & ~mask
    return float(evidence[mask].mean()) - (float(evidence[ring].mean()) if ring.any() else -CLIP)


@dataclass(frozen=True, eq=False)
class Start:
    """The target on its key slice, the model of its intensities, and how well it fits the box (higher is better)."""

    mask: Bool
    model: Appearance
    fit: float


@dataclass(frozen=True, eq=False)
class _Frame:
    """A box in a slice or a volume: what is within it, and the squared elliptical radius (1 at the middles of the sides)."""

    box: Box
    within: Bool
    radius: Float
    spacing_mm: Spacing

    @classmethod
    def of(cls, box: Box, shape: tuple[int, ...], spacing_mm: Spacing) -> _Frame:
        within = np.zeros(shape, dtype=np.bool_)
        within[box] = True
        radius = np.zeros(shape, dtype=np.float32)
        for index, span in zip(np.ogrid[tuple(slice(n) for n in shape)], box, strict=True):
            radius += np.square((index - (span.start + span.stop - 1) / 2) / max((span.stop - span.start) / 2, 0.5), dtype=np.float32)
        return cls(box, within, radius, spacing_mm)


def start_in_box(image: Float, box: Box, spacing_mm: Spacing, inside: Bool, outside: Bool) -> Start | None:
    """The target in a box drawn tightly around it, on one slice or in 3D; None when nothing stands out.

    GrabCut's alternation of model and mask from several beginnings (the ellipse that fills the box, each intensity class in it);
    the result that explains the box best wins. `inside`, `outside`: pixels known to be so.
    """
    frame = _Frame.of(box, image.shape, spacing_mm)
    best: Start | None = None
    for weight, first in _beginnings(image, frame):
        mask = (first | inside) & frame.within & ~outside
        made = _alternate(image, mask, frame, weight, inside, outside) if mask.any() else None
        if made is not None and (best is None or made.fit > best.fit):
            best = made
    return best


def _beginnings(image: Float, frame: _Frame) -> list[tuple[float, Bool]]:
    """(weight of the ellipse as a prior, first mask) to alternate from. In 3D the ellipsoid alone: there the classes gave worse masks
    more often than better ones, and three fifths of the time."""
    from skimage.filters import threshold_multiotsu

    begun = [(1.6, frame.radius <= 0.5), (0.8, frame.radius <= 0.9)]
    values = image[frame.within & np.isfinite(image)].astype(np.float64)
    if values.size >= 16 and image.ndim == 2:
        low, high = np.percentile(values, (2, 98))
        clipped = np.clip(values, low, high)
        if np.unique(np.histogram_bin_edges(clipped, 64)).size > 64 and np.count_nonzero(np.histogram(clipped, 64)[0]) >= 3:
            cuts = threshold_multiotsu(clipped, classes=3, nbins=64)
            classes = np.digitize(image, cuts)
            begun += [(0.3, frame.within & np.isfinite(image) & (classes == k)) for k in range(3)]
    return begun


def _alternate(image: Float, mask: Bool, frame: _Frame, weight: float, inside: Bool, outside: Bool) -> Start | None:
    """Model from mask, mask from model, at most five times."""
    prior = (weight * (1.0 - frame.radius)).clip(-weight, weight)
    around = (frame.radius < 9) | frame.within
    made: Start | None = None
    for _ in range(5):
        model = Appearance.fit(image[mask], image[~mask & around])
        if model is None:
            return None
        evidence = smooth(model.score(image), frame.spacing_mm)
        total = evidence + prior
        total[inside], total[outside | ~frame.within] = CLIP, -CLIP
        found = clean(total > 0, mask, frame.spacing_mm)
        if not found.any():
            return None
        same = bool((found == mask).all())
        mask, made = found, Start(found, model, 0.0)
        if same:
            break
    return None if made is None else Start(mask, made.model, _fit_to_box(mask, evidence, frame))


def _fit_to_box(mask: Bool, evidence: Float, frame: _Frame) -> float:
    """How well a mask explains its box: sides touched, evidence and contrast, less evidence beyond the sides and odd filling."""
    from scipy.ndimage import binary_dilation

    touched = 0.0
    for axis, span in enumerate(frame.box):
        lines = np.flatnonzero(mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis)))
        slack = max(1.0, 0.15 * (span.stop - span.start))
        touched += sum(max(0.0, 1.0 - gap / slack) for gap in (lines[0] - span.start, span.stop - 1 - lines[-1]))
    beyond = binary_dilation(frame.within, iterations=2) & ~frame.within & binary_dilation(mask, iterations=3)
    leak = float((evidence[beyond] > 0).mean()) if beyond.any() else 0.0
    usual = 0.58 if mask.ndim == 2 else 0.45
    odd = max(0.0, abs(float(mask[frame.box].mean()) - usual) - 0.2)
    apart = contrast(evidence, mask, frame.spacing_mm)
    return touched / mask.ndim - leak + 0.3 * float(evidence[mask].mean()) + 0.3 * apart - 5.0 * odd


def start_at_points(image: Float, inside: Bool, outside: Bool, edge: Bool, spacing_mm: Spacing2D) -> Start | None:
    """The target around the pixels `inside`, without a box; None when there is none.

    Of the connected regions of intensities ever further from those of the seed, not reaching the pixels `edge`, the one that is
    roundest and whose outline lies on the strongest edges; `fit`, 0..1, says how much so."""
    from scipy.ndimage import binary_dilation, binary_erosion, gaussian_gradient_magnitude

    finite = np.isfinite(image)
    seed = binary_dilation(inside, ball(1.5 * max(spacing_mm), spacing_mm)) & finite & ~outside
    if not seed.any():
        return None
    calm = smooth(np.where(finite, image, np.float32(np.median(image[seed]))), spacing_mm)
    edges = gaussian_gradient_magnitude(calm, 0.6)
    edges /= edges + np.float32(max(6 * float(np.median(edges)), 1e-6))
    away = np.abs(calm - np.float32(np.median(calm[seed])))
    best_score, best, size = 0.0, None, 0
    for limit in np.unique(np.quantile(away, np.linspace(0.01, 0.9, 40))):
        region = clean((away <= limit) & finite & ~outside, inside | seed, spacing_mm)
        if (region & edge).any():
            break
        if region.sum() <= max(size, 5):
            continue
        size = int(region.sum())
        rim = region & ~binary_erosion(region, border_value=1)
        if not rim.any():
            continue
        round_ = min(1.0, 4 * np.pi * size / float(rim.sum()) ** 2)
        score = float(edges[rim].mean()) * round_**0.5
        if score > best_score:
            best_score, best = score, region
    if best is None:
        return None
    around = binary_dilation(best, ball(15.0, spacing_mm)) & ~best
    model = Appearance.fit(image[best], image[around])
    return None if model is None else Start(best, model, best_score)


# ------------------------------------------------------------------------------------------------------------ propagation


@dataclass(frozen=True)
class Propagation:
    """Rules of `propagate`. On a slice `away` mm from the key slice the evidence of a pixel gains its signed distance to the last
    slice's mask over (distance_mm + gap_share * slice gap), loses its distance beyond the key slice's outline box (widened by
    box_widen * away) over box_mm, and loses late * (away / (extent * box size) - 1) where that is positive. The target ends where the
    evidence in the last mask's place falls below stop_evidence, the contrast below stop_contrast of the key slice's, or the area
    below stop_area of it."""

    distance_mm: float = 1.5
    gap_share: float = 0.5
    box_mm: float = 2.0
    box_widen: float = 0.3
    extent: float = 0.6
    late: float = 1.0
    stop_evidence: float = -0.6
    stop_contrast: float = 0.6
    stop_area: float = 0.03


def propagate(
    read: Read, span: tuple[int, int], key: int, start: Start, spacing_mm: tuple[float, float, float], rules: Propagation
) -> dict[int, Bool]:
    """The target on the slices span[0] <= index < span[1] around `key`, both ways until it ends: index -> mask, none empty."""
    gap_mm, in_plane = spacing_mm[0], (spacing_mm[1], spacing_mm[2])
    found = {key: start.mask}
    beyond = _beyond_mm(start.mask, in_plane)
    sides = [int(start.mask.any(axis=1 - axis).sum()) * step for axis, step in enumerate(in_plane)]
    extent = rules.extent * float(np.hypot(sides[0], sides[1])) / 2**0.5
    reach = rules.distance_mm + rules.gap_share * gap_mm
    least = rules.stop_contrast * contrast(smooth(start.model.score(read(key)), in_plane), start.mask, in_plane)
    for step in (1, -1):
        last, index = start.mask, key + step
        while span[0] <= index < span[1]:
            evidence = smooth(start.model.score(read(index)), in_plane)
            if float(evidence[last].mean()) < rules.stop_evidence:
                break
            away = abs(index - key) * gap_mm
            prior = np.maximum(signed_mm(last, in_plane) / reach, -4)
            prior -= np.maximum(beyond - rules.box_widen * away, 0) / rules.box_mm + rules.late * max(0.0, away / extent - 1.0)
            mask = clean(evidence + prior > 0, last, in_plane)
            if mask.sum() < max(3, rules.stop_area * start.mask.sum()) or contrast(evidence, mask, in_plane) < least:
                break
            found[index] = last = mask
            index += step
    return found


def _beyond_mm(mask: Bool, spacing_mm: Spacing2D) -> Float:
    """How far each pixel lies outside the mask's bounding box, in mm."""
    away = []
    for axis, index in enumerate(np.ogrid[: mask.shape[0], : mask.shape[1]]):
        lines = np.flatnonzero(mask.any(axis=1 - axis))
        away.append(np.maximum(np.maximum(lines[0] - index, index - lines[-1]), 0) * spacing_mm[axis])
    return np.hypot(away[0], away[1]).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- refinement


def carve(image: Float, mask: Bool, keep: Bool, drop: Bool, spacing_mm: tuple[float, float, float]) -> Bool:
    """The mask (Z, Y, X) less what belongs to `drop`: a watershed over edges and necks between the voxels `keep` and `drop`."""
    from scipy.ndimage import distance_transform_edt, gaussian_gradient_magnitude
    from skimage.segmentation import watershed

    depth = distance_transform_edt(mask, sampling=spacing_mm).astype(np.float32)
    finite = np.isfinite(image)
    filled = np.where(finite, image, np.float32(np.median(image[finite]) if finite.any() else 0))
    edges = gaussian_gradient_magnitude(filled, 0.7)
    high = float(np.percentile(edges, 95))
    relief = (edges / high if high > 0 else 0) - depth / max(float(depth.max()), 1e-6)
    markers = np.zeros(mask.shape, dtype=np.int8)
    markers[keep & mask], markers[drop & mask] = 1, 2
    return np.asarray(watershed(relief, markers, mask=mask) == 1)


def extend(image: Float, mask: Bool, click: tuple[int, int, int], radius_mm: float, spacing_mm: tuple[float, float, float]) -> Bool:
    """The mask (Z, Y, X) with what looks like it around the click, within `radius_mm` of it; at least the click's own voxel."""
    from scipy.ndimage import binary_dilation, label

    offsets = np.ogrid[tuple(slice(0, n) for n in mask.shape)]
    square = sum(((o - c) * s) ** 2 for o, c, s in zip(offsets, click, spacing_mm, strict=True))
    near = np.asarray(square <= radius_mm**2)
    seed = np.asarray(square <= (1.5 * min(spacing_mm)) ** 2)
    seed[click] = True
    inside = seed | (mask & near)
    ring = binary_dilation(near | mask, iterations=2) & ~inside
    model = Appearance.fit(image[inside], image[ring])
    if model is None:
        return mask | seed
    parts, _ = label(near & (smooth(model.score(image), spacing_mm) > 0) | seed)
    return np.asarray(mask | (parts == parts[click]))
