"""The shipped nano reasoner: its folder, its tokeniser, and what it has learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reasoner_contract as contract
import torch

from seerseg.episode import Targets, open_dialogues, reason
from seerseg.errors import ModelError, WeightsError
from seerseg.protocols.seer import SYSTEM, SeerProtocol, normalise_name
from seerseg.reasoners import available_reasoners, load_reasoner
from seerseg.reasoners.nano import SHIPPED, NanoReasoner, _wider
from seerseg.segmenters import load_segmenter
from seerseg.views import CaseViews, ViewSpec, render
from seerseg.vocabulary import Vocabulary
from seerseg.volume import Grid, Volume
from seerseg_data.nano_vocabulary import CANONICAL
from seerseg_data.phantoms import phantom

PROTOCOL = SeerProtocol()
MOST_BYTES = 15_000_000
CHEST = ("ribs", "vertebral column", "left lung", "right lung", "lungs", "heart", "aorta", "trachea")
pytestmark = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped weights are not in this checkout")


@pytest.fixture(scope="module")
def nano() -> NanoReasoner:
    made = load_reasoner("nano")
    assert isinstance(made, NanoReasoner)
    return made


@pytest.fixture(scope="module")
def chest() -> CaseViews:
    drawn = phantom("chest", 7001, spacing_zyx_mm=(8.0, 5.0, 5.0))
    return render(Volume(drawn.array_zyx, Grid(drawn.array_zyx.shape, drawn.affine), "CT"), ViewSpec(size_px=448))


def answers(nano: NanoReasoner, views: CaseViews, requests: list[str], names: tuple[str, ...]) -> list[str]:
    dialogues = open_dialogues(views, requests, protocol=PROTOCOL, targets=Targets(names, closed=bool(names)))
    reason(dialogues, nano, retries=0)
    return ["absent" if d.answer and d.answer.absent else d.answer.target or "" if d.answer else "" for d in dialogues]


def test_the_folder_is_small_and_says_what_it_is() -> None:
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= MOST_BYTES
    card = (SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8")
    for said in ("CC-BY-SA", "Not for clinical use", "scripts/train_nano_reasoner.py", "seerseg_data/splits/hippocampus.json", "Limits"):
        assert said in card
    assert "nano" in available_reasoners()
    assert json.loads((SHIPPED / "config.json").read_text())["model_type"] == "qwen3_vl"


def test_card_and_settings(nano: NanoReasoner, tmp_path: Path) -> None:
    assert (nano.card.name, nano.card.licence, nano.card.source) == ("nano", "CC-BY-SA-4.0", "shipped with seerseg")
    assert load_reasoner("nano", max_new_tokens=8).card.identity != nano.card.identity
    with pytest.raises(ModelError, match="no setting 'beams'"):
        load_reasoner("nano", beams=2)
    with pytest.raises(WeightsError, match="no model folder"):
        load_reasoner(f"nano:{tmp_path / 'none'}")


def test_contract(nano: NanoReasoner) -> None:
    contract.check_card(nano)
    contract.check_deterministic(nano)


@pytest.mark.slow
def test_odd_requests_are_survived(nano: NanoReasoner) -> None:
    contract.check_survives(nano)


def test_the_fixed_sentences_of_the_grammar_are_short(nano: NanoReasoner, chest: CaseViews) -> None:
    """A changed system prompt would be read word by word, which these weights never learnt: train anew after changing it."""
    assert len(nano.tokenizer(SYSTEM)["input_ids"]) <= 2
    encoded = nano.encode(PROTOCOL.opening(chest, "left lung", (), CHEST))
    assert len(encoded.ids) < 200


def test_names_are_written_as_they_are_read(nano: NanoReasoner) -> None:
    for name in (*CANONICAL, *Vocabulary.load().names):
        ids = nano.tokenizer(f"<answer>{name}</answer>")["input_ids"]
        said = nano.tokenizer.decode(ids, skip_special_tokens=True)
        assert normalise_name(said) == normalise_name(f"<answer>{name}</answer>")
        assert len(ids) <= 16


def test_replies_keep_the_grammar(nano: NanoReasoner, chest: CaseViews) -> None:
    asked = ["left lung", "plz outlne the ribs", "what about the spine?", "asdf", "the heart, not the lungs"]
    for names in (CHEST, (), load_segmenter("nano").capabilities.vocabulary):
        dialogues = [PROTOCOL.opening(chest, text, (), names) for text in asked]
        for reply in nano.reply(dialogues):
            assert PROTOCOL.wellformed(reply[0]) == 1.0, reply


def test_label_prompts_and_slips_on_a_phantom(nano: NanoReasoner, chest: CaseViews) -> None:
    assert answers(nano, chest, list(CHEST), CHEST) == list(CHEST)
    asked = ["lft lung", "plz segmnt the right lung", "segmnt the ribs", "the R lung", "outline teh heart pls", "aorta only"]
    expected = ["left lung", "right lung", "ribs", "right lung", "heart", "aorta"]
    found = answers(nano, chest, asked, CHEST)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 5, found


def test_answers_are_among_the_listed_names(nano: NanoReasoner, chest: CaseViews) -> None:
    asked = ["prostate", "left hippocampus", "asdf", "lung", "kidneys please"]
    for names in (CHEST, ("right kidney", "left kidney")):
        wholes = {whole for name in names for whole in Vocabulary.load().wholes(name) if Vocabulary.load().pieces(whole, names)}
        assert set(answers(nano, chest, asked, names)) <= {*names, *wholes, "absent"}


def test_it_weighs_the_listed_names(nano: NanoReasoner, chest: CaseViews) -> None:
    asked = ["left lung", "lft lung", "asdf", "left or right kidney", "the lungs"]
    for names in (CHEST, ()):
        weighed = nano.weigh([PROTOCOL.opening(chest, text, (), names) for text in asked])
        assert all(sum(w.share for w in found) == pytest.approx(1.0, abs=1e-5) for found in weighed if names)
        assert all([w.share for w in found] == sorted((w.share for w in found), reverse=True) for found in weighed)
        answered = [[normalise_name(w.reply.split("<answer>")[1].split("<")[0]) for w in found] for found in weighed]
        assert all(len(set(found)) == len(found) for found in answered)
        if names:
            assert answered[0][0] == "left lung"
            assert weighed[0][0].share > 0.5
            assert all({*map(normalise_name, names), "absent"} <= set(found) for found in answered)
        else:
            assert weighed == [[]] * len(asked), "without a list there is nothing to weigh"


def test_a_whole_means_a_part_where_only_parts_are_listed() -> None:
    assert _wider("hippocampus", ("anterior hippocampus", "posterior hippocampus"))
    assert _wider("left hippocampus", ("anterior hippocampus", "posterior hippocampus"))
    assert not _wider("left kidney", ("right kidney", "liver"))
    assert not _wider("prostate", ("left lung",))


def test_likelihoods_are_those_of_the_plain_forward(nano: NanoReasoner, chest: CaseViews) -> None:
    opening = PROTOCOL.opening(chest, "the left lung", (), CHEST)
    asked = nano.encode(opening)
    replies = ["<evidence>CT of the chest</evidence><rationale>left lung</rationale><answer>left lung</answer>", "no"]
    found = nano.likelihoods(opening, replies)
    for text, score in zip(replies, found, strict=True):
        said = nano.encode_reply(text)
        ids = torch.tensor([asked.ids + said])
        kinds = {name: torch.tensor([kind + [0] * len(said)]) for name, kind in asked.kinds.items()}
        with torch.no_grad():
            logits = nano.model(input_ids=ids, attention_mask=torch.ones_like(ids), **asked.images, **kinds).logits[0]
        steps = logits[len(asked.ids) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(steps[range(len(said)), said].sum()), abs=1e-3)


def test_what_is_not_listed_is_absent(nano: NanoReasoner, chest: CaseViews) -> None:
    asked = ["prostate", "left hippocampus", "urinary bladder", "left femur"]
    assert answers(nano, chest, asked, CHEST).count("absent") >= 3


def test_prefix_sharing_is_the_stock_generate(nano: NanoReasoner, chest: CaseViews) -> None:
    dialogues = [PROTOCOL.opening(chest, text, (), ()) for text in ("left lung", "could you kindly outline the ribs?", "spine")]
    shared = [r[0] for r in nano.reply(dialogues)]
    for dialogue, reply in zip(dialogues, shared, strict=True):
        text = nano.chat(dialogue)
        images = [image for message in dialogue for image in message.images]
        encoded = nano._encode([text], images)
        ids = nano.model.generate(**encoded, do_sample=False, max_new_tokens=96)
        assert nano.tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip() == reply


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the shipped reasoner opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_reasoner("nano")
