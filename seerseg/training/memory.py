"""How much memory a training step takes, from sizes alone, so that a run is planned before it is tried.

Bytes of one process. Always there:

    weights      frozen: parameters x bytes of their type (4 bit: 0.56); learning: 4
    Adam         8 per learning parameter
    images       what the processor makes of the slices, float32

and the largest of these moments:

    forward is over     activations of all layers and tokens (`_layer`; with checkpointing each layer's input only), of the vision tower
                        where it learns; the copies of whole-model weights that mixed precision makes; the head: TRL projects tiles of
                        4096 tokens by 32768 words, on a GPU of reply tokens alone, on a CPU of all tokens and with seven copies of a tile
    a layer again       with checkpointing: the inputs, one layer's activations and their gradients
    backward is over    gradients, 4 per learning parameter
    generation          keys and values of the replies that are written at once (grpo)

Where processes share the weights (FSDP, ZeRO-3), each holds its part of weights, Adam and gradients, in a forward pass two layers at a
time with embeddings and head, and during generation (validation's too) all weights in the type of computation: see `whole`.

Counts per layer are of what transformers' Llama-like layers keep for backward (inputs of norms and of products, rotated queries and keys,
attention's output, gate, up, their product), attention without a matrix of all pairs. Tests compare with what torch holds.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from seerseg.planning.rules import PIXELS_PER_TOKEN
from seerseg.training.settings import TrainSettings, fit_to_memory
from seerseg.views import ViewSpec

if TYPE_CHECKING:
    from seerseg.training.tuning import Shape

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
FOUR_BIT_BYTES = 0.56  # NF4 with quantised scales, and what bitsandbytes leaves whole
_TILE_TOKENS, _TILE_WORDS, _TILE_COPIES = 4096, 32768, 7.25
_CONTEXT_BYTES = 700 << 20  # CUDA's own, with cuBLAS workspaces
_DECODED_ROWS = 32  # replies that are written at once, see `grpo.rollout_reasoner`


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; "gradients" and "generation" count what they need beyond the moment before, so that the parts add up. tokens: of
    one sample; patches: of its images; learning: parameters that learn."""

    parts: dict[str, int]
    tokens: int
    image_tokens: int
    patches: int
    learning: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def estimate(
    settings: TrainSettings, shape: Shape, spec: ViewSpec, *, tokens: int | None = None, on_gpu: bool | None = None, shares: int = 1
) -> Estimate:
    """What one process needs. tokens: of the longest sample where it is known, else the plan's budget; shares: processes that hold the
    weights together."""
    images = spec.count * (1 + len(spec.also))
    least, most = shape.image_area_px
    size = math.isqrt(min(max(spec.size_px**2, least), most))
    side = shape.image_px or shape.patch_px * shape.merge * math.ceil(size / (shape.patch_px * shape.merge))
    patches = images * (side // shape.patch_px) ** 2
    image_tokens = patches // shape.merge**2
    planned = images * math.ceil(spec.size_px / PIXELS_PER_TOKEN) ** 2  # of the plan's budget, which is for no model in particular
    budget = max(settings.max_tokens - planned, settings.max_new_tokens) + image_tokens
    length = tokens if tokens is not None else budget
    gpu = settings.dtype != "float32" if on_gpu is None else on_gpu
    width = BYTES[settings.dtype]
    whole = settings.tuning == "full"
    learning = adapter_parameters(shape, settings) if not whole else shape.parameters - (0 if settings.train_vision else shape.vision)
    frozen = shape.parameters - learning if whole else shape.parameters
    held = FOUR_BIT_BYTES if settings.quantize == "4bit" else 4.0 if whole else width
    cells = settings.micro_batch * length
    stream = 4.0 if whole else width  # the residual stream is in the type of the embeddings
    layer = _layer(shape, width, settings)
    kept = shape.hidden * stream if settings.checkpointing else layer
    activations = cells * (shape.layers * kept + 4 * shape.hidden * stream)
    if settings.train_vision:
        activations += settings.micro_batch * patches * shape.vision_layers * _vision_layer(shape, width)
    ends = min(2.0 * shape.vocabulary * shape.hidden, float(shape.parameters))  # embeddings and head
    copies = learning * width if whole and width < 4 else 0.0
    if shares > 1:
        copies = width * (ends + 2 * (shape.parameters - ends) / shape.layers)
    scored = settings.micro_batch * settings.max_new_tokens if gpu else cells
    tile = min(scored, _TILE_TOKENS)
    head = tile * (_TILE_WORDS * width + (0.0 if gpu else _TILE_COPIES * 4.0 * min(shape.vocabulary, _TILE_WORDS)))
    head += shape.vocabulary * shape.hidden * 4.0 if whole else 0.0
    again = 2.0 * cells * layer if settings.checkpointing else 0.0
    step = activations + copies + max(head, again)
    written = max(_DECODED_ROWS, settings.group) * length * 2 * shape.kv_heads * shape.head_dim * shape.layers * width
    answering = (written if settings.stage == "grpo" else 0.0) + (shape.parameters * width if shares > 1 else 0.0)
    gradients = learning * 4.0 / shares
    parts = {
        "frozen weights": frozen * held / shares,
        "learning weights": learning * 4.0 / shares,
        "Adam": learning * 8.0 / shares,
        "images": settings.micro_batch * patches * 3 * shape.patch_px**2 * 4.0 * 2,
        "activations": activations + copies,
        "head": max(head, again),
        "gradients": max(0.0, gradients - step),
        "generation": max(0.0, answering - max(step, gradients)),
        "context": float(_CONTEXT_BYTES if gpu else 0),
    }
    return Estimate({name: round(size) for name, size in parts.items()}, length, image_tokens, patches, learning)


def shared_by(processes: int) -> int:
    """How many processes hold the weights together, as `accelerate launch` has said it."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return processes if fsdp or zero else 1


def adapter_parameters(shape: Shape, settings: TrainSettings) -> int:
    """Parameters of adapters on every linear layer: rank x (inputs + outputs)."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = (shape.hidden + query) * 2 + (shape.hidden + key) * 2 + (shape.hidden + shape.intermediate) * 3
    total = shape.layers * sides
    if settings.train_vision:
        total += shape.vision_layers * (shape.vision_hidden * 6 + 2 * (shape.vision_hidden + shape.vision_intermediate))
    return settings.lora_rank * total


def fitting(settings: TrainSettings, shape: Shape, spec: ViewSpec, available_bytes: int, *, shares: int = 1) -> TrainSettings:
    """The same run, in passes that this memory holds. shares: as in `estimate`."""
    share = settings.batch // settings.processes
    divisors = [m for m in range(1, settings.micro_batch + 1) if share % m == 0]
    needed = {m: estimate(replace(settings, micro_batch=m), shape, spec, shares=shares).total for m in divisors}
    return fit_to_memory(settings, needed, available_bytes)


def _layer(shape: Shape, width: float, settings: TrainSettings) -> float:
    """Bytes per token that one layer keeps for backward: in one precision, in mixed precision, or under adapters."""
    h, i, r = shape.hidden, shape.intermediate, settings.lora_rank
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if settings.tuning == "full":
        return 4.0 * (6 * h + 5 * q + 5 * k + 4 * i) if width == 4 else 26.0 * h + 12 * q + 12 * k + 8 * i
    return 4.0 * (4 * h + 3 * q + 3 * k + 4 * i + 7 * r) if width == 4 else 18.0 * h + 10 * q + 8 * k + 8 * i + 14 * r


def _vision_layer(shape: Shape, width: float) -> float:
    """The same per patch of a vision layer."""
    return shape.vision_hidden * (12 * width + 2 * 8) + 3 * shape.vision_intermediate * width
