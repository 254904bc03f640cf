"""SAM2 as `medsam2` needs it: images become features, an object is marked on slices, and followed from one slice to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_CLAMP = 32.0
"""Bounds of earlier logits that are shown to the network with new clicks, as in SAM2."""


@dataclass(frozen=True, eq=False)
class Marks:
    """What a person or a reasoner marked on one slice, in pixels of the network's square image. points: (N, 2) x, y; labels: (N,) with
    1 inside, 0 outside, 2 and 3 the first and last corner of a box; mask: (size, size) bool, which replaces both."""

    points: NDArray[np.float32]
    labels: NDArray[np.int32]
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """An object on one slice. logits: (h, w) float32 of the square image; score: above 0 when the object is there."""

    logits: NDArray[np.float32]
    score: float

    @property
    def there(self) -> bool:
        """Whether anything of it is on the slice."""
        return self.score > 0 and bool((self.logits > 0).any())


class Track(Protocol):
    """The memory of one object in one direction along the slices."""

    def mark(self, index: int, features: Any, marks: Marks, *, previous: Found | None, conditioned: bool) -> Found:
        """Take the marks on a slice into memory for good. previous: the object there so far; conditioned: look at memory too."""
        ...

    def follow(self, index: int, features: Any, *, reverse: bool) -> Found:
        """The object on the next slice."""
        ...

    def copy(self) -> Track:
        """A twin with the marked slices; what was followed is forgotten."""
        ...

    def adopt(self, other: Track, index: int) -> None:
        """Take a marked slice over from another track of the same object."""
        ...


class Network(Protocol):
    """What the segmenter needs of a network; `Sam2Network` is the real one."""

    @property
    def size_px(self) -> int:
        """Side of the square image that it sees."""
        ...

    def encode(self, image: NDArray[np.uint8]) -> tuple[Any, int]:
        """Image (size, size) -> features and how many bytes they take."""
        ...

    def track(self, depth: int) -> Track:
        """The memory of a new object in a film of that many slices."""
        ...


class Sam2Network:
    """transformers' `Sam2VideoModel`, fed slice by slice. `encoded` counts the images that went through its encoder."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoded = 0
        self._positions: list[Any] = []
        self.memory_positions: Any = None
        """The same for every slice, so it is held once."""

    @property
    def size_px(self) -> int:
        """512 for MedSAM2."""
        return int(self.model.config.image_size)

    def encode(self, image: NDArray[np.uint8]) -> tuple[Any, int]:
        """Grey three times, ImageNet's mean and deviation, the image encoder."""
        import torch

        mean, deviation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        parameter = next(self.model.parameters())
        grey = torch.from_numpy(np.array(image, dtype=np.float32) / np.float32(255)).to(parameter.device)
        pixels = torch.stack([(grey - m) / d for m, d in zip(mean, deviation, strict=True)])[None].to(parameter.dtype)
        with torch.inference_mode():
            out = self.model.get_image_features(pixels, return_dict=True)
        self.encoded += 1
        self._positions = self._positions or list(out.fpn_position_encoding)
        levels = list(out.fpn_hidden_states)
        return levels, sum(level.numel() * level.element_size() for level in levels)

    def supply(self, levels: Any) -> dict[str, Any]:
        """Features as transformers' session hands them to the model."""
        return {"vision_feats": levels, "vision_pos_embeds": self._positions}

    def track(self, depth: int) -> Sam2Track:
        """An inference session of one object."""
        return Sam2Track(self, depth)


class Sam2Track:
    """One object in one direction: transformers' inference session holding what the memory needs, and no images."""

    def __init__(self, network: Sam2Network, depth: int) -> None:
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        parameter = next(network.model.parameters())
        size = network.size_px
        session = Sam2VideoInferenceSession(
            video_height=size, video_width=size, inference_device=parameter.device, inference_state_device=parameter.device
        )
        session.dtype = parameter.dtype
        session.processed_frames = dict.fromkeys(range(depth))  # the number of frames is read from it; images come as features
        session.cache = self
        session.obj_id_to_idx(1)
        self._network, self._session, self._depth = network, session, depth
        self._features: Any = None
        config = network.model.config
        self._reach = max(int(config.num_maskmem), int(config.max_object_pointers_in_encoder))
        self._dense_reach = int(config.num_maskmem)

    def get_vision_features(self, frame_idx: int) -> dict[str, Any]:
        """What the model asks its session's cache for."""
        del frame_idx
        return self._network.supply(self._features)

    def mark(self, index: int, features: Any, marks: Marks, *, previous: Found | None, conditioned: bool) -> Found:
        """See `Track`."""
        import torch

        session = self._session
        device = session.inference_device
        points: dict[str, Any] | None = None
        mask = None
        if marks.mask is not None:
            mask = torch.from_numpy(marks.mask.astype(np.float32))[None, None].to(device, session.dtype)
        else:
            points = {
                "point_coords": torch.from_numpy(marks.points)[None, None].to(device),
                "point_labels": torch.from_numpy(marks.labels)[None, None].to(device),
            }
        before = None
        if previous is not None and marks.mask is None:
            before = torch.from_numpy(previous.logits)[None, None].clamp(-_CLAMP, _CLAMP).to(device, session.dtype)
        reverse = all(other > index for other in session.output_dict_per_obj[0]["cond_frame_outputs"])
        return self._step(index, features, points=points, mask=mask, previous=before, first=not conditioned, reverse=reverse)

    def follow(self, index: int, features: Any, *, reverse: bool) -> Found:
        """See `Track`; memory that is out of reach is dropped."""
        found = self._step(index, features, points=None, mask=None, previous=None, first=False, reverse=reverse)
        held = self._session.output_dict_per_obj[0]["non_cond_frame_outputs"]
        for other in [i for i in held if abs(i - index) >= self._dense_reach]:
            held[other].pop("maskmem_features", None)
            if abs(other - index) >= self._reach:
                del held[other]
        return found

    def copy(self) -> Sam2Track:
        """See `Track`."""
        twin = Sam2Track(self._network, self._depth)
        for index in self._session.output_dict_per_obj[0]["cond_frame_outputs"]:
            twin.adopt(self, index)
        return twin

    def adopt(self, other: Track, index: int) -> None:
        """See `Track`."""
        if isinstance(other, Sam2Track):
            kept = other._session.output_dict_per_obj[0]["cond_frame_outputs"][index]
            self._session.output_dict_per_obj[0]["cond_frame_outputs"][index] = dict(kept)

    def _step(
        self, index: int, features: Any, *, points: dict[str, Any] | None, mask: Any, previous: Any, first: bool, reverse: bool
    ) -> Found:
        """One slice through memory attention, mask decoder and memory encoder: what `Sam2VideoModel.forward` does for one object, with
        earlier logits shown to the decoder where there are some, as the original does on a click (forward itself never does)."""
        import torch

        session, model = self._session, self._network.model
        marked = points is not None or mask is not None
        self._features = features
        with torch.inference_mode():
            out = model._run_single_frame_inference(
                inference_session=session,
                frame_idx=index,
                obj_idx=0,
                batch_size=1,
                is_init_cond_frame=first,
                point_inputs=points,
                mask_inputs=mask,
                reverse=reverse,
                prev_sam_mask_logits=previous,
            )
            session.store_output(0, index, output_value=out, is_conditioning_frame=first)
            model._batch_encode_memories(
                inference_session=session,
                frame_idx=index,
                objects_needing_memory_encoding=[0],
                high_res_masks_for_memory=[out["high_res_masks"]],
                object_score_logits_for_memory=[out["object_score_logits"]],
                is_mask_from_pts_per_obj=[marked],
            )
        outputs = session.output_dict_per_obj[0]
        kept = outputs["cond_frame_outputs" if first else "non_cond_frame_outputs"][index]
        if marked and not first:
            outputs["cond_frame_outputs"][index] = outputs["non_cond_frame_outputs"].pop(index)
        logits = out["pred_masks"][0, 0].float().cpu().numpy()
        score = float(out["object_score_logits"].float().reshape(-1)[0])
        for name in ("pred_masks", "high_res_masks"):
            kept.pop(name, None)
        if self._network.memory_positions is None:
            self._network.memory_positions = kept["maskmem_pos_enc"]
        kept["maskmem_pos_enc"] = self._network.memory_positions
        self._features = None
        return Found(logits, score)
