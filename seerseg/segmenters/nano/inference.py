"""From a volume to one mask per text: a coarse pass over the body, then fine tiles where something was found.

Work is done on isotropic grids along the world axes, so an oblique or sheared scan is seen upright and a side is one of the patient. Every
text is answered from the image alone, never from the other texts: the tiles lie on a lattice that only the scan decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from seerseg.segmenters.nano import inputs
from seerseg.segmenters.nano.network import NanoNetwork
from seerseg.segmenters.nano.sharpening import Slab, sharpened
from seerseg.volume import Grid, Volume, resample

Float32 = NDArray[np.float32]

CROP_MM = 90.0
"""A field of view smaller than this is all body: it was cut out around its target."""
TILE, STEP = 48, 36
"""Side of a fine tile and distance between tiles, voxels."""
LADDER_MM = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
FINEST_CT_MM = 2.5
"""The finest that CT was learnt at."""
SPAN = 64
"""The fine spacing is the first of the ladder at which the target spans at most this many voxels."""
FOUND = 0.3
"""Coarse probability above which a voxel asks for a fine tile."""
PROMPTS_AT_ONCE = 16
PRESENCE_THRESHOLD = 0.5
TRUST_OUTSIDE_CT = 0.5
"""How far intensities are believed where they are no Hounsfield units; from 0.25 to 1 hardly differs on validation cases."""
BAND = 2
"""Half width, in voxels of the working grid, of the band around the target in which the scan's own voxels have a say."""


@dataclass(frozen=True)
class Answer:
    """presence 0..1; mask bool (Z, Y, X) on the volume's grid, or None when nothing was found."""

    presence: float
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume as the network needs it: scaling, and the body box in world mm, in (z, y, x) order."""

    volume: Volume
    modality: str
    scaling: inputs.Intensities
    box_lo: NDArray[np.float64]
    box_hi: NDArray[np.float64]


@dataclass(eq=False)
class Field:
    """Logits of one text on a world-aligned grid."""

    grid: Grid
    logits: Float32


def isotropic(origin_zyx_mm: Sequence[float], spacing_mm: float, shape_zyx: Sequence[int]) -> Grid:
    """A grid along the world's axes; origin: centre of voxel 0."""
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = list(origin_zyx_mm)[::-1]
    return Grid((int(shape_zyx[0]), int(shape_zyx[1]), int(shape_zyx[2])), affine)


def rounded(voxels: float) -> int:
    """To a multiple of 16, at least 32."""
    return max(32, 16 * int(np.ceil(voxels / 16 - 0.15)))


def answer(network: NanoNetwork, volume: Volume, texts: Sequence[str], *, threshold: float, blend: float) -> list[Answer]:
    """One Answer per text. threshold: of presence; blend: weight of the fine logits against the coarse ones where both exist."""
    scan = look(volume)
    with torch.inference_mode():
        queries = [network.text([text]) for text in texts]
        spacing, grid = coarse_grid(scan)
        encoded = _encode(network, scan, grid, spacing)
        out: list[Answer] = []
        for start in range(0, len(texts), PROMPTS_AT_ONCE):
            some = queries[start : start + PROMPTS_AT_ONCE]
            fields: list[Field | None] = []
            presences: list[float] = []
            for query in some:
                logits, seen = network.decode(*encoded, query)
                presences.append(float(torch.sigmoid(seen[0])))
                field = Field(grid, np.ascontiguousarray(logits[0].float().cpu().numpy()))
                fields.append(field if presences[-1] >= threshold and (field.logits > 0).any() else None)
            _refine(network, scan, spacing, some, fields, blend)
            for presence, kept in zip(presences, fields, strict=True):
                mask = None if kept is None else paint(kept, volume, 1.0 if scan.modality == inputs.CT else TRUST_OUTSIDE_CT)
                out.append(Answer(presence, mask if mask is not None and mask.any() else None))
    return out


def look(volume: Volume) -> Scan:
    """Modality, body box and intensity scaling from every n-th voxel."""
    array, shape = volume.array, np.array(volume.grid.shape_zyx)
    spacing = np.array(volume.grid.spacing_zyx)
    step = np.maximum(1, np.floor((shape * spacing).max() / 110 / spacing)).astype(int)
    thin = np.asarray(array[:: step[0], :: step[1], :: step[2]], dtype=np.float32)
    finite = thin[np.isfinite(thin)]
    thin = _finite(thin, float(finite.min()) if finite.size else 0.0)
    modality = {"CT": inputs.CT, "MR": inputs.MR, "MRI": inputs.MR}.get((volume.modality or "").upper(), "")
    if not modality:
        modality = inputs.UNKNOWN if volume.modality else inputs.CT if thin.min() < -500 else inputs.MR
    low, high = np.percentile(thin, [1, 99])
    body = thin > (-300.0 if modality == inputs.CT else low + 0.08 * (high - low))
    if (shape * spacing).max() < CROP_MM:
        body[:] = True
    else:
        opened = ndimage.binary_opening(body)
        parts, count = ndimage.label(opened)
        if count:
            body = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    where = np.argwhere(body) if body.any() else np.argwhere(np.ones_like(body))
    lo, hi = where.min(0) * step - 0.5, np.minimum((where.max(0) + 1) * step, shape) - 0.5
    corners = volume.grid.to_world(np.array([[a, b, c] for a in (lo[0], hi[0]) for b in (lo[1], hi[1]) for c in (lo[2], hi[2])]))[:, ::-1]
    scaling = inputs.Intensities.measure(torch.from_numpy(thin[body] if body.any() else thin.ravel()), modality)
    return Scan(volume, modality, scaling, corners.min(0), corners.max(0))


def _finite(values: Float32, fill: float = 0.0) -> Float32:
    """What is not finite (readers leave none, arrays given in memory may) becomes `fill`."""
    return np.nan_to_num(values, nan=fill, posinf=fill, neginf=fill)


def coarse_grid(scan: Scan) -> tuple[float, Grid]:
    """Spacing in mm and grid of the coarse pass, about the body box."""
    extent = scan.box_hi - scan.box_lo
    spacing = float(np.clip(extent.max() / 64, 1.0, 6.0))
    shape = [min(112, rounded(e / spacing)) for e in extent]
    origin = (scan.box_lo + scan.box_hi) / 2 - (np.array(shape) - 1) / 2 * spacing
    return spacing, isotropic(origin.tolist(), spacing, shape)


def _read(scan: Scan, grid: Grid) -> Float32:
    """The volume's intensities on a working grid."""
    return averaged(scan.volume.array, scan.volume.grid, grid, scan.scaling.background)


def averaged(array: NDArray[Any], source: Grid, grid: Grid, fill: float) -> Float32:
    """The array (Z, Y, X) of `source` on a grid of one spacing: averaged over blocks of voxels when that grid is coarser, then linear;
    `fill` outside the field of view."""
    corners = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]) * (np.array(grid.shape_zyx) - 1)
    voxels = source.to_voxel(grid.to_world(corners))
    factor = np.maximum(1, np.floor(grid.spacing_zyx[0] / 1.3 / np.array(source.spacing_zyx))).astype(int)
    lo = np.clip((np.floor(voxels.min(0)) - 1) // factor * factor, 0, None).astype(int)
    hi = np.minimum(np.ceil(voxels.max(0)) + 1 + factor, source.shape_zyx).astype(int)
    if (hi <= lo).any():
        return np.full(grid.shape_zyx, fill, dtype=np.float32)
    lo = np.minimum(lo, np.maximum(0, np.array(source.shape_zyx) - factor))
    cut = array[lo[0] : hi[0], lo[1] : hi[1], lo[2] : hi[2]]
    small = _block_mean(cut, factor)
    affine = source.affine.copy()
    affine[:3, :3] = affine[:3, :3] * factor[::-1]
    affine[:3, 3] = source.to_world(lo + (factor - 1) / 2)
    return np.asarray(resample(small, Grid(small.shape, affine), grid, order=1, fill=fill), dtype=np.float32)


def _block_mean(array: NDArray[Any], factor: NDArray[np.int64]) -> Float32:
    """Mean over blocks (z, y, x), a slab at a time; the last block of an axis may be short."""
    out = []
    for z in range(0, array.shape[0], int(factor[0])):
        slab = _finite(np.asarray(array[z : z + factor[0]], dtype=np.float32)).mean(0)
        for axis in (0, 1):
            n = int(factor[1 + axis])
            if n > 1:
                starts = np.arange(0, slab.shape[axis], n)
                counts = np.diff(np.append(starts, slab.shape[axis])).astype(np.float32)
                slab = np.add.reduceat(slab, starts, axis=axis) / (counts[:, None] if axis == 0 else counts[None, :])
        out.append(slab)
    return np.ascontiguousarray(np.stack(out), dtype=np.float32)


def picture(network: NanoNetwork, scan: Scan, grid: Grid, spacing: float) -> tuple[Tensor, Tensor]:
    """What the encoder is fed for a working grid: image (1, 5, Z, Y, X) and conditions (1, 8), on the network's device."""
    device = next(network.parameters()).device
    origin = grid.affine[:3, 3][::-1]
    channels = torch.cat(
        [
            scan.scaling.channels(torch.from_numpy(_read(scan, grid))),
            inputs.coordinates(grid.shape_zyx, origin.tolist(), spacing, scan.box_lo.tolist(), scan.box_hi.tolist()),
        ]
    )
    image = channels[None].to(device).contiguous(memory_format=torch.channels_last_3d)
    conditions = inputs.conditions(spacing, scan.box_lo.tolist(), scan.box_hi.tolist(), scan.modality)[None].to(device)
    return image, conditions


def _encode(network: NanoNetwork, scan: Scan, grid: Grid, spacing: float) -> tuple[list[Tensor], Tensor, Tensor]:
    image, conditions = picture(network, scan, grid, spacing)
    features, pooled = network.image(image, conditions)
    return features, pooled, image[:, 2:]


def _refine(network: NanoNetwork, scan: Scan, coarse_mm: float, queries: list[Tensor], fields: list[Field | None], blend: float) -> None:
    """Replace coarse fields by fine ones where that pays. Tiles are encoded once for all texts that need them."""
    wanted: dict[float, dict[tuple[int, int, int], list[int]]] = {}
    canvases: dict[int, tuple[NDArray[np.int64], Float32, Float32]] = {}
    for index, field in enumerate(fields):
        if field is None:
            continue
        found = np.argwhere(field.logits > np.log(FOUND / (1 - FOUND)))
        lo = found.min(0) - 1.0
        hi = found.max(0) + 1.0
        fine = _fine_spacing(scan, coarse_mm, float((hi - lo).max() + 1) * coarse_mm)
        if fine is None:
            continue
        lattice = _Lattice(scan, fine)
        world = field.grid.to_world(np.stack([lo, hi]))[:, ::-1]
        tiles = lattice.tiles(world[0], world[1])
        near = ndimage.maximum_filter((field.logits > np.log(FOUND / (1 - FOUND))).astype(np.uint8), 3)
        tiles = [t for t in tiles if _touches(lattice, t, near, field.grid)]
        corner = np.array(tiles).min(0)
        shape = (np.array(tiles).max(0) - corner) * STEP + TILE
        canvases[index] = (corner, np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32))
        for tile in tiles:
            wanted.setdefault(fine, {}).setdefault(tile, []).append(index)
    weight = _taper()
    for fine, by_tile in wanted.items():
        lattice = _Lattice(scan, fine)
        for tile in sorted(by_tile):
            encoded = _encode(network, scan, lattice.grid(tile), fine)
            for index in by_tile[tile]:
                logits, _ = network.decode(*encoded, queries[index])
                corner, total, weights = canvases[index]
                at = tuple(slice(int(a), int(a) + TILE) for a in (np.array(tile) - corner) * STEP)
                total[at] += weight * logits[0].float().cpu().numpy()
                weights[at] += weight
        for index in sorted({i for indices in by_tile.values() for i in indices}):
            old = fields[index]
            assert old is not None
            corner, total, weights = canvases[index]
            grid = isotropic((lattice.origin + corner * STEP * fine).tolist(), fine, total.shape)
            coarse = resample(old.logits, old.grid, grid, order=1, fill=-12.0)
            np.divide(total, weights, out=total, where=weights > 0)
            mixed = np.where(weights > 0, blend * total + (1 - blend) * coarse, coarse)
            if (mixed > 0).any():  # else the coarse answer stands
                fields[index] = Field(grid, np.ascontiguousarray(mixed, dtype=np.float32))


def _fine_spacing(scan: Scan, coarse_mm: float, extent_mm: float) -> float | None:
    """The ladder's step for a target of this extent; None when the coarse pass is as fine already."""
    finest = FINEST_CT_MM if scan.modality == inputs.CT else LADDER_MM[0]
    own = float(np.median(scan.volume.grid.spacing_zyx))
    steps = [s for s in LADDER_MM if s >= finest and s >= 0.7 * own]
    fine = next((s for s in steps if extent_mm / s <= SPAN), steps[-1] if steps else None)
    return fine if fine is not None and fine <= 0.75 * coarse_mm else None


class _Lattice:
    """Tiles of TILE voxels every STEP voxels over the body box; tile (0, 0, 0) starts at `origin`, world mm (z, y, x)."""

    def __init__(self, scan: Scan, spacing: float) -> None:
        extent = (scan.box_hi - scan.box_lo) / spacing
        self.counts = np.maximum(1, np.ceil((extent - TILE) / STEP).astype(int) + 1)
        covered = (self.counts - 1) * STEP + TILE
        self.spacing = spacing
        self.origin = (scan.box_lo + scan.box_hi) / 2 - (covered - 1) / 2 * spacing

    def tiles(self, lo_mm: NDArray[np.float64], hi_mm: NDArray[np.float64]) -> list[tuple[int, int, int]]:
        """Those that reach into the box."""
        first = np.clip(np.floor(((lo_mm - self.origin) / self.spacing - TILE) / STEP).astype(int) + 1, 0, self.counts - 1)
        last = np.clip(np.floor((hi_mm - self.origin) / self.spacing / STEP).astype(int), 0, self.counts - 1)
        return [(z, y, x) for z in range(first[0], last[0] + 1) for y in range(first[1], last[1] + 1) for x in range(first[2], last[2] + 1)]

    def grid(self, tile: tuple[int, int, int]) -> Grid:
        """The tile's voxels."""
        return isotropic((self.origin + np.array(tile) * STEP * self.spacing).tolist(), self.spacing, (TILE, TILE, TILE))


def _touches(lattice: _Lattice, tile: tuple[int, int, int], near: NDArray[np.uint8], coarse: Grid) -> bool:
    """Whether a coarse voxel that was found lies in the tile."""
    start = lattice.origin + np.array(tile) * STEP * lattice.spacing
    ends = coarse.to_voxel(np.stack([start, start + TILE * lattice.spacing])[:, ::-1])
    lo = np.clip(np.floor(ends[0]), 0, None).astype(int)
    hi = np.ceil(ends[1]).astype(int) + 1
    return bool(near[lo[0] : hi[0], lo[1] : hi[1], lo[2] : hi[2]].any())


def _taper() -> Float32:
    """(TILE, TILE, TILE): 1 in the middle, falling towards the faces, never 0."""
    ramp = np.minimum(np.arange(TILE) + 1, TILE - np.arange(TILE)) / (TILE - STEP)
    line = np.clip(ramp, 0.05, 1.0).astype(np.float32)
    return line[:, None, None] * line[None, :, None] * line[None, None, :]


def paint(field: Field, volume: Volume, trust: float) -> NDArray[np.bool_]:
    """Probability interpolated at every voxel of the scan, sharpened by the scan's own intensities near the boundary, then
    thresholded at 1/2, a slab at a time; bool (Z, Y, X)."""
    grid = volume.grid
    out = np.zeros(grid.shape_zyx, dtype=np.bool_)
    found = np.argwhere(field.logits > 0)
    if not len(found):
        return out
    ends = np.stack([found.min(0) - BAND - 1.0, found.max(0) + BAND + 1.0])
    corners = np.array([[ends[a][0], ends[b][1], ends[c][2]] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    voxels = grid.to_voxel(field.grid.to_world(corners))
    lo = np.clip(np.floor(voxels.min(0)), 0, None).astype(int)
    hi = np.minimum(np.ceil(voxels.max(0)) + 1, grid.shape_zyx).astype(int)
    if (hi <= lo).any():
        return out
    probability = (1 / (1 + np.exp(-np.clip(field.logits, -30, 30)))).astype(np.float32)
    near = ndimage.maximum_filter((field.logits > 0).astype(np.uint8), 2 * BAND + 1).astype(np.float32)
    depth = max(1, (1 << 22) // max(1, int((hi[1] - lo[1]) * (hi[2] - lo[2]))))

    def slab(z: int) -> Slab:
        stop = int(min(z + depth, hi[0]))
        part = grid.crop((z, int(lo[1]), int(lo[2])), (stop, int(hi[1]), int(hi[2])))
        image = _finite(np.asarray(volume.array[z:stop, lo[1] : hi[1], lo[2] : hi[2]], dtype=np.float32))
        prior, band = (resample(values, field.grid, part, order=1, fill=0.0) for values in (probability, near))
        return Slab(prior, image, band > 0.5)

    starts = range(int(lo[0]), int(hi[0]), depth)
    posterior = sharpened(lambda: (slab(z) for z in starts), trust)
    for z in starts:
        out[z : z + depth, lo[1] : hi[1], lo[2] : hi[2]][: hi[0] - z] = posterior(slab(z)) > 0.5
    return out
