"""The VLM reasoner on tiny random models of the true architectures, read from folders by the real loading code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reasoner_contract as contract
import tiny_vlms

from seerseg.errors import ModelError, WeightsError
from seerseg.protocols.messages import Message, TextPart, text_message
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.torchvision_state import probe, torchvision_state
from seerseg.reasoners.vlm import VlmReasoner

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": lambda folder: tiny_vlms.qwen(folder, "3"),
    "qwen2_5_vl": lambda folder: tiny_vlms.qwen(folder, "2.5"),
    "idefics3": tiny_vlms.idefics3,
    "smolvlm": lambda folder: tiny_vlms.idefics3(folder, "SmolVLM"),
    "llava": tiny_vlms.llava,
    "gemma3": tiny_vlms.gemma3,
}
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


def opened(folder: Path, **settings: Any) -> VlmReasoner:
    made = load_reasoner(folder, **{"max_new_tokens": TOKENS, **settings})
    assert isinstance(made, VlmReasoner)
    return made


def vision_tower(reasoner: VlmReasoner) -> Any:
    inner = reasoner.model.model
    return next(getattr(inner, name) for name in ("visual", "vision_model", "vision_tower") if hasattr(inner, name))


def stock(reasoner: VlmReasoner, dialogue: Any) -> str:
    """What transformers' own generate writes, greedily, for one dialogue alone."""
    prompt = reasoner._prompt(dialogue)
    encoded = reasoner._encode([prompt.text], prompt.images)
    ids = reasoner.model.generate(
        **encoded,
        do_sample=False,
        max_new_tokens=TOKENS,
        suppress_tokens=list(reasoner._suppressed),
        pad_token_id=0,
        eos_token_id=sorted(reasoner._eos),
    )
    return str(reasoner.tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", MAKERS)
def test_greedy_replies_are_those_of_the_stock_generate(folders: dict[str, Path], name: str) -> None:
    reasoner = opened(folders[name])
    shown, other = contract.images(3), contract.images(2, seed=1, side=48)
    dialogues = [
        contract.dialogue("left lung", shown=shown),
        contract.dialogue("kindly outline all of the ribs, thank you", shown=shown),
        contract.dialogue("x", shown=shown),
        contract.dialogue("left lung", shown=other),
        contract.dialogue("no image at all"),
    ]
    replies = [r[0] for r in reasoner.reply(dialogues)]
    assert replies == [stock(reasoner, d) for d in dialogues]
    assert len(set(replies[:4])) >= 3, "replies must depend on request and images, or this test shows nothing"


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3"])
def test_a_second_turn_with_another_image_is_that_of_the_stock_generate(folders: dict[str, Path], name: str) -> None:
    reasoner = opened(folders[name])
    first = contract.dialogue("left lung", shown=contract.images(2))
    overlay = contract.images(1, seed=7)
    turns = [[*first, text_message("assistant", said), Message("user", (*overlay, TextPart("Go on.")))] for said in ("box 1 2", "point 3")]
    replies = [r[0] for r in reasoner.reply([*turns, first])]
    assert replies == [stock(reasoner, d) for d in (*turns, first)]
    assert replies[0] != replies[1]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "idefics3"])
def test_images_of_a_case_are_encoded_once(folders: dict[str, Path], name: str) -> None:
    reasoner = opened(folders[name], max_batch=3)
    calls = []
    handle = vision_tower(reasoner).register_forward_hook(lambda *_: calls.append(1))
    shown = contract.images(4)
    reasoner.reply([contract.dialogue(text, shown=shown) for text in ("a", "left lung", "the ribs please", "b")], samples=2, seed=3)
    assert len(calls) == 1, "four requests with two samples each, in three chunks, share one pass of the vision tower"
    reasoner.reply([contract.dialogue("a", shown=contract.images(4, seed=3)), contract.dialogue("a", shown=contract.images(4, seed=2))])
    assert len(calls) == 3, "two cases take two passes"
    handle.remove()


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_contract(folders: dict[str, Path], name: str) -> None:
    contract.check_all(opened(folders[name], max_new_tokens=3))


def test_samples_differ_and_follow_the_seed(folders: dict[str, Path]) -> None:
    reasoner = opened(folders["qwen3_vl"], temperature=2.0)
    asked = [contract.dialogue("left lung", shown=contract.images())]
    first, again, other = (reasoner.reply(asked, samples=4, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert len(set(first)) > 1
    assert first != other
    assert reasoner.reply(asked, samples=2, seed=1)[0] == first[:2], "a sample does not depend on how many are drawn"
    sharp = opened(folders["qwen3_vl"], top_p=1e-6)
    assert set(sharp.reply(asked, samples=3, seed=5)[0]) == set(reasoner.reply(asked)[0]), "an empty nucleus is greedy"


def test_replies_hold_no_image_token(folders: dict[str, Path]) -> None:
    reasoner = opened(folders["qwen3_vl"], temperature=50.0, max_new_tokens=60)
    suppressed = {reasoner.tokenizer.convert_ids_to_tokens(i) for i in reasoner._suppressed}
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>"} <= suppressed
    assert len(reasoner.reply([contract.dialogue("x", shown=contract.images())], samples=4, seed=1)[0]) == 4


def test_control_tokens_in_a_request_are_text(folders: dict[str, Path]) -> None:
    reasoner = opened(folders["qwen3_vl"])
    text = reasoner.chat(contract.dialogue("<|im_end|><|image_pad|>", shown=contract.images(2)))
    assert text.count("<|image_pad|>") == 2
    assert text.count("<|im_end|>") == 2


def test_a_bare_folder_and_the_name_are_the_same_and_identity_follows_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    bare, named = opened(folders["idefics3"]), load_reasoner(f"vlm:{folders['idefics3']}", max_new_tokens=TOKENS)
    assert bare.card.identity == named.card.identity
    assert bare.card.identity != opened(folders["idefics3"], max_new_tokens=TOKENS + 1).card.identity
    copied = shutil.copytree(folders["idefics3"], tmp_path / "copy")
    assert opened(copied).card.identity == bare.card.identity
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8] ^= 1
    weights.write_bytes(bytes(data))
    assert opened(copied).card.identity != bare.card.identity


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads attributes that transformers deprecates
        model = get_peft_model(
            AutoModelForImageTextToText.from_pretrained(folders["qwen3_vl"]), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def test_an_adapter_is_put_on_the_base_that_it_names_or_is_given(folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    asked = [contract.dialogue(text, shown=contract.images()) for text in ("left lung", "the ribs")]
    adapted, plain = opened(adapter), opened(folders["qwen3_vl"])
    assert adapted.reply(asked) != plain.reply(asked)
    assert adapted.card.identity != plain.card.identity
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(WeightsError, match=r"nobody/nothing.*base model of the adapter"):
        opened(moved)
    assert opened(moved, base=folders["qwen3_vl"]).reply(asked) == adapted.reply(asked)
    shutil.copytree(folders["qwen3_vl"], moved / "base")
    assert opened(moved).reply(asked) == adapted.reply(asked)


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit|no weight that fits"):
        opened(adapter, base=folders["idefics3"])
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(WeightsError, match="damaged"):
        opened(broken)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors"):
        opened(broken)


def test_damaged_missing_and_foreign_weights_are_sentences(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["idefics3"], tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        opened(folder)
    from safetensors.torch import load, save

    tensors = load(whole)
    tensors.pop(next(name for name in tensors if "v_proj" in name))
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))
    with pytest.raises(WeightsError, match="lack 1 tensors"):
        opened(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"no \*\.safetensors.*pytorch_model\.bin"):
        opened(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    weights.write_bytes(whole)
    with pytest.raises(ModelError, match="cannot be loaded"):
        opened(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError):
        opened(folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Qwen/Qwen3-VL-4B-Instruct", r"is not on this machine.*hf download Qwen/Qwen3-VL-4B-Instruct"),
        ("vlm:./no/such/folder", "There is no model folder"),
        ("vlm", "needs a model"),
    ],
)
def test_what_is_not_here_is_a_sentence_at_once(name: str, sentence: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ModelError, match=sentence):
        load_reasoner(name)
    assert time.perf_counter() - start < 10, "offline means that no network is waited for"


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"unheard_of": 1}, {"dtype": "int8"}, {"dtype": "float1"}]
)
def test_settings_that_cannot_be_are_refused(folders: dict[str, Path], settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        opened(folders["qwen3_vl"], **settings)


def test_half_precision_loads(folders: dict[str, Path]) -> None:
    reasoner = opened(folders["qwen3_vl"], dtype="bfloat16", max_new_tokens=2)
    assert str(reasoner.model.dtype) == "torch.bfloat16"
    assert len(reasoner.reply([contract.dialogue("x", shown=contract.images())])) == 1


def test_loading_says_nothing_and_without_peft_an_adapter_names_the_command(folders: dict[str, Path], adapter: Path) -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from seerseg.reasoners import load_reasoner\nfrom seerseg.errors import MissingExtraError\n"
        f"load_reasoner({str(folders['qwen3_vl'])!r}).reply([])\n"
        f"try: load_reasoner({str(adapter)!r})\nexcept MissingExtraError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stdout.rstrip().endswith("needs the package peft: pip install peft.")
    assert done.stderr == ""


def test_torchvision_state_tells_absent_ok_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchvision_state() in ("absent", "ok")
    (tmp_path / "halfbroken_package.py").write_text("raise RuntimeError('operator does not exist')")
    (tmp_path / "whole_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert (probe("halfbroken_package"), probe("whole_package"), probe("no_such_package")) == ("broken", "ok", "absent")


def test_a_broken_torchvision_is_a_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = (
        "from seerseg.reasoners import load_reasoner\nfrom seerseg.errors import ModelError\n"
        f"try: load_reasoner({str(folders['qwen3_vl'])!r})\nexcept ModelError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    )
    assert "pip uninstall torchvision" in done.stdout
