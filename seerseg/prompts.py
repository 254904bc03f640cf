"""What a segmenter can be given: words, a class name, boxes, points, a previous mask.

Everything spatial is in voxel coordinates (z, y, x) of the case's own canonical grid. Voxel i spans [i - 1/2, i + 1/2);
box edges are half-open voxel indices, so a box `lo=2, hi=5` covers voxels 2, 3 and 4 and its edges lie at 1.5 and 4.5.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seerseg.errors import SegmenterError
from seerseg.volume import Grid, Mask


@dataclass(frozen=True)
class Box2D:
    """A box on one slice: `axis` 0 (z), 1 (y) or 2 (x) and `index` name the slice; `lo`, `hi` are half-open voxel edges
    along the two other axes in array order (axis 0: (y, x); axis 1: (z, x); axis 2: (z, y))."""

    axis: int
    index: int
    lo: tuple[float, float]
    hi: tuple[float, float]


@dataclass(frozen=True)
class Box3D:
    """A box (z, y, x), half-open voxel edges."""

    lo: tuple[float, float, float]
    hi: tuple[float, float, float]


def box_voxels(lo: Sequence[float], hi: Sequence[float], sizes: Sequence[int]) -> tuple[slice, ...]:
    """Along each axis, the voxels of 0..size whose centres (i + 1/2 in edge numbers) lie from lo to hi; at least the nearest one."""
    spans = []
    for low, high, size in zip(lo, hi, sizes, strict=True):
        first = min(max(math.ceil(low - 0.5), 0), size)
        last = min(max(math.floor(high - 0.5) + 1, 0), size)
        if first >= last:
            first = min(max(math.floor((low + high) / 2), 0), size - 1)
            last = first + 1
        spans.append(slice(first, last))
    return tuple(spans)


@dataclass(frozen=True)
class Point:
    """A click at voxel coordinates (z, y, x): positive (inside the target) or negative."""

    zyx: tuple[float, float, float]
    positive: bool = True


@dataclass(frozen=True, eq=False)
class Prompt:
    """One target, asked for in any combination of ways. An empty prompt is a mistake, not an empty mask."""

    text: str | None = None
    class_name: str | None = None
    boxes: tuple[Box2D | Box3D, ...] = ()
    points: tuple[Point, ...] = ()
    mask: Mask | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """Which of "text", "class", "box2d", "box3d", "points", "mask" this prompt uses."""
        kinds = set()
        if self.text is not None and self.text.strip():
            kinds.add("text")
        if self.class_name:
            kinds.add("class")
        kinds.update("box2d" if isinstance(box, Box2D) else "box3d" for box in self.boxes)
        if self.points:
            kinds.add("points")
        if self.mask is not None:
            kinds.add("mask")
        return frozenset(kinds)

    def check(self, grid: Grid) -> None:
        """SegmenterError when the prompt is empty or lies outside the grid (nothing is clipped silently)."""
        if not self.kinds:
            raise SegmenterError("The prompt is empty: give it a text, a class name, a box, a point or a mask.")
        shape = grid.shape_zyx
        for box in self.boxes:
            if isinstance(box, Box2D):
                if box.axis not in (0, 1, 2) or not 0 <= box.index < shape[box.axis]:
                    raise SegmenterError(f"The box lies on slice {box.index} of axis {box.axis}, but the scan has shape (z, y, x) {shape}.")
                sizes = tuple(n for i, n in enumerate(shape) if i != box.axis)
            else:
                sizes = shape
            for lo, hi, n in zip(box.lo, box.hi, sizes, strict=True):
                if not (np.isfinite([lo, hi]).all() and lo < hi and hi > 0 and lo < n):
                    raise SegmenterError(f"The box from {box.lo} to {box.hi} holds no voxel of a scan of shape (z, y, x) {shape}.")
        for point in self.points:
            if not all(-0.5 <= v < n - 0.5 for v, n in zip(point.zyx, shape, strict=True)):
                raise SegmenterError(f"The point {point.zyx} lies outside the scan of shape (z, y, x) {shape}.")
        if self.mask is not None and not self.mask.grid.close_to(grid):
            raise SegmenterError("The previous mask lies on another grid than the scan.")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; a mask is given by its hash alone."""
        return {
            "text": self.text,
            "class": self.class_name,
            "boxes": [
                {"axis": int(b.axis), "index": int(b.index), "lo": [float(v) for v in b.lo], "hi": [float(v) for v in b.hi]}
                if isinstance(b, Box2D)
                else {"lo": [float(v) for v in b.lo], "hi": [float(v) for v in b.hi]}
                for b in self.boxes
            ],
            "points": [{"zyx": [float(v) for v in p.zyx], "positive": bool(p.positive)} for p in self.points],
            "mask": None if self.mask is None else hashlib.blake2b(np.packbits(self.mask.array).tobytes(), digest_size=16).hexdigest(),
        }

    @property
    def key(self) -> str:
        """Hex digest: equal prompts have equal keys (for the cache)."""
        return hashlib.blake2b(json.dumps(self.to_json(), sort_keys=True).encode(), digest_size=16).hexdigest()

    @classmethod
    def from_json(cls, value: Any) -> Prompt | None:
        """What `to_json` wrote, without the mask; None for anything else."""
        try:
            boxes = [
                Box2D(int(b["axis"]), int(b["index"]), _numbers(b["lo"], 2), _numbers(b["hi"], 2))
                if "axis" in b
                else Box3D(_numbers(b["lo"], 3), _numbers(b["hi"], 3))
                for b in value["boxes"]
            ]
            points = [Point(_numbers(p["zyx"], 3), bool(p["positive"])) for p in value["points"]]
            text, name = value["text"], value["class"]
        except (TypeError, ValueError, KeyError, AttributeError):
            return None
        said = [None if word is None else str(word) for word in (text, name)]
        return cls(said[0], said[1], tuple(boxes), tuple(points))


def _numbers(value: Any, count: int) -> Any:
    found = tuple(float(v) for v in value)
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"{value!r} is not {count} numbers")
    return found
