"""The lexicon: what it answers on hand-written requests, what it refuses, and that it is quick and never wrong about sides."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import reasoner_contract as contract
from hypothesis import given, settings
from hypothesis import strategies as st
from lexicon_requests import ABDOMEN, CHEST, HEAD, HIPPOCAMPUS, METS, PELVIS, numbered

from seerseg.reasoners import load_reasoner
from seerseg.reasoners.lexicon import LexiconReasoner
from seerseg.vocabulary import LabelDescription, Vocabulary

LEXICON = LexiconReasoner()
REPLY = re.compile(r"<evidence>[^<>]+</evidence><rationale>[^<>]+</rationale><answer>([^<>]+)</answer>")


def answer(request: str, targets: tuple[str, ...] = (), modality: str | None = None) -> str:
    return LEXICON.decide(request, targets, modality=modality).answer


def accuracy(half: int) -> float:
    rows = [row for row in numbered() if row[0] % 2 == half]
    return sum(answer(text, names) == meant for _, names, text, meant in rows) / len(rows)


def test_contract() -> None:
    contract.check_all(LEXICON)


def test_accuracy_on_the_tuning_half_and_on_the_half_that_nobody_tuned_on() -> None:
    """Measured when written: 1.00 (83 of 83) and 0.99 (82 of 83). Both halves have one author, so expect less of strangers."""
    assert len(numbered()) >= 160
    assert len({meant for *_, meant in numbered()}) >= 25
    assert accuracy(0) >= 0.97
    assert accuracy(1) >= 0.94


def test_no_request_of_either_half_is_answered_with_the_other_side() -> None:
    for _, names, text, meant in numbered():
        said = answer(text, names)
        for side, other in (("left", "right"), ("right", "left")):
            if meant.startswith(f"{side} "):
                assert not said.startswith(f"{other} "), text


@pytest.mark.parametrize("structure", ["lung", "kidney", "adrenal gland", "hip bone", "hippocampus", "caudate nucleus"])
@pytest.mark.parametrize(
    "wording",
    [
        "{side} {x}",
        "{x} {side}",
        "{x}, {side} side",
        "the {x} on the {side}",
        "{x}_{side}",
        "{side}-sided {x}",
        "not the {other} {x}",
        "the {x} but not the {other} one",
        "{x} opposite to the {other} one",
        "please segment the {x} on the patient's {side} side, thanks",
    ],
)
@pytest.mark.parametrize(("side", "other"), [("left", "right"), ("right", "left")])
def test_side_is_kept_in_every_wording(structure: str, wording: str, side: str, other: str) -> None:
    names = (f"left {structure}", f"right {structure}", "liver", "skull")
    assert answer(wording.format(side=side, other=other, x=structure), names) == f"{side} {structure}"


def test_side_of_the_image_is_the_patients_other_side() -> None:
    assert answer("the lung on the left side of the image", CHEST) == "right lung"
    assert answer("kidney on image right", ABDOMEN) == "left kidney"


@pytest.mark.parametrize(
    ("request_text", "names", "modality", "meant"),
    [
        ("LV", ("heart left ventricle", "myocardium"), None, "heart left ventricle"),
        ("LV", ("left lateral ventricle", "right lateral ventricle"), None, "left lateral ventricle"),
        ("LV for ejection fraction", (), None, "heart left ventricle"),
        ("LV in this brain MR with hydrocephalus", (), "MR", "left lateral ventricle"),
        ("PV", ("portal vein", "liver"), None, "portal vein"),
        ("PV", ("pulmonary vein", "heart"), None, "pulmonary vein"),
    ],
)
def test_an_abbreviation_means_what_the_names_or_the_words_around_it_allow(
    request_text: str, names: tuple[str, ...], modality: str | None, meant: str
) -> None:
    decision = LEXICON.decide(request_text, names, modality=modality)
    assert decision.answer == meant
    assert "ABBR_DISAMBIGUATE" in decision.tags


UNRELATED = (
    "good morning",
    "what time is it",
    "asdf qwerty zxcv",
    "lorem ipsum dolor sit amet",
    "segment the car",
    "outline the tree in the garden",
    "find my glasses",
    "1234",
    "??!!",
    "bitte markieren Sie die Katze",
    "password reset",
    "why is the sky blue",
    "the thing",
    "it",
    "organ",
    "rotate the picture",
    "make it brighter",
    "right away please",
    "open the pod bay doors",
    "how tall is the Eiffel tower",
    "stapler",
    "banana bread recipe",
    "window level settings",
    "I love you",
    "river bank",
    "loading screen",
    "sliver",
    "tree trunk",
    "sleeping bag",
    "what is left over",
    "the patient was discharged on Tuesday",
)


@pytest.mark.parametrize("names", [CHEST, ABDOMEN, HEAD, HIPPOCAMPUS, PELVIS, METS], ids=lambda names: names[0])
def test_unrelated_words_are_never_answered_with_a_listed_name(names: tuple[str, ...]) -> None:
    assert {text: said for text in UNRELATED if (said := answer(text, names)) != "absent"} == {}


def test_structures_that_are_not_listed_are_absent_however_they_are_said() -> None:
    for text in (
        "uterus",
        "utrus",
        "womb",
        "organ in which a baby grows",
        "the seahorse",
        "left kidney",
        "LK",
        "Please contour the prostate for brachytherapy.",
    ):
        decision = LEXICON.decide(text, CHEST)
        assert decision.answer == "absent", text
        assert "OUT_OF_REGION_REJECT" in decision.tags


def test_a_side_picks_the_one_listed_part_of_that_side() -> None:
    assert answer("the right ventricle of the brain", HEAD) == "right lateral ventricle"


def test_names_are_answered_as_they_are_listed() -> None:
    assert answer("spine", ("Vertebral_Column (Spine)", "RIBS")) == "Vertebral_Column (Spine)"
    assert answer("left kidney", ("kidney_left", "kidney_right")) == "kidney_left"
    assert answer("the gizmo", ("blue gizmo", "red widget")) in ("blue gizmo", "absent")
    assert answer("blue gizmo please", ("blue gizmo", "red widget")) == "blue gizmo"
    assert answer("blue gizno", ("blue gizmo", "red widget")) == "blue gizmo"


def test_a_dataset_brings_its_own_words() -> None:
    described = {
        "Anterior": LabelDescription("anterior hippocampus", ("uncal bulb",)),
        "Posterior": LabelDescription("posterior hippocampus"),
    }
    own = load_reasoner("lexicon", descriptions=described)
    assert isinstance(own, LexiconReasoner)
    assert own.decide("uncal bulb", HIPPOCAMPUS).answer == "anterior hippocampus"
    assert answer("uncal bulb", HIPPOCAMPUS) == "absent"
    assert own.card.identity != LEXICON.card.identity


def test_in_experiments_it_knows_the_words_of_a_split_alone(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    file.write_text('{"schema": 1, "entries": [{"name": "liver", "synonyms": ["hepar", {"form": "iecur", "split": "test"}]}]}')
    everything, train = load_reasoner(f"lexicon:{file}"), load_reasoner(f"lexicon:{file}", splits=["train"])
    asked = [contract.dialogue(text, targets=("liver",)) for text in ("hepar", "iecur")]
    assert [r[0].endswith("<answer>liver</answer>") for r in everything.reply(asked)] == [True, True]
    assert [r[0].endswith("<answer>liver</answer>") for r in train.reply(asked)] == [True, False]
    assert everything.card.identity != train.card.identity


@pytest.mark.parametrize(
    ("request_text", "meant"),
    [
        ("the hippocampus, but not its posterior part", "anterior hippocampus"),
        ("hippocampus without the head", "posterior hippocampus"),
        ("hippocampal body and tail", "posterior hippocampus"),
        ("the whole hippocampus", "hippocampus"),
    ],
)
def test_a_part_that_is_excluded_leaves_the_rest_of_the_whole(request_text: str, meant: str) -> None:
    assert answer(request_text, (*HIPPOCAMPUS, "hippocampus", "liver", "brain")) == meant


def test_without_names_the_canonical_one_or_the_cleaned_words_are_answered() -> None:
    assert answer("plz segmnt the lft kidny") == "left kidney"
    assert answer("windpipe") == "trachea"
    assert answer("kidneys") == "kidneys"
    assert answer("Could you please outline the frobnicator of Vater?") == "frobnicator of Vater"
    assert answer("") == "absent"


def test_the_rationale_names_repairs_and_readings() -> None:
    decision = LEXICON.decide("plz segmnt the lft lnug", CHEST)
    assert "lnug -> lung" in decision.rationale
    assert "MESSY_INPUT_REPAIR" in decision.tags
    beside = LEXICON.decide("the lung on the side of the heart", CHEST)
    assert (beside.answer, "lies on the left" in beside.rationale) == ("left lung", True)


def test_a_skill_that_was_shown_is_named_only_when_its_kind_was_used() -> None:
    message = contract.dialogue("lft lnug", targets=CHEST)
    shown = message[1].text.replace(
        "<raw_prompt>", "<skill_bank>\n[1] s-7 (MESSY_INPUT_REPAIR) when: typos do: mend\n</skill_bank>\n<raw_prompt>"
    )
    from seerseg.protocols.messages import text_message

    assert "Skill: s-7." in LEXICON.reply([[text_message("user", shown)]])[0][0]
    assert "Skill" not in LEXICON.reply([[text_message("user", shown.replace("MESSY_INPUT_REPAIR", "REPORT_STYLE_PARSE"))]])[0][0]


@settings(max_examples=30)
@given(st.text(max_size=300), st.lists(st.text(min_size=1, max_size=20), max_size=4))
def test_any_request_and_any_names_give_a_wellformed_reply(request: str, names: list[str]) -> None:
    listed = tuple(dict.fromkeys(n.strip() for n in names if n.strip()))
    decision = LEXICON.decide(request, listed)
    found = REPLY.fullmatch(decision.reply)
    assert found is not None
    assert len(decision.answer) <= 200
    if not any(c in "<>" for name in listed for c in name) and listed:
        assert decision.answer in (*listed, "absent") or decision.answer in Vocabulary.load() or decision.answer in names


def test_a_request_takes_milliseconds() -> None:
    rows = numbered()
    for names in {names for _, names, _, _ in rows}:
        answer("x", names)
    start = time.process_time()
    for _, names, text, _ in rows:
        answer(text, names)
    assert (time.process_time() - start) / len(rows) < 0.02, "about 0.5 ms on an idle core"
    start = time.process_time()
    answer("left lung " * 1000, CHEST)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("put the liver in a mask", "liver"),
        ("Please segment the spleen visible on this CT scan", "spleen"),
        ("PLEASE PUT THE LIVER ON THE SCAN", "liver"),
        ("outline the PUT on both sides", "putamen"),
        ("left ON", "left optic nerve"),
    ],
)
def test_everyday_words_are_abbreviations_only_where_so_written(text: str, answer: str) -> None:
    assert LEXICON.decide(text, (), modality="MR").answer == answer


@pytest.mark.parametrize(
    ("request_text", "names", "meant"),
    [
        ("hippocampal head 3D", HIPPOCAMPUS, "anterior hippocampus"),  # "3D" is no way to write "ED"
        ("Annotation request no. 14: hippocampal head.", HIPPOCAMPUS, "anterior hippocampus"),  # a number, not a refusal
        ("listen please outline the hypo campal head okay thanks", HIPPOCAMPUS, "anterior hippocampus"),
        ("no head, the hippocampus without it", HIPPOCAMPUS, "posterior hippocampus"),
        ("the caudal end of the spleen", ("spleen", "hippocampal tail"), "spleen"),  # no slip of "cauda"
        ("k1dney left", ("left kidney", "right kidney"), "left kidney"),
    ],
)
def test_words_that_were_once_misread(request_text: str, names: tuple[str, ...], meant: str) -> None:
    assert answer(request_text, names) == meant


def test_it_weighs_what_it_knows() -> None:
    asked = [contract.dialogue(text, targets=HIPPOCAMPUS) for text in ("hippocampal head", "the hippocampus", "the gizmo", "the spleen")]
    known, whole, unknown, elsewhere = LEXICON.weigh(asked)
    told = [[(w.reply.split("<answer>")[1].split("<")[0], w.share) for w in found] for found in (known, whole, elsewhere)]
    assert told[0] == [("anterior hippocampus", 1.0)]
    assert sorted(told[1]) == [(name, pytest.approx(1 / 3)) for name in ("anterior hippocampus", "hippocampus", "posterior hippocampus")]
    assert told[2] == [("absent", 1.0)]
    assert unknown == [], "of words that it does not know it has no opinion"
    assert LEXICON.reply(asked)[0][0] == known[0].reply
