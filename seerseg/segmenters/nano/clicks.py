"""The click network: a small 3D U-Net that draws any one structure from boxes, clicks and the mask before, on a crop.

It looks through the frozen eyes of the text network (`ImageEncoder`), so an image is encoded once for words and clicks alike; what it
adds are four prompt channels, two maps of how like the prompted place each voxel looks, a map of the known name that fits the prompts
best (`Concepts`), and its own decoder. It is told no names: the same weights serve every structure, also those that no name fits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from seerseg.errors import WeightsError
from seerseg.prompts import Box2D, Box3D, Point
from seerseg.segmenters.nano.network import NanoNetwork
from seerseg.volume import Grid

Float32 = NDArray[np.float32]

PROMPT_CHANNELS = 4
"""Positive clicks, negative clicks, boxes, previous mask."""
WINDOWS = 2
"""The first channels of an encoder's input: a wide and a narrow intensity window."""
LIKENESS = 2
"""Maps of likeness: at full resolution, and at a half and a quarter of it together."""
LEAST_FIT = 0.25
CLUES = LIKENESS + 1
CLICK_VOXELS = 1.5
"""Standard deviation of a click's blob, voxels of the crop."""
SCHEMA = 1
KIND = "nano_clicks"


@dataclass(frozen=True)
class ClickConfig:
    """Sizes of the network; saved in config.json and read back. features: channels of the encoder's levels."""

    channels: tuple[int, ...] = (8, 24, 48, 64)
    features: tuple[int, ...] = (16, 32, 64, 96)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClickConfig:
        """TypeError for an unknown field."""
        return cls(**{name: tuple(int(v) for v in values) for name, values in data.items()})


class _Conv(nn.Module):
    """3x3x3 convolution, group normalisation (groups of 8 channels), leaky ReLU."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(outside // 8, outside)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """more: added before the normalisation."""
        x = self.conv(x)
        return F.leaky_relu(self.norm(x if more is None else x + more), 0.01)


class ClickNetwork(nn.Module):
    """See the module. Sides of the input must be multiples of 8 (of 16 for the encoder)."""

    def __init__(self, config: ClickConfig) -> None:
        super().__init__()
        self.config = config
        c, f = config.channels, config.features
        self.even = nn.ModuleList(nn.GroupNorm(width // 8, width, affine=False) for width in f)
        self.seen = nn.ModuleList(nn.Conv3d(f[k], c[k], 1) for k in range(4))
        self.stem = _Conv(WINDOWS + PROMPT_CHANNELS + CLUES, c[0])
        self.down = nn.ModuleList(_Conv(c[k], c[k + 1], stride=2) for k in range(3))
        self.encode = nn.ModuleList(_Conv(c[k], c[k]) for k in (1, 2, 3))
        self.deep = _Conv(c[3], c[3])
        self.lateral = nn.ModuleList(nn.Conv3d(c[k + 1], c[k], 1) for k in range(3))
        self.decode = nn.ModuleList(_Conv(c[k], c[k]) for k in range(3))
        self.out = nn.Conv3d(c[0] + PROMPT_CHANNELS + CLUES, 1, 1)

    def sight(self, features: list[Tensor]) -> list[Tensor]:
        """What the network takes from the encoder's features (B, C_k, ...) at 1/2^k: the same for every prompt on the crop. No weights."""
        return [even(x) for even, x in zip(self.even, features, strict=True)]

    def forward(self, windows: Tensor, sight: list[Tensor], prompts: Tensor, concept: Tensor) -> Tensor:
        """windows (B, 2, Z, Y, X), sight of the same crops, prompts (B, 4, Z, Y, X), concept (B, 1, Z, Y, X) as `Concepts.best` gives it ->
        logits (B, Z, Y, X)."""
        prompts = torch.cat([prompts, likeness(sight, prompts), concept], 1)
        x = self.stem(torch.cat([windows, prompts], 1), self.seen[0](sight[0]))
        kept = [x]
        for k in range(3):
            x = self.down[k](x, self.seen[k + 1](sight[k + 1]))
            x = x + self.encode[k](x)
            kept.append(x)
        x = x + self.deep(x)
        for k in (2, 1, 0):
            x = kept[k] + self.decode[k](kept[k] + F.interpolate(self.lateral[k](x), scale_factor=2, mode="trilinear", align_corners=False))
        out: Tensor = self.out(torch.cat([x, prompts], 1))[:, 0]
        return out


@torch.no_grad()
def likeness(sight: list[Tensor], prompts: Tensor) -> Tensor:
    """(B, 2, Z, Y, X): where each voxel's features lie between those outside (about -1) and those inside (about 1) of what is prompted: the
    mask before, else the boxes, and the positive clicks, without the negative ones."""
    before, box = prompts[:, 3:4], prompts[:, 2:3]
    known = before.flatten(1).amax(1).view(-1, 1, 1, 1, 1) > 0
    inside = torch.where(known, before, box).clamp(min=0)
    inside = torch.maximum(inside, prompts[:, 0:1]) * (1 - prompts[:, 1:2])
    out: list[Tensor] = []
    for k in range(3):
        share = F.avg_pool3d(inside, 2**k) if k else inside
        x = sight[k]
        total = share.sum((2, 3, 4), keepdim=True).clamp(min=1e-3)
        rest = (1 - share).sum((2, 3, 4), keepdim=True).clamp(min=1e-3)
        within = (x * share).sum((2, 3, 4), keepdim=True)
        without = (x.sum((2, 3, 4), keepdim=True) - within) / rest
        within = within / total
        way = within - without
        line = ((x - (within + without) / 2) * way).sum(1, keepdim=True) / (way.square().sum(1, keepdim=True) / 2).clamp(min=1e-3)
        line = line.clamp(-3, 3)
        out.append(F.interpolate(line, scale_factor=2**k, mode="trilinear", align_corners=False) if k else line)
    return torch.cat([out[0], 0.5 * (out[1] + out[2])], 1)


class Concepts:
    """What each of the names that the text network knows looks like on one crop, so that what is pointed at may be recognised."""

    def __init__(self, network: NanoNetwork, features: list[Tensor], pooled: Tensor, coordinates: Tensor, table: Tensor) -> None:
        """features, pooled, coordinates of one crop, as `NanoNetwork.decode` takes them; table (P, T): the names, embedded."""
        self._network, self.seen, self._table = network, (features, pooled, coordinates), table
        with torch.no_grad():
            self.half = torch.sigmoid(network.decode(*self.seen, table, finest=1)[0]) if len(table) else coordinates.new_zeros(0)
            """Probabilities at half resolution, (P, Z/2, Y/2, X/2)."""

    @torch.no_grad()
    def best(self, prompts: Tensor, usable: Tensor | None = None) -> Tensor:
        """(1, Z, Y, X): logits of the name that fits the prompts (4, Z, Y, X) best, a third of them, within -2..2, times its fit 0..1;
        0 everywhere when no name fits. usable (P,): which names may be taken."""
        nothing = torch.zeros_like(prompts[:1])
        if not len(self._table) or (usable is not None and not usable.any()):
            return nothing
        fits = self._fits(F.avg_pool3d(prompts, 2))
        if usable is not None:
            fits = fits * usable
        index = int(fits.argmax())
        if float(fits[index]) < LEAST_FIT:
            return nothing
        logits, _ = self._network.decode(*self.seen, self._table[index : index + 1])
        return (logits / 3).clamp(-2, 2) * fits[index]

    def _fits(self, prompts: Tensor) -> Tensor:
        """(P,): overlap with the mask before, or with the boxes where they speak if that is larger; lowered by clicks on the wrong side."""
        p = self.half
        positive, negative, box, before = prompts
        overlaps = []
        for known, evidence in ((box.abs().clamp(max=1), box), (torch.ones_like(before), before)):
            if evidence.max() > 0:
                inside = evidence.clamp(min=0)
                overlaps.append(2 * (p * inside).sum((1, 2, 3)) / ((p * known).sum((1, 2, 3)) + inside.sum()).clamp(min=1e-3))
        fit = torch.stack(overlaps).amax(0) if overlaps else 0.7 - 0.5 * p.mean((1, 2, 3)) ** (1 / 3)  # a click alone: rather the smaller
        for clicks, wanted in ((positive, p), (negative, 1 - p)):
            if clicks.max() > 0:
                fit = fit * (0.25 + 0.75 * (wanted * clicks).sum((1, 2, 3)) / clicks.sum())
        return fit


# ------------------------------------------------------------------------------------------------------------- prompt channels


def prompt_channels(
    crop: Grid, source: Grid, *, boxes: tuple[Box2D | Box3D, ...], points: tuple[Point, ...], before: Float32 | None
) -> Tensor:
    """(4, Z, Y, X) on `crop` for prompts in voxel coordinates of `source`.

    Clicks: blobs of height 1. Boxes: +1 inside, -1 where a box says that the target is not (outside a Box3D; outside a Box2D on its
    slice), else 0. before: probability 0..1 of the mask before on the crop (Z, Y, X), as -1..1; 0 everywhere without one.
    """
    out = np.zeros((PROMPT_CHANNELS, *crop.shape_zyx), dtype=np.float32)
    axes = np.ogrid[tuple(slice(0, n) for n in crop.shape_zyx)]
    for point in points:
        centre = crop.to_voxel(source.to_world(np.array(point.zyx, dtype=np.float64)))
        centre = np.clip(centre, 0, np.array(crop.shape_zyx) - 1)
        lines = [np.exp(-((a - c) ** 2) / (2 * CLICK_VOXELS**2)) for a, c in zip(axes, centre, strict=True)]
        np.maximum(out[0 if point.positive else 1], lines[0] * lines[1] * lines[2], out=out[0 if point.positive else 1])
    if boxes:
        inside, outside = _box_regions(crop, source, boxes)
        out[2] = np.where(inside, 1.0, np.where(outside, -1.0, 0.0))
    if before is not None:
        out[3] = 2 * before - 1
    return torch.from_numpy(out)


def _box_regions(crop: Grid, source: Grid, boxes: tuple[Box2D | Box3D, ...]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Voxels of the crop inside any box, and those that any box excludes."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in crop.shape_zyx), indexing="ij"), -1).reshape(-1, 3)
    where = source.to_voxel(crop.to_world(index)).T.reshape(3, *crop.shape_zyx)
    inside, outside = np.zeros((2, *crop.shape_zyx), dtype=np.bool_)
    step = [crop.spacing_zyx[0] / s for s in source.spacing_zyx]
    for box in boxes:
        axes_of = [a for a in range(3) if not isinstance(box, Box2D) or a != box.axis]
        spans = dict(zip(axes_of, zip(box.lo, box.hi, strict=True), strict=True))
        within = np.ones(crop.shape_zyx, dtype=np.bool_)
        for axis, (lo, hi) in spans.items():
            least = max(0.0, (step[axis] - (hi - lo)) / 2)  # a box thinner than the crop's voxels still marks one of them
            within &= (where[axis] >= lo - 0.5 - least) & (where[axis] < hi - 0.5 + least)
        reach = np.ones(crop.shape_zyx, dtype=np.bool_)
        if isinstance(box, Box2D):
            reach = np.abs(where[box.axis] - box.index) <= max(0.5, 0.5 * step[box.axis]) + 1e-3  # halfway between voxels of the crop: both
        inside |= within & reach
        outside |= reach & ~within
    return inside, outside


# --------------------------------------------------------------------------------------------------------------------- weights


def encoder_digest(network: NanoNetwork) -> str:
    """Hex digest of the weights that a click network looks through, as float16 (how they are shipped)."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.half().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_clicks(folder: Path, encoder: str) -> tuple[ClickNetwork, str] | None:
    """The network of a folder with model.safetensors and config.json, and the digest of its weights; None when there is no such folder or
    it was trained on an encoder of another digest than `encoder`. WeightsError when the files are damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        blob = (folder / "model.safetensors").read_bytes()
        if config["schema"] != SCHEMA or config["kind"] != KIND:
            raise WeightsError(f"{path} is of another version than this seerseg reads (schema {SCHEMA}); install matching weights.")
        if config["encoder"] != encoder:
            return None
        network = ClickNetwork(ClickConfig.from_json(config["network"]))
        network.load_state_dict({name: value.float() for name, value in load_tensors(blob).items()}, strict=True)
    except OSError as fault:
        raise WeightsError(
            f"The weights {folder / 'model.safetensors'} cannot be read ({fault.strerror}); install seerseg again."
        ) from fault
    except (SafetensorError, RuntimeError, TypeError, KeyError, ValueError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise WeightsError(f"The click network in {folder} is damaged ({reason}); install seerseg again.") from fault
    if not all(torch.isfinite(p).all() for p in network.parameters()):
        raise WeightsError(f"{folder / 'model.safetensors'} holds values that are not finite; copy it again.")
    return network, hashlib.blake2b(blob, digest_size=6).hexdigest()
