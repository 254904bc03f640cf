"""Tiny SAM2 and SAM models of the true architecture, and networks that draw what they are told, for the tests of `medsam2` and `sam`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.segmenters.sam2_network import Found, Marks
from seerseg.segmenters.sam2_weights import MODULES


def sam2_config(size: int = 64) -> Any:
    """A Sam2VideoConfig of 1.3 million parameters."""
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VisionConfig
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig, Sam2VideoPromptEncoderConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[size, size],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 2, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    return Sam2VideoConfig(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[128, 64, 32, 16],
            fpn_hidden_size=128,
            backbone_feature_sizes=[[size // 4] * 2, [size // 8] * 2, [size // 16] * 2],
        ),
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=128, image_size=size),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(hidden_size=128, mlp_dim=64, iou_head_hidden_dim=128, num_attention_heads=4),
        image_size=size,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[size // 16] * 2,
        memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=64,
        memory_fuser_num_layers=1,
    )


def sam2_model(*, seed: int = 0, score: float = 2.0) -> Any:
    """Random weights, large enough that masks differ from slice to slice; objects are there (score) unless told otherwise."""
    import torch
    from transformers import Sam2VideoModel

    torch.manual_seed(seed)
    model = Sam2VideoModel(sam2_config()).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "norm" not in name:
                value.normal_(0, 0.08)
            elif "embedding" in name or "encoding" in name or "pointer" in name:
                value.normal_(0, 0.1)
        # one embedding in two places, as in every checkpoint
        model.shared_image_embedding.positional_embedding.copy_(model.prompt_encoder.shared_embedding.positional_embedding)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(score)
        model.mask_decoder.pred_obj_score_head.proj_out.weight.zero_()
    return model.requires_grad_(False)


def original_names(model: Any) -> dict[str, Any]:
    """The model's tensors as the original SAM2 names them: the mapping read backwards."""
    ours = {ours: original for original, ours in MODULES}
    out: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if name == "shared_image_embedding.positional_embedding":
            continue
        if name == "prompt_encoder.point_embed.weight":
            for n in range(4):
                out[f"sam_prompt_encoder.point_embeddings.{n}.weight"] = value[n : n + 1].clone()
            continue
        module, dot, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            module, dot, leaf = name, "", ""
        number = re.search(r"(?<=\.)\d+(?=\.|$)", module)
        original = ours.get(module)
        if original is None and number is not None:
            original = ours[module[: number.start()] + "#" + module[number.end() :]].replace("#", number.group())
        assert original is not None, name
        out[original + dot + leaf] = value.clone()
    return out


def sam_model(*, seed: int = 0) -> Any:
    """A tiny SamModel with random weights."""
    import torch
    from transformers import SamConfig, SamModel

    torch.manual_seed(seed)
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "mlp_dim": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    model = SamModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.15)
    return model.requires_grad_(False)


def save(model: Any, folder: Path) -> Path:
    """The model as a transformers folder."""
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------------ doubles


def drawn(marks: Marks, before: np.ndarray | None, size: int) -> np.ndarray:
    """The mask, or the box, with discs of 4 pixels added and taken away at the points."""
    out = np.zeros((size, size), dtype=bool) if before is None else before.copy()
    if marks.mask is not None:
        out = marks.mask.copy()
    rows, columns = np.mgrid[:size, :size] + 0.5
    corners = marks.points[marks.labels >= 2]
    for (x0, y0), (x1, y1) in zip(corners[::2], corners[1::2], strict=True):
        out |= (rows > y0) & (rows < y1 + 1) & (columns > x0) & (columns < x1 + 1)
    for (x, y), label in zip(marks.points, marks.labels, strict=True):
        if label < 2:
            disc = (rows - y - 0.5) ** 2 + (columns - x - 0.5) ** 2 <= 16
            out = out | disc if label == 1 else out & ~disc
    return out


def found(mask: np.ndarray) -> Found:
    return Found(np.where(mask, 1, -1).astype(np.float32), 1.0 if mask.any() else -1.0)


class DrawingTrack:
    """On a marked slice what was marked; on the next slices what is bright of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.marked: dict[int, np.ndarray] = {}
        self.followed: dict[int, np.ndarray] = {}

    def mark(self, index: int, features: Any, marks: Marks, *, previous: Found | None, conditioned: bool) -> Found:
        self.marked[index] = drawn(marks, None if previous is None else previous.logits > 0, self.size)
        return found(self.marked[index])

    def follow(self, index: int, features: Any, *, reverse: bool) -> Found:
        near = index + 1 if reverse else index - 1
        known = {**self.followed, **self.marked}
        before = known[near] if near in known else self.marked[min(self.marked, key=lambda i: abs(i - index))]
        self.followed[index] = before & (features > 128)
        return found(self.followed[index])

    def copy(self) -> DrawingTrack:
        twin = DrawingTrack(self.size)
        twin.marked = dict(self.marked)
        return twin

    def adopt(self, other: Any, index: int) -> None:
        self.marked[index] = other.marked[index]


class DrawingNetwork:
    """A `medsam2` network that knows no anatomy; it counts the images it encoded."""

    def __init__(self, size_px: int = 128) -> None:
        self.size_px = size_px
        self.encoded = 0

    def encode(self, image: np.ndarray) -> tuple[Any, int]:
        self.encoded += 1
        return image, image.nbytes

    def track(self, depth: int) -> DrawingTrack:
        return DrawingTrack(self.size_px)


class DrawingSam:
    """A `sam` network that draws its marks."""

    def __init__(self, size_px: int = 128) -> None:
        self.size_px = size_px
        self.encoded = 0

    def encode(self, pixels: np.ndarray) -> Any:
        self.encoded += 1
        return pixels

    def decode(self, features: Any, marks: Marks) -> Found:
        before = marks.mask if len(marks.labels) else None
        return found(drawn(marks, before, self.size_px))
