"""How much memory a training step takes, from sizes alone, so that a run is planned before it is tried.

Bytes of one process, at the largest moment of a step (forward is over, backward begins):

    weights      frozen: parameters x bytes of their type (4 bit: 0.56); learning: 4
    learning     per learning parameter 4 (gradient) + 8 (Adam) and, under mixed precision, 2 (copy in the type of computation)
    activations  per layer and token what backward needs, see `_layer`; with checkpointing only each layer's input, and one layer
                 computed again; of the vision tower only where it learns, per patch
    images       what the processor makes of the slices, float32
    logits       reply tokens (all tokens on the CPU, where TRL scores every position) x vocabulary, tile by tile
    transient    the largest thing that comes and goes

The counts per layer follow from the modules that transformers runs (norm, q, k, v, rotary, attention, gate, up, product; a norm computes in
float32), attention without a matrix of all pairs (SDPA, FlashAttention). Tests compare with what torch really holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from seerseg.training.settings import TrainSettings, fit_to_memory
from seerseg.views import ViewSpec

if TYPE_CHECKING:
    from seerseg.training.tuning import Shape

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
FOUR_BIT_BYTES = 0.56  # NF4 with quantised scales, and what bitsandbytes leaves whole
MARGIN = 0.15
_TILE_BYTES = 64 << 20
_CONTEXT_BYTES = 700 << 20  # CUDA's own, with cuBLAS workspaces


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. tokens: of one sample; patches: of its images; learning: parameters that learn."""

    parts: dict[str, int]
    tokens: int
    image_tokens: int
    patches: int
    learning: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def estimate(settings: TrainSettings, shape: Shape, spec: ViewSpec, *, tokens: int | None = None, on_gpu: bool | None = None) -> Estimate:
    """What one process needs. tokens: of the longest sample where it is known, else the plan's budget."""
    images = spec.count * (1 + len(spec.also))
    side = shape.image_px or shape.patch_px * shape.merge * math.ceil(spec.size_px / (shape.patch_px * shape.merge))
    patches = images * (side // shape.patch_px) ** 2
    image_tokens = patches // shape.merge**2
    length = tokens if tokens is not None else max(settings.max_tokens, image_tokens + settings.max_new_tokens)
    gpu = settings.dtype != "float32" if on_gpu is None else on_gpu
    width = BYTES[settings.dtype]
    whole = settings.tuning == "full"
    learning = adapter_parameters(shape, settings) if not whole else shape.parameters - (0 if settings.train_vision else shape.vision)
    frozen = shape.parameters - learning if whole else shape.parameters
    held = FOUR_BIT_BYTES if settings.quantize == "4bit" else 4.0 if whole else width
    rows = settings.micro_batch
    layer = _layer(shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate, width, settings, whole)
    parts = {
        "frozen weights": frozen * held,
        "learning weights": learning * 4.0,
        "gradients and Adam": learning * (12.0 + (width if width < 4 and whole else 0.0)),
        "activations": rows * length * (shape.layers * (shape.hidden * width if settings.checkpointing else layer)),
        "vision activations": 0.0,
        "images": rows * patches * 3 * shape.patch_px**2 * 4.0 * 2,
        "logits": min(_TILE_BYTES * 4, rows * (settings.max_new_tokens if gpu else length) * shape.vocabulary * 4.0) * 2,
        "transient": rows * length * (layer if settings.checkpointing else 4 * shape.intermediate * width),
        "context": float(_CONTEXT_BYTES if gpu else 0),
    }
    vision_layer = _vision_layer(shape, width)
    if settings.train_vision:
        parts["vision activations"] = rows * patches * shape.vision_layers * vision_layer
    else:
        parts["transient"] = max(parts["transient"], rows * patches * vision_layer)
    return Estimate({name: round(size) for name, size in parts.items()}, length, image_tokens, patches, learning)


def adapter_parameters(shape: Shape, settings: TrainSettings) -> int:
    """Parameters of adapters on every linear layer: rank x (inputs + outputs)."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = (shape.hidden + query) * 2 + (shape.hidden + key) * 2 + (shape.hidden + shape.intermediate) * 3
    total = shape.layers * sides
    if settings.train_vision:
        total += shape.vision_layers * (shape.vision_hidden * 6 + 2 * (shape.vision_hidden + shape.vision_intermediate))
    return settings.lora_rank * total


def fitting(settings: TrainSettings, shape: Shape, spec: ViewSpec, available_bytes: int) -> TrainSettings:
    """The same run, in passes that this memory holds."""
    share = settings.batch // settings.processes
    divisors = [m for m in range(1, settings.micro_batch + 1) if share % m == 0]
    needed = {m: estimate(replace(settings, micro_batch=m), shape, spec).total for m in divisors}
    return fit_to_memory(settings, needed, available_bytes)


def _layer(hidden: int, heads: int, kv: int, dim: int, intermediate: int, width: float, settings: TrainSettings, whole: bool) -> float:
    """Bytes per token that one layer of a Llama-like model keeps for backward."""
    query, key = heads * dim, kv * dim
    norms = 2 * hidden * (width + 4 + 4)  # input, its float32 form, the normalised one
    attention = hidden * width + (query + 2 * key) * width * 2 + query * width * 2
    mlp = hidden * width + 4 * intermediate * width
    adapters = 0.0
    if not whole:
        adapters = 7 * settings.lora_rank * 4.0 + (2 * hidden + query + intermediate) * (4.0 if width < 4 else 0.0)
    return norms + attention + mlp + adapters


def _vision_layer(shape: Shape, width: float) -> float:
    """The same per patch of a vision layer."""
    return shape.vision_hidden * (12 * width + 2 * 8) + 3 * shape.vision_intermediate * width
