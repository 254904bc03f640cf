"""Tiny VoxTell folders of the true architecture and layout, their banks and text encoders, and VoxTell's own predictor on them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

PATCH = (16, 32, 32)
CHANNELS = (4, 4, 8, 8, 8)
TEXT, QUERY, HEADS, HIDDEN, STAGES, LAYER = 16, 48, 2, 32, 4, 3
"""Sizes that VoxTell's predictor fixes at 2560, 2048, 32, 2048, 5, 4 for the published weights."""
LABELS = ("liver", "left kidney", "right kidney", "Spleen", "tumor in the left lung")


def plans(channels: Sequence[int] = CHANNELS, patch: Sequence[int] = PATCH) -> dict[str, Any]:
    """plans.json with the keys that VoxTell reads."""
    stages = len(channels)
    return {
        "dataset_name": "Dataset900_Tiny",
        "plans_name": "VoxTellPlans",
        "configurations": {
            "3d_fullres": {
                "patch_size": list(patch),
                "spacing": [1.5, 1.5, 1.5],
                "architecture": {
                    "network_class_name": "voxtell.model.voxtell_model.VoxTellModel",
                    "arch_kwargs": {
                        "n_stages": stages,
                        "features_per_stage": list(channels),
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": [[3, 3, 3]] * stages,
                        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
                        "n_blocks_per_stage": [1] * stages,
                        "n_conv_per_stage_decoder": [1] * (stages - 1),
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }


def tiny_class(channels: Sequence[int] = CHANNELS, patch: Sequence[int] = PATCH) -> type:
    """VoxTell's network class with tiny sizes in place of those that its predictor passes."""
    from voxtell.model.voxtell_model import VoxTellModel

    decoder = {i: {"channels": c, "shape": tuple(n >> i for n in patch)} for i, c in enumerate(channels)}
    tiny = {
        "text_embedding_dim": TEXT,
        "query_dim": QUERY,
        "num_heads": HEADS,
        "project_to_decoder_hidden_dim": HIDDEN,
        "num_maskformer_stages": STAGES,
        "decoder_layer": LAYER,
    }

    class Tiny(VoxTellModel):  # type: ignore[misc]
        DECODER_CONFIGS = decoder

        def __init__(self, **given: Any) -> None:
            super().__init__(**{**given, **tiny})

    return Tiny


def network(seed: int = 0) -> Any:
    """With random weights."""
    import pydoc

    import torch

    architecture = plans()["configurations"]["3d_fullres"]["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        arguments[key] = pydoc.locate(arguments[key]) if arguments[key] else None
    torch.manual_seed(seed)
    return tiny_class()(input_channels=1, **arguments, deep_supervision=False)


def needed() -> None:
    """Skip where the package is not installed."""
    for name in ("voxtell", "nnunetv2"):
        pytest.importorskip(name, reason=f"the package {name} is not installed (documentation/segmenters.md says how)")


def folder(path: Path, *, seed: int = 0, labels: Sequence[str] = LABELS, bank: bool = True, taught: bool = False) -> Path:
    """A model folder with its bank. taught: "liver" is what is bright, in every tile; else random weights."""
    needed()
    import torch

    made = network(seed)
    if taught:
        teach(made, vectors(labels))
    (path / "fold_0").mkdir(parents=True)
    (path / "plans.json").write_text(json.dumps(plans()))
    torch.save({"network_weights": made.state_dict(), "trainer_name": "VoxTellTrainer"}, path / "fold_0" / "checkpoint_final.pth")
    if bank:
        write_bank(path / "text_embeddings.npz", labels)
    return path


def vectors(labels: Sequence[str]) -> np.ndarray:
    """An embedding (TEXT,) for each text, float16."""
    return np.stack([np.random.default_rng([*label.lower().encode()]).normal(size=TEXT) for label in labels]).astype(np.float16)


def write_bank(path: Path, labels: Sequence[str]) -> Path:
    """As VoxTell publishes it."""
    np.savez(path, labels=np.array(labels), embeddings=vectors(labels))
    return path


def teach(made: Any, embeddings: np.ndarray, *, steps: int = 12) -> None:
    """Texts whose number is even mean what is bright, the others what is dark."""
    import torch

    optimiser = torch.optim.Adam(made.parameters(), lr=3e-3)
    zyx = torch.stack(torch.meshgrid(*(torch.arange(n) for n in PATCH), indexing="ij")).float()
    texts = torch.from_numpy(embeddings.astype(np.float32))[None]
    made.train()
    for _ in range(steps):
        inside = ((zyx - torch.rand(3, 1, 1, 1) * torch.tensor(PATCH).view(3, 1, 1, 1)) ** 2).sum(0) < 300
        image = (inside.float() * 3 - 0.5 + 0.2 * torch.randn(PATCH))[None, None]
        truth = torch.stack([inside if i % 2 == 0 else ~inside for i in range(texts.shape[1])])[None].float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(made(image, texts), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    made.eval()


def encoder(path: Path, *, size: int = TEXT) -> Path:
    """A tiny Qwen3 of the true class, with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    words = ["<pad>", "<unk>", "Instruct", "Query", ":", "liver", "left", "right", "kidney", "lung", "tumor", "in", "the", "heart"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
    )
    Qwen3Model(config).save_pretrained(path)
    return path


@contextlib.contextmanager
def their_sizes() -> Iterator[None]:
    """VoxTell's own code, with the tiny network class where it has its own of one fixed size."""
    with mock.patch("voxtell.inference.predictor.VoxTellModel", tiny_class()):
        yield


def their_predictor(path: Path, *, bank: Path | None = None, encoder: Path | None = None) -> Any:
    """VoxTell's own predictor of a folder."""
    import torch
    from voxtell.inference.predictor import VoxTellPredictor

    with their_sizes():
        return VoxTellPredictor(
            str(path),
            torch.device("cpu"),
            text_encoding_model=str(encoder),
            embedding_bank=str(bank) if bank is not None else None,
            use_precomputed_embeddings=False,
        )


def run_command(arguments: Sequence[str]) -> int:
    """VoxTell's own command `voxtell-predict` with these arguments, on the CPU."""
    from voxtell.inference import predict_from_raw_data

    with their_sizes(), mock.patch("sys.argv", ["voxtell-predict", "--device", "cpu", *arguments]):
        return int(predict_from_raw_data.main())
