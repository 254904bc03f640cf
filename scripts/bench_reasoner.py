"""What encoding the images of a case once is worth: requests on one case, answered together and by the stock `generate`.

    python scripts/bench_reasoner.py [--model FOLDER] [--images 8] [--side 224] [--requests 4] [--tokens 48] [--repeats 3] [--device cpu]

Without --model a Qwen3-VL of nano size (about 8M parameters, random weights) is made; times do not depend on what it says.
Prints seconds (best of the repeats) and the speed-up for: one stock `generate` per request, one stock `generate` over the padded
batch, and SeerSeg's shared prefix; and how often the vision tower ran. Replies are checked to be equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.protocols.messages import ImagePart, Message, TextPart, text_message
from seerseg.protocols.seer import SYSTEM
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.vlm import VlmReasoner

REQUESTS = (
    "left lung",
    "plz segmnt the rihgt lnug",
    "the bones around the chest, all of them please",
    "backbone",
    "windpipe",
    "the pump of the blood",
    "liver",
    "LL",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_nano(folder: Path) -> None:
    """A Qwen3-VL of nano size with random weights: hidden 256, 6 layers; ViT 4 x 192."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        [SYSTEM, *REQUESTS], trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>")
    number = words.convert_tokens_to_ids
    text = {
        "vocab_size": 2000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    text |= {"head_dim": 32, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0, "mrope_interleaved": True}
    vision = {
        "depth": 4,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    vision |= {"out_hidden_size": 256, "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 1024}
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=32 * 32, max_pixels=1024 * 1024, merge_size=2, temporal_patch_size=2
    ).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))


def dialogues(images: int, side: int, requests: int) -> list[list[Message]]:
    """Requests on one case in SEER's order."""
    rng = np.random.default_rng(0)
    shown = tuple(ImagePart(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), f"view-{i}") for i in range(images))
    instruction = TextPart(f"These are {images} axial slices of one CT scan. Name the structure that the request asks for.")
    asked = [REQUESTS[i % len(REQUESTS)] for i in range(requests)]
    return [
        [text_message("system", SYSTEM), Message("user", (*shown, instruction, TextPart(f"<raw_prompt>{a}</raw_prompt>")))] for a in asked
    ]


def stock(reasoner: VlmReasoner, asked: list[list[Message]], *, together: bool) -> list[str]:
    """Replies by transformers' own generate."""
    prompts = [reasoner._prompt(d) for d in asked]
    out = []
    for group in [prompts] if together else [[p] for p in prompts]:
        encoded = reasoner._encode([p.text for p in group], group[0].images).to(reasoner.model.device)
        ids = reasoner.model.generate(
            **encoded, do_sample=False, max_new_tokens=reasoner.decoding.max_new_tokens, suppress_tokens=list(reasoner._suppressed),
            pad_token_id=reasoner.pad_token_id, eos_token_id=sorted(reasoner._eos) or None,
        )  # fmt: skip
        out += [reasoner.tokenizer.decode(row[encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip() for row in ids]
    return out


def best(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Least wall seconds of the repeats, and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    for name, value in (("images", 8), ("side", 224), ("requests", 4), ("tokens", 48), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()

    import torch

    with tempfile.TemporaryDirectory() as folder:
        if given.model is None:
            make_nano(Path(folder))
        # asked again and again, it must do all of it every time
        reasoner = load_reasoner(given.model or folder, device=given.device, max_new_tokens=given.tokens, kept_bytes=0)
    if not isinstance(reasoner, VlmReasoner):
        raise SystemExit(f"{given.model} is no vision-language model")
    asked = dialogues(given.images, given.side, given.requests)
    tower = [0]
    inner = reasoner.model.model
    seen = next((getattr(inner, n) for n in ("visual", "vision_model", "vision_tower") if hasattr(inner, n)), None)
    if seen is not None:
        seen.register_forward_hook(lambda *_: tower.__setitem__(0, tower[0] + 1))
    parameters = sum(p.numel() for p in reasoner.model.parameters()) / 1e6
    length = len(reasoner._encode([reasoner._prompt(asked[0]).text], reasoner._prompt(asked[0]).images)["input_ids"][0])
    print(
        f"{parameters:.1f}M parameters, {given.device}, {torch.get_num_threads()} threads; "
        f"{given.images} images of {given.side} px, prompt of {length} tokens"
    )
    print(f"{given.requests} requests, {given.tokens} new tokens each, best of {given.repeats}")
    with torch.inference_mode():
        ways: dict[str, Callable[[], list[str]]] = {
            "stock, one by one": lambda: stock(reasoner, asked, together=False),
            "stock, padded batch": lambda: stock(reasoner, asked, together=True),
            "shared prefix": lambda: [r[0] for r in reasoner.reply(asked)],
        }
        replies, base = {}, 0.0
        for name, way in ways.items():
            tower[0] = 0
            seconds, replies[name] = best(way, given.repeats)
            base = base or seconds
            print(f"{name:20} {seconds:8.3f} s   x{base / seconds:5.2f}   vision tower runs per pass: {tower[0] / given.repeats:.0f}")
    first = replies["stock, one by one"]
    print(
        "replies equal to stock, one by one:",
        {name: sum(a == b for a, b in zip(said, first, strict=True)) for name, said in replies.items()},
    )


if __name__ == "__main__":
    main()
