"""`sam`: boxes, points or a previous mask on single slices and 2D images, by transformers' SamModel (weights of SAM or MedSAM)."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import WeightsError
from seerseg.prompts import Box2D, Point, Prompt
from seerseg.segmenters.base import Capabilities, ModelCard, RefiningSession, Segmentation, answered, refusal
from seerseg.segmenters.closed import split_source
from seerseg.segmenters.sam2_network import Found, Marks
from seerseg.segmenters.slices import (
    Grey,
    box_pixels,
    displayed,
    grey_scale,
    in_plane,
    mask_from_logits,
    mask_to_square,
    nearest_slice,
    point_pixels,
    read_window,
    slice_axis,
)
from seerseg.volume import Volume

Recipe = Literal["sam", "medsam"]
"""How a slice becomes the network's square image. "sam": aspect kept, longest side fitted, zeros right and below, ImageNet's mean and
deviation. "medsam": stretched to the square, least to greatest value to 0..1, nothing else. Weights know only their own."""
VERSION = "sam-1"
HUB = {"sam": "facebook/sam-vit-base", "medsam": "wanglab/medsam-vit-base"}
HELD_SLICES = 8
"""Image embeddings kept for the volume that was asked about last (4 MB each at SAM's size)."""


class SamLike(Protocol):
    """What the segmenter needs of a network; `SamNetwork` is the real one."""

    @property
    def size_px(self) -> int:
        """Side of the square image that it sees."""
        ...

    def encode(self, pixels: NDArray[np.float32]) -> Any:
        """Image (3, size, size) -> features."""
        ...

    def decode(self, features: Any, marks: Marks) -> Found:
        """Logits (h, w) of the square image for marks that may hold points, box corners (labels 2, 3) and a mask, all at once."""
        ...


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> SamSegmenter:
    """From a transformers folder or hub id; None: MedSAM's on the hub. A source with "medsam" in its name is fed as MedSAM is. Options
    may follow: ?window=centre,width&recipe=sam or medsam; UsageError for one that there is not."""
    place, given = split_source(str(source or ""), {"window": read_window, "recipe": _recipe}, "the segmenter sam")
    from seerseg.segmenters.sam2_weights import find, load_pretrained

    name = place or HUB["medsam"]
    folder = find(name, offline=offline)
    if folder.is_file():
        raise WeightsError(f"{folder} is an original checkpoint, and sam opens transformers folders; get MedSAM's as {HUB['medsam']}.")
    from transformers import SamModel

    loaded = load_pretrained(SamModel, folder, name=name, device=device, dtype=dtype, types=("sam",))
    recipe: Recipe = given.get("recipe", "medsam" if "medsam" in name.casefold() else "sam")
    identity, window = f"{loaded.identity}-{dtype or 'float32'}", given.get("window")
    return SamSegmenter(SamNetwork(loaded.model), recipe=recipe, identity=identity, source=str(folder), window=window)


def _recipe(value: str) -> str:
    if value.casefold() not in HUB:
        raise ValueError("write sam or medsam")
    return value.casefold()


@dataclass(frozen=True, eq=False)
class _Slice:
    """What is asked on one slice."""

    axis: int
    index: int
    boxes: tuple[Box2D, ...]
    points: tuple[Point, ...]
    mask: NDArray[np.bool_] | None


class SamSegmenter:
    """Boxes, points or a previous mask -> mask on the slices that they lie on, and on no other: nothing is carried through a volume.

    Every box is decoded by itself, with the points on its slice, and the masks are united. A previous mask is shown to the network
    where points or boxes lie on it, and kept elsewhere; alone, its largest slice is drawn anew. Points and 3D masks take slices across
    the only thin axis, else the widest spacing. An image embedding is made once for all prompts on a slice.
    """

    def __init__(
        self,
        network: SamLike,
        *,
        recipe: Recipe = "sam",
        identity: str = "unnamed",
        source: str = "",
        window: tuple[float, float] | None = None,
    ) -> None:
        self._network = network
        self._recipe = recipe
        self._window = window
        self._lock = threading.RLock()
        self._held: dict[tuple[str, int, int], Any] = {}
        self._card = ModelCard(
            "sam", f"{VERSION}-{identity}-{recipe}-{window}", "Apache-2.0", "Apache-2.0 (SAM and MedSAM)", source, f"Fed as {recipe} is."
        )

    @property
    def capabilities(self) -> Capabilities:
        """Boxes and points on slices, and a previous mask."""
        return Capabilities(box2d=True, points=True, previous_mask=True, session=True)

    @property
    def card(self) -> ModelCard:
        """Where the weights come from."""
        return self._card

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """One Segmentation per prompt, in order; see the class."""
        with self._lock:
            return [self._answer(volume, prompt) for prompt in prompts]

    def session(self, volume: Volume) -> RefiningSession:
        """A session in which every prompt refines the mask before it."""
        return RefiningSession(self, volume)

    def _answer(self, volume: Volume, prompt: Prompt) -> Segmentation:
        started = time.perf_counter()
        refused = refusal(self.card.name, self.capabilities, volume, prompt)
        if refused is not None:
            return refused
        message = ""
        if prompt.mask is not None and not prompt.mask.array.any() and not (prompt.boxes or any(p.positive for p in prompt.points)):
            message = "The previous mask is empty: give a mask with voxels, a box or a positive point."
        elif prompt.mask is None and not prompt.boxes and not any(p.positive for p in prompt.points):
            message = "Negative points alone do not say where the target is: add a positive point, a box or a mask."
        if message:
            return Segmentation(prompt, "unsupported", message=message, nearest=self.capabilities.kinds)
        out = np.zeros(volume.grid.shape_zyx, dtype=np.bool_)
        slices = _slices(volume, prompt)
        if prompt.mask is not None and (prompt.boxes or prompt.points):
            out |= prompt.mask.array
        for one in slices:
            view = np.moveaxis(out, one.axis, 0)
            view[one.index] = self._draw(volume, one)
        deep = {one.axis for one in slices if volume.grid.shape_zyx[one.axis] > 1}
        message = "The segmenter sam draws on the marked slice alone; medsam2 follows it through the volume." if deep else ""
        message = message if out.any() else "The network sees nothing there."
        return answered(volume, prompt, out, message=message, seconds=time.perf_counter() - started)

    def _draw(self, volume: Volume, one: _Slice) -> NDArray[np.bool_]:
        """The mask of one slice, in array order."""
        shape = in_plane(volume.grid.shape_zyx, one.axis)
        size = self._network.size_px
        fitted = _fitted(shape, size) if self._recipe == "sam" else (size, size)
        features = self._features(volume, one.axis, one.index, fitted)
        places = [point_pixels(in_plane(p.zyx, one.axis), shape, fitted) for p in one.points]
        labels = [int(p.positive) for p in one.points]
        shown = None if one.mask is None or not one.mask.any() else _padded(one.mask, fitted, size)
        boxes: list[tuple[float, ...]] = [box_pixels(box.lo, box.hi, shape, fitted) for box in one.boxes]
        if shown is not None and not boxes and not places:
            rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
            boxes = [(float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1]))]
        out = np.zeros(shape, dtype=np.bool_)
        for corners in [[(b[0], b[1]), (b[2], b[3])] for b in boxes] or [[]]:
            marks = Marks(
                np.array([*places, *corners], np.float32).reshape(-1, 2), np.array([*labels, *([2, 3] if corners else [])], np.int32), shown
            )
            logits = self._network.decode(features, marks).logits
            if fitted != (size, size):
                logits = _cropped(logits, fitted, size)
            out |= mask_from_logits(logits, (shape[0], shape[1]))
        return out

    def _features(self, volume: Volume, axis: int, index: int, fitted: tuple[int, int]) -> Any:
        key = (volume.content_hash, axis, index)
        if key not in self._held:
            while len(self._held) >= HELD_SLICES or any(other[0] != key[0] for other in self._held):
                del self._held[next(iter(self._held))]
            grey = grey_scale(volume, self._window)(volume.read_slice(axis, index))
            self._held[key] = self._network.encode(_pixels(grey, fitted, self._network.size_px, self._recipe))
        return self._held[key]


def _slices(volume: Volume, prompt: Prompt) -> list[_Slice]:
    """What the prompt asks, slice by slice, each once. Slices with nothing but negative points are asked only where there is a mask."""
    shape = volume.grid.shape_zyx
    asked: dict[tuple[int, int], list[Box2D]] = {}
    for box in prompt.boxes:
        if isinstance(box, Box2D):
            asked.setdefault((box.axis, box.index), []).append(box)
    mask = None if prompt.mask is None or not prompt.mask.array.any() else prompt.mask.array
    axis = next(iter(asked))[0] if asked else _mask_axis(mask, volume) if mask is not None else slice_axis(volume)
    if not asked and not prompt.points and mask is not None:
        counts = mask.sum(axis=tuple(i for i in range(3) if i != axis))
        asked[(axis, int(counts.argmax()))] = []
    points: dict[tuple[int, int], list[Point]] = {}
    for point in prompt.points:
        homes = [key for key in asked if nearest_slice(point.zyx[key[0]], shape[key[0]]) == key[1]]
        for key in homes or [(axis, nearest_slice(point.zyx[axis], shape[axis]))]:
            points.setdefault(key, []).append(point)
    made = []
    for key in dict.fromkeys([*asked, *points]):
        here, boxes = tuple(points.get(key, ())), tuple(asked.get(key, ()))
        before = None if mask is None else np.take(mask, key[1], axis=key[0])
        if boxes or any(p.positive for p in here) or (before is not None and before.any()):
            made.append(_Slice(*key, boxes, here, before))
    return made


def _mask_axis(mask: NDArray[np.bool_], volume: Volume) -> int:
    """The axis across which the mask lies on one slice, though the volume has more; else the usual one."""
    for axis in range(3):
        if mask.shape[axis] > 1 and np.count_nonzero(mask.any(axis=tuple(i for i in range(3) if i != axis))) == 1:
            return axis
    return slice_axis(volume)


def _fitted(shape: Sequence[int], size_px: int) -> tuple[int, int]:
    """Height and width in pixels of a slice whose longest side fills the square."""
    scale = size_px / max(shape)
    return max(1, int(shape[0] * scale + 0.5)), max(1, int(shape[1] * scale + 0.5))


def _pixels(grey: Grey, fitted: tuple[int, int], size_px: int, recipe: Recipe) -> NDArray[np.float32]:
    from PIL import Image

    how = Image.Resampling.BICUBIC if recipe == "medsam" else Image.Resampling.BILINEAR
    image = Image.fromarray(np.ascontiguousarray(displayed(grey))).resize(fitted[::-1], how)
    values = np.asarray(image, dtype=np.float32)
    out = np.zeros((3, size_px, size_px), dtype=np.float32)
    if recipe == "medsam":
        out[:] = (values - values.min()) / max(float(values.max() - values.min()), 1e-8)
        return out
    for channel, (mean, deviation) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        out[channel, : fitted[0], : fitted[1]] = (values / 255 - mean) / deviation
    return out


def _padded(mask: NDArray[np.bool_], fitted: tuple[int, int], size_px: int) -> NDArray[np.bool_]:
    """A mask on a slice (array order) in the square image."""
    if fitted == (size_px, size_px):
        return mask_to_square(mask, size_px)
    whole = mask_to_square(mask, size_px)
    rows, columns = (np.minimum(((np.arange(n) + 0.5) * size_px / n).astype(int), size_px - 1) for n in fitted)
    out = np.zeros((size_px, size_px), dtype=np.bool_)
    out[: fitted[0], : fitted[1]] = whole[np.ix_(rows, columns)]
    return out


def _cropped(logits: NDArray[np.float32], fitted: tuple[int, int], size_px: int) -> NDArray[np.float32]:
    """Logits of the square without its padding, at the network's input size, as SAM's own post-processing does."""
    import torch
    from torch.nn.functional import interpolate

    whole = interpolate(
        torch.from_numpy(np.ascontiguousarray(logits))[None, None], size=(size_px, size_px), mode="bilinear", align_corners=False
    )
    return np.asarray(whole[0, 0, : fitted[0], : fitted[1]].numpy())


class SamNetwork:
    """transformers' `SamModel`. `encoded` counts the images that went through its encoder."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoded = 0

    @property
    def size_px(self) -> int:
        """1024 for SAM."""
        return int(self.model.config.vision_config.image_size)

    def encode(self, pixels: NDArray[np.float32]) -> Any:
        """The image embedding (1, 256, 64, 64) at SAM's size."""
        import torch

        parameter = next(self.model.parameters())
        self.encoded += 1
        with torch.inference_mode():
            return self.model.get_image_embeddings(torch.from_numpy(pixels)[None].to(parameter.device, parameter.dtype))

    def decode(self, features: Any, marks: Marks) -> Found:
        """One mask; for a single click the best of SAM's three by its own estimate."""
        import torch
        from torch.nn.functional import interpolate

        given: dict[str, Any] = {}
        corner = marks.labels >= 2
        device, dtype = features.device, features.dtype
        if corner.any():
            given["input_boxes"] = torch.from_numpy(marks.points[corner].reshape(1, 1, 4)).to(device)
        if (~corner).any():
            given["input_points"] = torch.from_numpy(marks.points[~corner][None, None]).to(device)
            given["input_labels"] = torch.from_numpy(marks.labels[~corner][None, None]).to(device)
        if marks.mask is not None:
            side = 4 * int(self.model.config.prompt_encoder_config.image_embedding_size)
            logits = torch.from_numpy(marks.mask.astype(np.float32) * 20 - 10)[None, None]
            given["input_masks"] = interpolate(logits, size=(side, side), mode="bilinear", antialias=True).to(device, dtype)
        several = len(marks.labels) == 1 and marks.mask is None
        with torch.inference_mode():
            out = self.model(image_embeddings=features, multimask_output=several, **given)
        best = int(out.iou_scores[0, 0].argmax())
        return Found(out.pred_masks[0, 0, best].float().cpu().numpy(), float(out.iou_scores[0, 0, best]))
