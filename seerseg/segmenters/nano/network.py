"""The nano network: a residual 3D U-Net, a character-level text encoder, and prompts as dot products with a pyramid of features.

An image is encoded once; a prompt costs four 1x1x1 products. With decoder features D_k at 1/2^k of the resolution and text queries q_k, the
logit of a voxel is the sum over k of upsample(q_k . D_k) / sqrt(C_k), plus a term linear in its place in the body. A second head scores
whether the target is present.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 16
"""Every side of an input must be a multiple of this."""
IMAGE_CHANNELS = 5
"""Wide window, narrow window, and x, y, z relative to the body box."""
SIDES = 4
CONDITIONS = 8
"""log spacing (1), log extent of the body box z, y, x (3), CT, MR, unknown modality (3), a constant (1)."""


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of the network; saved in config.json and read back."""

    channels: tuple[int, ...] = (16, 32, 64, 96, 128)
    text_width: int = 128
    char_width: int = 48
    gram_width: int = 96
    gram_buckets: int = 4096
    text_length: int = 64

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NanoConfig:
        """TypeError for an unknown or missing field."""
        return cls(**{**data, "channels": tuple(data["channels"])})


# ---------------------------------------------------------------------------------------------------------------- text

_SIDES = {
    "left": 1, "lt": 1, "l": 1, "lft": 1, "lhs": 1, "sinister": 1, "sin": 1,
    "right": 2, "rt": 2, "r": 2, "rgt": 2, "rhs": 2, "rght": 2, "dexter": 2, "dex": 2, "dx": 2,
    "both": 3, "bilateral": 3, "bilat": 3,
}  # fmt: skip


def normalise(text: str) -> str:
    """Lower case, accents removed, everything but letters and digits a single space."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", " ", plain).strip()


def side_of(text: str) -> int:
    """0 no side named, 1 left, 2 right, 3 both. Reads words and abbreviations, and left/right with one slip of a letter."""
    found = set()
    for word in normalise(text).split():
        if word in _SIDES:
            found.add(_SIDES[word])
        elif len(word) >= 4:
            found.update(value for name, value in (("left", 1), ("right", 2)) if _one_slip(word, name))
    if len(found) == 1:
        return found.pop()
    return 3 if found else 0


def _one_slip(word: str, name: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours turns `word` into `name`, the first letter kept."""
    if word[0] != name[0] or abs(len(word) - len(name)) > 1:
        return False
    if len(word) == len(name):
        off = [i for i, (a, b) in enumerate(zip(word, name, strict=True)) if a != b]
        if len(off) == 2 and off[1] == off[0] + 1:
            return word[off[0]] == name[off[1]] and word[off[1]] == name[off[0]]
        return len(off) == 1 and word not in ("lift", "loft", "light", "night", "lent", "lest")
    short, long = sorted((word, name), key=len)
    return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def grams(text: str, buckets: int) -> list[int]:
    """Hashed character n-grams (1 to 4, within words marked by < and >) and whole words; crc32, so the same everywhere."""
    out = []
    for word in normalise(text).split():
        marked = f"<{word}>"
        out.append(zlib.crc32(b"w" + word.encode()) % buckets)
        for n in (2, 3, 4):
            out.extend(zlib.crc32(marked[i : i + n].encode()) % buckets for i in range(len(marked) - n + 1))
    return out or [0]


class TextEncoder(nn.Module):
    """Strings -> (B, text_width + 4). Any string can be embedded; the empty one too.

    The first text_width values have the length sqrt(text_width); the last four say which side is named: none, left, right, both.
    """

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.gram = nn.EmbeddingBag(config.gram_buckets, config.gram_width, mode="mean")
        self.char = nn.Embedding(40, config.char_width // 2)
        self.conv1 = nn.Conv1d(config.char_width // 2, config.char_width, 5, padding=2)
        self.conv2 = nn.Conv1d(config.char_width, config.char_width, 5, padding=2, dilation=1)
        self.side = nn.Embedding(4, 16)
        width = config.gram_width + 2 * config.char_width + 16
        self.mix = nn.Sequential(nn.Linear(width, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU(), nn.Linear(192, config.text_width))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """See the class."""
        length, buckets = self.config.text_length, self.config.gram_buckets
        device = self.side.weight.device
        bags = [grams(text, buckets) for text in texts]
        offsets = torch.tensor([0, *[len(b) for b in bags[:-1]]], device=device).cumsum(0)
        bag = self.gram(torch.tensor([i for b in bags for i in b], device=device), offsets)
        codes = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in enumerate(texts):
            for column, letter in enumerate(normalise(text)[:length]):
                codes[row, column] = 1 if letter == " " else ord(letter) - 95 if letter.isalpha() else ord(letter) - 20
        mask = (codes > 0).to(device).unsqueeze(1)
        h = F.relu(self.conv1(self.char(codes.to(device)).transpose(1, 2) * mask)) * mask
        h = F.relu(self.conv2(h)) * mask
        pooled = torch.cat([h.amax(2), h.sum(2) / mask.sum(2).clamp(min=1)], 1)
        named = torch.tensor([side_of(text) for text in texts], device=device)
        out: Tensor = self.mix(torch.cat([bag, pooled, self.side(named)], 1))
        return torch.cat([F.normalize(out, dim=1) * math.sqrt(self.config.text_width), F.one_hot(named, SIDES)], 1)


# --------------------------------------------------------------------------------------------------------------- image


class _Conv(nn.Module):
    """3x3x3 convolution, group normalisation (groups of 8 channels), leaky ReLU."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(outside // 8, outside)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.01, inplace=True)


class _Residual(nn.Module):
    """x + conv(x), optionally with an added (B, C) condition before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = _Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class ImageEncoder(nn.Module):
    """(B, 5, Z, Y, X) and conditions (B, 8) -> decoder features at 1, 1/2, 1/4, 1/8 and the bottleneck's mean (B, C)."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        c = config.channels
        self.stem = _Conv(IMAGE_CHANNELS, c[0])
        self.down = nn.ModuleList(_Conv(c[i], c[i + 1], stride=2) for i in range(4))
        self.encode = nn.ModuleList(_Residual(c[i]) for i in range(1, 5))
        self.deep = _Residual(c[4])
        self.condition = nn.ModuleList(nn.Linear(CONDITIONS, c[i]) for i in range(5))
        self.lateral = nn.ModuleList(nn.Conv3d(c[i + 1], c[i], 1) for i in range(4))
        self.decode = nn.ModuleList(_Conv(c[i], c[i]) for i in range(4))

    def forward(self, image: Tensor, conditions: Tensor) -> tuple[list[Tensor], Tensor]:
        """See the class."""
        skips = []
        x = self.stem(image)
        for i in range(5):
            if i:
                x = self.down[i - 1](x)
            x = x + self.condition[i](conditions)[:, :, None, None, None]
            if i:
                x = self.encode[i - 1](x)
            skips.append(x)
        x = self.deep(x)
        pooled = x.mean((2, 3, 4))
        features: list[Tensor] = []
        for i in (3, 2, 1, 0):
            up = F.interpolate(self.lateral[i](x), scale_factor=2, mode="trilinear", align_corners=False)
            x = self.decode[i](skips[i] + up)
            if i:
                x = x + skips[i]
            features.insert(0, x)
        return features, pooled


class NanoNetwork(nn.Module):
    """The whole: `text`, `image`, and `decode`, which joins the two."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        c, t = config.channels, config.text_width + SIDES
        self.text = TextEncoder(config)
        self.image = ImageEncoder(config)
        self.query = nn.ModuleList(nn.Linear(t, c[i]) for i in range(4))
        self.offset = nn.Linear(t, 1)
        self.place = nn.Linear(t, 3)
        self.scene = nn.Linear(c[4], t)
        self.seen = nn.Linear(c[4], t)
        self.presence = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 1))
        with torch.no_grad():  # what is called left begins as what lies at low x, for every structure alike
            self.place.weight.zero_()
            self.place.bias.zero_()
            self.place.weight[0, -3], self.place.weight[0, -2] = -4.0, 4.0
            for query in self.query:
                query.weight[:, -2] = -query.weight[:, -3]

    def decode(
        self, features: list[Tensor], pooled: Tensor, coordinates: Tensor, embedded: Tensor, finest: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One image: features[k] (1, C_k, ...), pooled (1, C), coordinates x, y, z (1, 3, Z, Y, X) of the input, embedded (P, T) ->
        logits (P, Z, Y, X), presence logits (P,). finest: stop at features[finest], for training at a lower resolution."""
        logits: Tensor | None = None
        for k in range(3, finest - 1, -1):
            width = features[k].shape[1]
            query = self.query[k](embedded) / math.sqrt(width)
            level = F.conv3d(features[k], query[:, :, None, None, None])
            if logits is not None:
                level = level + F.interpolate(logits, scale_factor=2, mode="trilinear", align_corners=False)
            logits = level
        assert logits is not None
        if finest:
            coordinates = F.avg_pool3d(coordinates, 2**finest)
        logits = (logits + F.conv3d(coordinates, self.place(embedded)[:, :, None, None, None]))[0] + self.offset(embedded)[:, :, None, None]
        flat = F.avg_pool3d(logits.detach()[None], 2)[0].flatten(1)
        top = flat.topk(min(32, flat.shape[1]), dim=1).values
        scale = math.sqrt(embedded.shape[1])
        clues = torch.stack(
            [
                top[:, 0] / 4,
                top.mean(1) / 4,
                torch.sigmoid(flat).mean(1) * 10,
                (embedded * self.scene(pooled)).sum(1) / scale,
                (embedded * torch.tanh(self.seen(pooled))).sum(1) / scale,
            ],
            dim=1,
        )
        return logits, self.presence(clues)[:, 0]

    def forward(self, image: Tensor, conditions: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """One image (1, 5, Z, Y, X), conditions (1, 8), P texts -> logits (P, Z, Y, X), presence logits (P,)."""
        features, pooled = self.image(image, conditions)
        return self.decode(features, pooled, image[:, 2:], self.text(texts))
