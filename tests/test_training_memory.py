"""The memory estimate against what torch really holds, byte by byte, in a training step of small models."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_runs import SETTINGS
from torch.utils._python_dispatch import TorchDispatchMode

from seerseg.reasoners.vlm_loading import Source
from seerseg.training.memory import Estimate, adapter_parameters, estimate, fitting, shared_by
from seerseg.training.settings import TrainSettings
from seerseg.training.tuning import VISION, Shape, is_vision, shape_of, source_of
from seerseg.views import ViewSpec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and transformers deprecate each other's attributes
IMAGES, SIZE_PX, TEXT = 2, 96, 150
MARGIN = 0.05
SPEC = ViewSpec(count=IMAGES, size_px=SIZE_PX)


class Held(TorchDispatchMode):
    """Bytes of all storages that live, and the most there were at once."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out


def qwen(folder: Path, *, hidden: int = 128, layers: int = 4, intermediate: int = 384, heads: int = 8, kv: int = 2, dim: int = 16) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 2000, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": dim, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [dim // 8, dim // 8, dim // 4], "rope_theta": 1e4, "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "patch_size": 16, "out_hidden_size": hidden, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=7, vision_start_token_id=8)
    )
    model.save_pretrained(folder)
    return model


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    patches = (SIZE_PX // 16) ** 2
    image = [8] + [7] * (patches // 4)
    ids = torch.randint(10, 2000, (rows, len(image) * IMAGES + TEXT))
    ids[:, : len(image) * IMAGES] = torch.tensor(image * IMAGES)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 7).long(),
        "labels": torch.where(torch.arange(ids.shape[1]) > ids.shape[1] - 20, ids, -100),
        "pixel_values": torch.randn(rows * IMAGES * patches, 1536),
        "image_grid_thw": torch.tensor([[1, SIZE_PX // 16, SIZE_PX // 16]] * (rows * IMAGES)),
    }


def measured(model: Any, settings: TrainSettings) -> int:
    """The peak of a second step (Adam's moments are there by then), by live storages."""
    from trl.trainer.utils import add_fused_lm_head

    kind = getattr(torch, settings.dtype)
    if settings.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        model = model.to(kind)
        config = LoraConfig(r=settings.lora_rank, lora_alpha=8, target_modules="all-linear", exclude_modules=VISION, task_type="CAUSAL_LM")
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        model = get_peft_model(model, config)
    else:
        for name, weight in model.named_parameters():
            weight.requires_grad_(settings.train_vision or not is_vision(name))
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    with Held(*model.parameters(), *model.buffers()) as held:
        for _ in range(2):
            held.most = held.now
            with torch.autocast("cpu", dtype=kind, enabled=kind != torch.float32):
                out = model(**batch_of(settings.micro_batch), fused_lm_head=True, use_cache=False)
                loss = -out.log_probs.sum() / 20
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del out, loss
    return held.most


CASES = {
    "whole": {"tuning": "full"},
    "whole, vision learns": {"tuning": "full", "train_vision": True},
    "whole, two at a time": {"tuning": "full", "micro_batch": 2},
    "whole, activations computed again": {"tuning": "full", "micro_batch": 2, "checkpointing": True},
    "whole, mixed precision": {"tuning": "full", "dtype": "bfloat16", "micro_batch": 2},
    "adapters": {"tuning": "lora", "lora_rank": 8, "dtype": "bfloat16", "micro_batch": 4},
    "adapters, one precision": {"tuning": "lora", "lora_rank": 8, "micro_batch": 4},
    "adapters, activations computed again": {
        "tuning": "lora",
        "lora_rank": 8,
        "dtype": "bfloat16",
        "micro_batch": 4,
        "checkpointing": True,
    },
}
SHAPES = {"even": {}, "wide": {"hidden": 256, "intermediate": 512, "layers": 2, "dim": 32}}


def both(folder: Path, case: str, shape: str) -> tuple[int, Estimate]:
    model = qwen(folder, **SHAPES[shape])
    settings = dataclasses.replace(SETTINGS, **CASES[case])
    tokens = batch_of(1)["input_ids"].shape[1]
    found = estimate(settings, shape_of(Source(folder, None, "x")), SPEC, tokens=tokens, on_gpu=False)
    return measured(model, settings), found


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("case", list(CASES))
def test_the_estimate_is_near_what_torch_holds(tmp_path: Path, case: str, shape: str) -> None:
    real, found = both(tmp_path, case, shape)
    assert found.total == pytest.approx(real, rel=MARGIN), {name: size // 1000 for name, size in found.parts.items()}


def test_adapters_are_counted_as_peft_makes_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = qwen(tmp_path)
    shape = shape_of(Source(tmp_path, None, "x"))
    settings = dataclasses.replace(SETTINGS, tuning="lora", lora_rank=8)
    made = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", exclude_modules=VISION, task_type="CAUSAL_LM"))
    assert adapter_parameters(shape, settings) == sum(p.numel() for p in made.parameters() if p.requires_grad)


FOUR_B = Shape(
    parameters=4_437_815_808, vision=415_000_000, layers=36, hidden=2560, heads=32, kv_heads=8, head_dim=128, intermediate=9728,
    vocabulary=151_936,
    vision_layers=24, vision_hidden=1024, vision_intermediate=4096, vision_heads=16, patch_px=16, merge=2, image_px=None,
)  # fmt: skip


def test_a_4b_model_in_the_sizes_of_gpus() -> None:
    """Adapters on Qwen3-VL-4B with SEER's eight slices: what the presets promise."""
    spec = ViewSpec()
    settings = dataclasses.replace(
        SETTINGS, tuning="lora", lora_rank=16, dtype="bfloat16", batch=8, max_tokens=2432, max_new_tokens=256, checkpointing=True
    )
    whole = estimate(settings, FOUR_B, spec)
    assert whole.image_tokens == 1568
    assert 8.5 < whole.total / 2**30 < 14
    four = estimate(dataclasses.replace(settings, quantize="4bit"), FOUR_B, spec)
    assert four.total < whole.total - 5 * 2**30
    full = estimate(dataclasses.replace(settings, tuning="full"), FOUR_B, spec)
    assert full.total / 2**30 > 60


def test_processes_that_share_weights_hold_them_whole_while_they_answer() -> None:
    spec = ViewSpec()
    settings = dataclasses.replace(
        SETTINGS, tuning="full", dtype="bfloat16", batch=8, max_tokens=2432, max_new_tokens=256, checkpointing=True, stage="grpo"
    )
    alone, shared = (estimate(settings, FOUR_B, spec, shares=n) for n in (1, 4))
    for part in ("learning weights", "Adam"):
        assert abs(shared.parts[part] - alone.parts[part] / 4) <= 1
    moment = sum(shared.parts[part] for part in ("activations", "head", "gradients", "generation"))
    assert moment >= 2 * FOUR_B.parameters
    assert shared.total < 0.6 * alone.total
    many = estimate(settings, FOUR_B, spec, shares=1000)
    assert many.total > 2 * FOUR_B.parameters, "however many processes there are"
    assert estimate(dataclasses.replace(settings, stage="sft"), FOUR_B, spec, shares=4).total > 2 * FOUR_B.parameters


@pytest.mark.parametrize(
    ("said", "shares"),
    [
        ({}, 1),
        ({"ACCELERATE_USE_FSDP": "true"}, 4),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, 1),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, 4),
    ],
)
def test_accelerate_s_launcher_says_whether_weights_are_shared(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], shares: int) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert shared_by(4) == shares


def test_slices_are_counted_in_the_size_that_the_processor_brings_them_to() -> None:
    """The shipped nano makes every slice 96 x 96 pixels, 9 tokens, whatever the plan draws; its prompts are shorter than planned."""
    shape = shape_of(source_of("nano"))
    found = estimate(dataclasses.replace(SETTINGS, max_tokens=2432), shape, ViewSpec(count=8, size_px=448))
    assert found.image_tokens == 8 * 9
    assert found.tokens == 2432 - 8 * 196 + 8 * 9
    three = ViewSpec(count=5, also=("coronal", "sagittal"))  # a budget counts the images of all planes
    assert estimate(dataclasses.replace(SETTINGS, max_tokens=4096), FOUR_B, three).tokens == 4096


def test_passes_are_cut_to_what_a_gpu_holds() -> None:
    settings = dataclasses.replace(SETTINGS, tuning="lora", lora_rank=16, dtype="bfloat16", batch=8, micro_batch=8, max_tokens=2432)
    cut = [fitting(settings, FOUR_B, ViewSpec(), gib * 2**30).micro_batch for gib in (200, 80, 48, 24)]
    assert cut == sorted(cut, reverse=True)
    assert cut[0] == 8
    assert cut[-1] == 1
    for made in (fitting(settings, FOUR_B, ViewSpec(), gib * 2**30) for gib in (200, 80, 48, 24)):
        assert made.micro_batch * made.accumulation == 8
