"""Tiny nnU-Net v2 model folders of the true layout, made with nnU-Net's own network classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SPACING = (4.0, 3.0, 3.0)


def plans(
    *, residual: bool = False, reader: str = "SimpleITKIO", patch: tuple[int, ...] = (8, 16, 16), channels: int = 1
) -> dict[str, Any]:
    """plans.json as nnU-Net's planner writes it, of a network with two stages."""
    dim = len(patch)
    blocks = {"n_blocks_per_stage": [1, 1]} if residual else {"n_conv_per_stage": [1, 1]}
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [20.0, 34.0, 40.0][-dim:],
        "spacing": list(SPACING[-dim:]),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "batch_dice": True,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": [[3] * dim, [3] * dim],
                "strides": [[1] * dim, [2] * dim],
                **blocks,
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    statistics = {
        "max": 1000.0,
        "mean": 50.0,
        "median": 40.0,
        "min": -1000.0,
        "percentile_00_5": -900.0,
        "percentile_99_5": 900.0,
        "std": 90.0,
    }
    return {
        "dataset_name": "Dataset901_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(SPACING),
        "original_median_shape_after_transp": [20, 34, 40],
        "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"tiny": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): statistics for i in range(channels)},
    }


def dataset(labels: dict[str, Any], *, channels: tuple[str, ...] = ("MR",), regions: list[int] | None = None) -> dict[str, Any]:
    """dataset.json."""
    made = {"channel_names": {str(i): n for i, n in enumerate(channels)}, "labels": labels, "numTraining": 8, "file_ending": ".nii.gz"}
    return made if regions is None else {**made, "regions_class_order": regions}


def checkpoint(network: Any, plan: dict[str, Any], data: dict[str, Any], *, fold: int = 0) -> dict[str, Any]:
    """What nnU-Net's trainer saves: weights beside an optimiser, numpy numbers in the logs, the arguments, a torch device."""
    import torch

    return {
        "network_weights": network.state_dict(),
        "optimizer_state": torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99).state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(0.1)], "lrs": [0.01], "counts": np.arange(3)},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {"plans": plan, "configuration": "tiny", "fold": fold, "dataset_json": data, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def folder(
    path: Path,
    labels: dict[str, Any],
    *,
    folds: tuple[int, ...] = (0,),
    channels: tuple[str, ...] = ("MR",),
    regions: list[int] | None = None,
    taught: bool = False,
    **planned: Any,
) -> Path:
    """A model folder: plans.json, dataset.json, fold_N/checkpoint_final.pth. taught: class 1 is what is bright; else random weights."""
    pytest.importorskip("nnunetv2", reason="the package nnunetv2 is not installed (documentation/segmenters.md says how)")
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plan, data = plans(channels=len(channels), **planned), dataset(labels, channels=channels, regions=regions)
    architecture = plan["configurations"]["tiny"]["architecture"]
    heads = len(labels) - (1 if regions is not None else 0)
    path.mkdir(parents=True, exist_ok=True)
    (path / "plans.json").write_text(json.dumps(plan))
    (path / "dataset.json").write_text(json.dumps(data))
    for fold in folds:
        torch.manual_seed(fold)
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            len(channels),
            heads,
            deep_supervision=True,
        )
        if taught:
            _teach(network)
        else:
            _mix(network)
        (path / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint(network, plan, data, fold=fold), path / f"fold_{fold}" / "checkpoint_final.pth")
    return path


def _mix(network: Any) -> None:
    """Last layers that give every class some voxels."""
    import torch

    for name, value in network.named_parameters():
        if "seg_layers" in name:
            torch.nn.init.zeros_(value) if name.endswith("bias") else torch.nn.init.normal_(value)


def _teach(network: Any) -> None:
    """A few steps on balls, brighter than the noise that they lie in."""
    import torch

    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    zyx = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (8, 16, 16)), indexing="ij")).float()
    for _ in range(40):
        centres = torch.rand(4, 3, 1, 1, 1) * torch.tensor([8.0, 16.0, 16.0]).view(1, 3, 1, 1, 1)
        inside = ((zyx[None] - centres) ** 2).sum(1) < 20
        image = inside.float()[:, None] * 3 - 0.5 + 0.2 * torch.randn(4, 1, 8, 16, 16)
        logits = network(image)
        loss = torch.nn.functional.cross_entropy(logits[0] if isinstance(logits, list) else logits, inside.long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
