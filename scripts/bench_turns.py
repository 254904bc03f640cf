#!/usr/bin/env python
"""Five turns of the MedSAM-Agent protocol: seconds a turn with and without encoding the images of earlier turns again, in one run.

    python scripts/bench_turns.py [--shapes nano small] [--views 2d 3d] [--dialogues 4] [--tokens 40] [--pixels 256]
    python scripts/bench_turns.py --shapes 8b --device cuda --pixels 512

Dialogues of several wordings on one phantom go on side by side, each with masks of its own. The reasoner writes --tokens tokens a turn,
which are timed and thrown away: a script says the call that the dialogue goes on with, and draws the mask that is shown back. 2d is one
slice and one overlay a turn; 3d is five slices of each of three planes and three overlays a turn. Shapes:

    nano    the shipped reasoner (5 million parameters; it sees slices in 96 pixels, 9 tokens each)
    small   Qwen3-VL, random weights: text 8 layers x 512 (8 heads, 4 of keys), sight 12 x 384, deepstack after 3, 6 and 9
    4b, 8b  Qwen3-VL-4B and -8B, random weights in bfloat16, for a GPU

Seconds are of CPU, one thread, so that other work on the machine changes little; on a GPU they are the clock's. Both ways are asked in
turn, in changing order. Replies are compared; in 16 bits close calls may fall out differently.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from seerseg.episode import Dialogue
from seerseg.protocols import load_protocol
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import SHIPPED, Loaded, Source, find, load, load_processor
from seerseg.segmenters.base import Segmentation
from seerseg.views import CaseViews, ViewSpec, render
from seerseg.volume import Grid, Mask, Volume

TURNS = 5
SIDE = 64
WORDINGS = (
    "outline the round one",
    "the bright thing please",
    "mark the lesion",
    "segment the mass",
    "where is it?",
    "the target, all of it",
)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": (
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 64, "vocab_size": 2048, "mrope": [12, 10, 10]},
        {"depth": 12, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6, "deepstack_visual_indexes": [3, 6, 9],
         "num_position_embeddings": 2304},
    ),
    "4b": (
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "vocab_size": 151936, "mrope": [24, 20, 20]},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "deepstack_visual_indexes": [5, 11, 17],
         "num_position_embeddings": 2304},
    ),
    "8b": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "vocab_size": 151936, "mrope": [24, 20, 20]},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "deepstack_visual_indexes": [8, 16, 24],
         "num_position_embeddings": 2304},
    ),
}  # fmt: skip


def opened(shape: str, pixels: int, device: str) -> Loaded:
    """The model of a shape, with nano's words."""
    if shape == "nano":
        return load(find(SHIPPED["nano"], offline=True), device=device, dtype="float32")
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text, sight = ({**part} for part in SHAPES[shape])
    rope = {"rope_type": "default", "mrope_section": text.pop("mrope"), "rope_theta": 5e6, "mrope_interleaved": True}
    text |= {"max_position_embeddings": 65536, "pad_token_id": 0, "eos_token_id": 2, "rope_parameters": rope}
    sight |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 16, "out_hidden_size": text["hidden_size"]}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    torch.manual_seed(0)
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        torch.set_default_dtype(kind)
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=sight, **tokens)).eval()
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    processor = load_processor(SHIPPED["nano"])
    processor.image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=pixels**2, max_pixels=pixels**2, merge_size=2, temporal_patch_size=2
    )
    return Loaded(model, processor, processor.tokenizer, Source(Path(shape), None, shape), shape, "")


def asking(loaded: Loaded, given: argparse.Namespace, kept_bytes: int | None) -> VlmReasoner:
    """A reasoner that always writes so many tokens."""
    reasoner = VlmReasoner(loaded, Decoding(max_new_tokens=given.tokens, max_batch=max(16, given.dialogues), kept_bytes=kept_bytes))
    reasoner.decoder.eos = frozenset()
    return reasoner


def phantom(views: str, pixels: int) -> tuple[CaseViews, Grid]:
    """Noise, as the protocol shows it."""
    grid = Grid((SIDE if views == "3d" else 1, SIDE, SIDE), np.eye(4))
    noise = np.random.default_rng(0).integers(0, 400, grid.shape_zyx).astype(np.int16)
    also = ("coronal", "sagittal") if views == "3d" else ()
    spec = ViewSpec(size_px=pixels, count=5 if views == "3d" else 1, lo=0.0, hi=1.0, also=also)
    return render(Volume(noise, grid, modality="MR"), spec), grid


def go_on(dialogue: Dialogue, number: int, turn: int, grid: Grid) -> None:
    """The script's call and its mask: a ball that differs from all others."""
    where = {} if grid.shape_zyx[0] == 1 else {"view": "axial", "slice": SIDE // 2}
    name, said = ("add_bbox", {"bbox_2d": [300, 300, 600 + turn, 600 + number]}) if turn == 0 else (
        "add_point", {"point_2d": [400 + turn, 450 + number], "point_type": "positive"}
    )  # fmt: skip
    dialogue.step(f"<tool_call>{json.dumps({'name': name, 'arguments': {**where, **said}})}</tool_call>")
    if dialogue.pending is None:
        raise SystemExit(f"The script's call could not be read: {dialogue.fault}")
    if not dialogue.done:
        middle = np.add([(size - 1) / 2 for size in grid.shape_zyx], [0, number % 5, number // 5])
        ball = sum((axis - at) ** 2 for axis, at in zip(np.indices(grid.shape_zyx), middle, strict=True)) < (8 + 2 * turn) ** 2
        dialogue.observe(Segmentation(dialogue.pending, "ok", Mask(ball, grid, "target")))


def measure(loaded: Loaded, shape: str, views: str, given: argparse.Namespace) -> None:
    """Five turns, and their table."""
    protocol = load_protocol("medsam-agent")
    case, grid = phantom(views, given.pixels)
    images = [0]
    handle = loaded.model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: images.append(images.pop() + len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])),
        with_kwargs=True,
    )
    now = time.perf_counter if given.device != "cpu" else time.process_time
    for way in (None, 0):  # once unmeasured, with all that warms up
        asking(loaded, given, way).reply([Dialogue(case, "warm up", protocol).messages])
    ways = {"again": asking(loaded, given, 0), "once": asking(loaded, given, None)}
    dialogues = [Dialogue(case, WORDINGS[n % len(WORDINGS)], protocol) for n in range(given.dialogues)]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    encoded: dict[str, list[int]] = {way: [] for way in ways}
    same = True
    tokens = 0
    for turn in range(TURNS):
        said = {}
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            images[0], started = 0, now()
            said[way] = ways[way].reply([d.messages for d in dialogues])
            seconds[way].append(now() - started)
            encoded[way].append(images[0])
        same &= said["again"] == said["once"]
        tokens = len(ways["again"].encode(dialogues[0].messages).ids)
        for number, dialogue in enumerate(dialogues):
            go_on(dialogue, number, turn, grid)
    handle.remove()
    weights = sum(w.numel() for w in loaded.model.parameters())
    kept = ways["once"].decoder.prefixes.held_bytes
    print(
        f"\n{shape} ({weights / 1e6:.1f} million parameters), {views}, {len(dialogues)} dialogues, {given.tokens} tokens a reply, {tokens} "
        f"tokens in the last turn, {given.pixels} pixels, {kept >> 20} MiB remembered; replies {'the same' if same else 'NOT the same'}\n"
    )
    print("| turn | images encoded: all again | once | seconds: all again | once | ratio |\n|---|---|---|---|---|---|")
    for turn, (slow, fast) in enumerate(zip(seconds["again"], seconds["once"], strict=True)):
        print(f"| {turn + 1} | {encoded['again'][turn]} | {encoded['once'][turn]} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} |")
    slow, fast = sum(seconds["again"]), sum(seconds["once"])
    print(f"| all | {sum(encoded['again'])} | {sum(encoded['once'])} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Every shape with every kind of views."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", "--shape", nargs="+", choices=("nano", *SHAPES), default=["nano", "small"])
    parser.add_argument("--views", nargs="+", choices=("2d", "3d"), default=["2d", "3d"])
    parser.add_argument("--dialogues", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=40, help="of every reply; a call has about as many")
    parser.add_argument("--pixels", type=int, default=256, help="side of a slice (the protocol's is 512)")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for shape in given.shapes:
        loaded = opened(shape, given.pixels, given.device)
        for views in given.views:
            measure(loaded, shape, views, given)


if __name__ == "__main__":
    main()
