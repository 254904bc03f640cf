"""medsam2's path against the original implementation of SAM2, where that is installed: the same weights, numbers for numbers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seerseg.segmenters import load_segmenter
from seerseg.segmenters.medsam2 import Medsam2Segmenter
from seerseg.segmenters.sam2_network import Marks

SIDE_PX = 512


def made(value: Any) -> Any:
    """What a configuration of SAM2 describes: classes by "_target_", built from the inside out."""
    if isinstance(value, list):
        return [made(one) for one in value]
    if value == "1e-6":
        return 1e-6  # YAML takes it for a text, SAM2's own reader does not
    if not isinstance(value, dict):
        return value
    target = value.get("_target_")
    given = {key: made(one) for key, one in value.items() if key != "_target_"}
    if target is None:
        return given
    import importlib

    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)(**given)


@pytest.fixture(scope="module")
def original() -> Any:
    """SAM 2.1, Hiera tiny, at MedSAM2's 512 pixels, with random weights and an object that is there."""
    pytest.importorskip("sam2.modeling.sam2_base", reason="the original SAM2 is not installed")
    import torch
    import yaml

    config = yaml.safe_load((files("sam2") / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml").read_text())["model"]
    config["image_size"] = SIDE_PX
    for part in ("self_attention", "cross_attention"):
        config["memory_attention"]["layer"][part]["feat_sizes"] = [SIDE_PX // 16] * 2
    # as `build_sam2_video_predictor` has them
    config["binarize_mask_from_pts_for_mem_enc"] = True
    stability = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    config["sam_mask_decoder_extra_args"] = stability
    torch.manual_seed(0)
    model = made(config).eval().requires_grad_(False)
    last = model.sam_mask_decoder.pred_obj_score_head.layers[-1]
    last.weight.zero_()
    last.bias.fill_(3.0)
    return model


def image(seed: int) -> np.ndarray:
    """(512, 512) uint8: smooth noise."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE_PX, SIDE_PX)), 12)
    return ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)


def encoded(model: Any, picture: np.ndarray) -> Any:
    """Features, positions and sizes as the original's predictor prepares them."""
    import torch

    grey = torch.from_numpy(picture.astype(np.float32) / np.float32(255))
    pixels = torch.stack([(grey - m) / d for m, d in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)])[None]
    return model._prepare_backbone_features(model.forward_image(pixels))[1:]


@pytest.mark.slow
def test_a_box_and_what_follows_are_the_originals_numbers(original: Any, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "sam2.1_tiny_512.pt"
    torch.save({"model": original.state_dict()}, path)
    loaded = load_segmenter(f"medsam2:{path}", accept_license=True)
    assert isinstance(loaded, Medsam2Segmenter)
    ours = loaded._network
    pictures, box = [image(seed) for seed in (1, 2, 3)], np.array([[140, 160], [300, 330]], np.float32)
    track, memory = ours.track(len(pictures)), {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    with torch.inference_mode():
        for index, picture in enumerate(pictures):
            features, positions, sizes = encoded(original, picture)
            levels, _ = ours.encode(picture)
            for theirs, mine in zip(features, levels, strict=True):
                mine = mine if mine.ndim == 3 else mine.flatten(2).permute(2, 0, 1)
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            points = {"point_coords": torch.from_numpy(box)[None], "point_labels": torch.tensor([[2, 3]], dtype=torch.int32)}
            first = index == 0
            expected = original.track_step(
                frame_idx=index,
                is_init_cond_frame=first,
                current_vision_feats=features,
                current_vision_pos_embeds=positions,
                feat_sizes=sizes,
                point_inputs=points if first else None,
                mask_inputs=None,
                output_dict=memory,
                num_frames=len(pictures),
            )
            memory["cond_frame_outputs" if first else "non_cond_frame_outputs"][index] = expected
            if first:
                marks = Marks(box, np.array([2, 3], np.int32))
                found = track.mark(index, levels, marks, previous=None, conditioned=False)
            else:
                found = track.follow(index, levels, reverse=False)
            logits = expected["pred_masks"][0, 0].numpy()
            assert found.score == pytest.approx(float(expected["object_score_logits"][0, 0]), abs=1e-4)
            assert found.logits.shape == logits.shape
            spread = float(np.ptp(logits))
            assert spread > 0
            assert np.abs(found.logits - logits).max() < 1e-3 * spread, f"slice {index}"
