"""Our rollouts and steps against stock TRL's, on the same model, images, group and reply length, in one run, part by part.

    python scripts/bench_grpo.py [--model FOLDER] [--sets 2 --wordings 4 --samples 2 --tokens 64] [--shapes 0x0+200 2x128+150 8x224+150]

A shape is IMAGESxPIXELS+WORDS. Without --model a random Qwen3-VL of about 6 million parameters. Seconds are CPU (--wall for
the clock's), so that other work on the machine changes little. Replies have a fixed length; the segmenter is a script, so it costs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WORDS = "outline the left lung right ribs vertebral column please segment absent".split()


def random_model(folder: Path) -> Path:
    """A Qwen3-VL of hidden 256, 6 layers, ViT 4 x 192."""
    import tiny_vlms
    import torch
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    words = tiny_vlms.tokenizer()
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    text = {
        "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 10000.0, "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 192, "intermediate_size": 576, "num_heads": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "patch_size": 16, "out_hidden_size": 256, "deepstack_visual_indexes": [1, 3], "num_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).save_pretrained(folder)
    words.chat_template = tiny_vlms.QWEN_TEMPLATE
    words.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=1024, max_pixels=1 << 20, merge_size=2, temporal_patch_size=2)
    processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    return folder


class Clock:
    """Seconds by part, and how often."""

    def __init__(self, wall: bool) -> None:
        self._now, self.seconds = time.perf_counter if wall else time.process_time, defaultdict(list)

    def around(self, owner: Any, method: str, part: str) -> None:
        """Count what a method of an object takes."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part].append(self._now() - started)

        setattr(owner, method, timed)

    def per_step(self, part: str, steps: int) -> float:
        """The mean over all steps but the first, which warms up."""
        calls = self.seconds[part]
        each = len(calls) // steps
        return sum(calls[each:]) / (steps - 1)


def world(images: int, pixels: int, words: int, sets: int, wordings: int) -> tuple[Any, Any, list[Any]]:
    """Scenes, protocol and paraphrase sets of a shape: the wordings differ at the end of the prompt, as ours do."""
    import grpo_scenes as g

    from seerseg.protocols.messages import ImagePart, Message, TextPart, text_message
    from seerseg.training.rollout import ParaphraseSet
    from seerseg.views import ViewSpec, render

    class Wide(g.Letters):
        """Long prompts."""

        def opening(self, views: Any, request: str, skills: Any, targets: Any) -> list[Message]:
            filler = " ".join(WORDS[i % len(WORDS)] for i in range(words))
            shown = [ImagePart(v.pixels, v.key) for v in views.views][:images]
            return [text_message("system", filler), Message("user", (*shown, TextPart(f"Name it. {request}")))]

    scenes = g.Scenes()
    spec = ViewSpec(size_px=max(32, pixels), count=max(1, images), lo=0.0, hi=1.0)
    if images > g.GRID.shape_zyx[0]:
        from seerseg.volume import Grid, Volume

        grid = Grid((images, 8, 8), np.eye(4))
        noise = np.random.default_rng(0).integers(0, 200, (2, *grid.shape_zyx)).astype(np.int16)
        views = {case: render(Volume(noise[i], grid, modality="CT", name=case), spec) for i, case in enumerate("ab")}
    else:
        views = {case: render(scenes.volume(case), spec) for case in "ab"}
    scenes._views = views
    rows = [
        ParaphraseSet("ab"[n % 2], ("ribs",), tuple(f"{WORDS[k]} {WORDS[k + 1]} the ribs {n}" for k in range(wordings)))
        for n in range(sets)
    ]
    return scenes, Wide(), rows


def ours(folder: Path, shape: tuple[int, int, int], given: argparse.Namespace, clock: Clock, out: Path) -> int:
    """Steps of ours; gives the prompt's length."""
    import grpo_scenes as g

    from seerseg.reasoners.decoding import Decoding
    from seerseg.reasoners.vlm import VlmReasoner
    from seerseg.rewards import RewardConfig
    from seerseg.segmenters.cache import CachedSegmenter
    from seerseg.segmenters.scripted import ScriptedSegmenter
    from seerseg.training.rollout import Rollouts

    scenes, protocol, rows = world(*shape, given.sets, given.wordings)
    loaded = g.loaded_model(folder)
    decoding = Decoding(max_new_tokens=given.tokens, max_batch=64)
    reward = RewardConfig.from_json({"terms": {"dice": 1.0, "format": 0.5}, "stability": {"lambda": 0.5}})
    rollouts = Rollouts(VlmReasoner(replace(loaded), decoding), scenes, protocol, CachedSegmenter(ScriptedSegmenter(g.MASKS)), reward)
    rollouts.reasoner.decoder.eos = frozenset()
    batch = given.sets * given.wordings * given.samples
    trainer = g.trainer_of(
        loaded, out, rollouts, sets=rows, steps=given.steps, paraphrases=given.wordings, samples=given.samples, micro=batch, accumulation=1,
        resamples=0,
    )  # fmt: skip
    lengths: list[int] = []
    handed = trainer.hand_over
    trainer.hand_over = lambda: (lengths.extend(len(r.prompt.ids) for r in trainer._now), handed())[1]
    clock.around(rollouts, "run", "rollout")
    clock.around(trainer, "_prepare_inputs", "prepare")
    clock.around(trainer, "training_step", "step")
    trainer.train()
    return int(np.mean(lengths))


def stock(folder: Path, shape: tuple[int, int, int], given: argparse.Namespace, clock: Clock, out: Path) -> None:
    """Steps of TRL's own trainer with the same prompts, images, group and reply length."""
    import grpo_scenes as g
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    scenes, protocol, rows = world(*shape, given.sets, given.wordings)
    loaded = g.loaded_model(folder)
    table: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        messages = protocol.opening(scenes.views(row.case), row.texts[0], (), ())
        table["prompt"].append([{"role": m.role, "content": m.text} for m in messages])
        if shape[0]:
            table["images"].append([Image.fromarray(i.pixels) for m in messages for i in m.images])
    group = given.wordings * given.samples
    trainer = GRPOTrainer(
        model=loaded.model,
        reward_funcs=[lambda completions, **other: [float(n % 3) for n, _ in enumerate(completions)]],
        args=GRPOConfig(
            output_dir=str(out), max_steps=given.steps, per_device_train_batch_size=given.sets * group, num_generations=group,
            max_completion_length=given.tokens, loss_type="dr_grpo", scale_rewards="none", beta=0.0, use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, activation_checkpointing=False,
            gradient_checkpointing=False, generation_kwargs={"min_new_tokens": given.tokens}, remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_dict(dict(table)),
        processing_class=loaded.processor,
    )  # fmt: skip
    clock.around(trainer, "_generate_single_turn", "generate")
    clock.around(trainer, "_tokenize_prompts", "encode")
    clock.around(trainer, "_prepare_inputs", "prepare")
    clock.around(trainer, "training_step", "step")
    trainer.train()


def measure(folder: Path, shape: tuple[int, int, int], given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Parts of both, in seconds a step."""
    mine, theirs = Clock(given.wall), Clock(given.wall)
    tokens = ours(folder, shape, given, mine, out)
    stock(folder, shape, given, theirs, out)
    mine_s, theirs_s = ({p: c.per_step(p, given.steps) for p in c.seconds} for c in (mine, theirs))
    rollout = theirs_s["generate"] + theirs_s["encode"]
    return {
        "images": shape[0], "pixels": shape[1], "prompt_tokens": tokens, "replies": given.sets * given.wordings * given.samples,
        "reply_tokens": given.tokens, "stock_rollout_s": rollout, "our_rollout_s": mine_s["rollout"],
        "stock_learn_s": theirs_s["step"] - theirs_s["prepare"], "our_learn_s": mine_s["step"] - mine_s["prepare"],
        "stock_rest_s": theirs_s["prepare"] - rollout, "our_rest_s": mine_s["prepare"] - mine_s["rollout"],
        "stock_step_s": theirs_s["step"], "our_step_s": mine_s["step"],
        "rollout_ratio": rollout / mine_s["rollout"], "step_ratio": theirs_s["step"] / mine_s["step"],
    }  # fmt: skip


def shape_of(text: str) -> tuple[int, int, int]:
    """IMAGESxPIXELS+WORDS."""
    images, _, rest = text.partition("x")
    pixels, _, words = rest.partition("+")
    return int(images), int(pixels), int(words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every shape and print a table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--wordings", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[shape_of(s) for s in ("2x128+40", "2x128+120", "8x224+40")])
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        folder = given.model or random_model(Path(place) / "model")
        rows = []
        for shape in given.shapes:
            rows.append(measure(folder, shape, given, Path(place) / "out"))
            if given.json:
                print(json.dumps(rows[-1]), flush=True)
            else:
                print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)


if __name__ == "__main__":
    main()
