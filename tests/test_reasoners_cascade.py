"""Reasoners one after the other: who speaks, who is believed, and that nothing is loaded before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import reasoner_contract as contract
import tiny_vlms

from seerseg.errors import ModelError, UsageError
from seerseg.model import DEFAULT_REASONER, ModelSpec, open_model, read_spec, write_spec
from seerseg.protocols.messages import Message
from seerseg.reasoners import has_rules, joined, load_reasoner, parts_of
from seerseg.reasoners.base import ReasonerCard, Weighed, WeighingReasoner
from seerseg.reasoners.cascade import SURE, CascadeReasoner
from seerseg.reasoners.lazy import LazyReasoner, LazyWeigher
from seerseg.reasoners.lexicon import LexiconReasoner
from seerseg.reasoners.opinions import spoken
from seerseg.vocabulary import LabelDescription

ABDOMEN = ("liver", "spleen", "left kidney", "right kidney", "left scapula", "lumbar vertebral column")


def said(answer: str) -> str:
    return f"<evidence>e</evidence><rationale>r</rationale><answer>{answer}</answer>"


class Told:
    """Answers by a table of requests: name -> share; what is marked with * it says when plainly asked, with ? is unsound. It keeps what it
    was asked."""

    def __init__(self, table: dict[str, dict[str, float]], otherwise: str = "absent") -> None:
        self.card = ReasonerCard(name="told", identity="told-1", licence="CC0")
        self.table, self.otherwise, self.asked = table, otherwise, list[str]()

    def _opinion(self, dialogue: Sequence[Message]) -> list[Weighed]:
        found = self.table.get(_asked(dialogue), {})
        return [Weighed(said(a.strip("*?")), s, "*" in a, "?" not in a) for a, s in sorted(found.items(), key=lambda pair: -pair[1])]

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        return [[spoken(self._opinion(d) or [Weighed(said(self.otherwise), 1.0)]).reply] * samples for d in dialogues]


class Weigher(Told):
    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        self.asked += [_asked(d) for d in dialogues]
        return [self._opinion(d) for d in dialogues]


def _asked(dialogue: Sequence[Message]) -> str:
    return dialogue[-1].text.split("<raw_prompt>")[1].split("<")[0]


def answers(replies: list[list[str]]) -> list[str]:
    return [reply.split("<answer>")[1].split("<")[0] for reply, *_ in replies]


def asking(*requests: str, targets: tuple[str, ...] = ABDOMEN) -> list[list[Message]]:
    return [contract.dialogue(request, targets=targets) for request in requests]


def test_the_second_is_asked_about_the_rest_alone_and_believed_where_it_is_sure() -> None:
    sure, unsure = {"spleen*": SURE + 0.01, "liver": 0.2}, {"spleen*": SURE - 0.01, "liver": 0.2}
    other = {"spleen": SURE + 0.1, "absent*": 0.2}  # it would not say so itself
    unsound = {"spleen*?": 0.9}
    second = Weigher({"zorb": sure, "blim": unsure, "quax": other, "the liver": {"spleen*": 1.0}, "plon": unsound})
    cascade = CascadeReasoner([LexiconReasoner(), second])
    replies = cascade.reply(asking("the liver", "zorb", "blim", "quax", "fnord", "the left ovary", "plon"))
    assert answers(replies) == ["liver", "spleen", *["absent"] * 5]
    assert second.asked == ["zorb", "blim", "plon"], "not what the rules read or know not to be there, nor what it calls absent itself"
    assert replies[2] == LexiconReasoner().reply(asking("blim"))[0], "where nobody is sure the first replies"


def test_one_that_cannot_weigh_is_believed_and_a_third_is_asked_last() -> None:
    second, third = Weigher({"zorb": {"spleen*": 0.9}}), Told({}, otherwise="liver")
    assert answers(CascadeReasoner([LexiconReasoner(), second, third]).reply(asking("zorb", "blim"))) == ["spleen", "liver"]


def test_shares_are_those_of_the_first_with_an_opinion() -> None:
    second = Weigher({"zorb": {"spleen*": 0.2, "liver": 0.15}})
    cascade = CascadeReasoner([LexiconReasoner(), second])
    assert isinstance(cascade, WeighingReasoner)
    rules, guessed, nobody = cascade.weigh(asking("the liver", "zorb", "blim"))
    assert [w.share for w in rules] == [1.0]
    assert [w.share for w in guessed] == [0.2, 0.15], "who asks for shares decides by them"
    assert nobody == []


def test_samples_are_drawn_by_share_and_rules_repeat_themselves() -> None:
    second = Weigher({"zorb": {"spleen*": 0.7, "liver": 0.3}})
    rules, drawn = CascadeReasoner([LexiconReasoner(), second]).reply(asking("the liver", "zorb"), samples=300, seed=2)
    assert len(set(rules)) == 1
    assert 0.6 < sum("spleen" in reply for reply in drawn) / 300 < 0.8


@pytest.mark.parametrize(
    ("request_text", "answer", "doubt"),
    [
        ("the left ovary", "absent", None),
        ("hepatic tissue", "liver", None),
        ("pancreatic tissue", "absent", None),
        ("zorb", "absent", "unknown"),
        ("please outline the zorbial muscle", "absent", "general"),
        ("mark the zorb beside the left clavicle bone", "absent", "landmark"),
        ("outline the zorb but not the liver", "absent", None),
        ("the zorbial ovary", "absent", "unexplained"),
        ("the left ovvary", "absent", "misspelt"),
        ("the organ that makes insulin", "absent", "described"),
    ],
)
def test_why_absent_may_be_a_misreading(request_text: str, answer: str, doubt: str | None) -> None:
    found = LexiconReasoner().decide(request_text, ABDOMEN)
    assert (found.answer, found.doubt) == (answer, doubt), found


def test_a_model_is_loaded_when_it_is_first_asked() -> None:
    class Broken:
        card = ReasonerCard(name="broken", identity="1")

        def __call__(self) -> Weigher:
            raise ModelError("The weights are damaged.")

    loaded: list[Weigher] = []
    lazy = LazyWeigher(ReasonerCard("told", "told-1"), lambda: loaded.append(Weigher({"zorb": {"spleen*": 1.0}})) or loaded[-1])
    cascade = CascadeReasoner([LexiconReasoner(), lazy])
    assert "told-1" in cascade.card.source
    assert answers(cascade.reply(asking("the liver", "the left ovary"))) == ["liver", "absent"]
    assert not lazy.loaded
    assert answers(cascade.reply(asking("zorb"))) == answers(cascade.reply(asking("zorb"))) == ["spleen"]
    assert len(loaded) == 1
    assert LazyReasoner(lazy.card, Broken()).reply([]) == []
    with pytest.raises(ModelError, match="damaged"):
        CascadeReasoner([LexiconReasoner(), LazyWeigher(lazy.card, Broken())]).reply(asking("zorb"))


def test_the_default_starts_without_torch_and_its_card_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    program = (
        "import sys; from seerseg.reasoners import load_reasoner; made = load_reasoner('cascade'); print(made.card.source);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'loaded too early'"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rules, nano = made.stdout.strip().split(", ")
    assert rules == load_reasoner("lexicon").card.identity
    assert nano == load_reasoner("nano").card.identity
    ahead = load_reasoner("cascade").members[1]  # type: ignore[attr-defined]
    assert ahead.card == ahead.made.card


@pytest.mark.parametrize("named", ["maker/tiny", "folder"])
def test_a_large_model_by_hub_id_or_folder_is_loaded_when_it_is_needed(tmp_path: Path, named: str) -> None:
    kept = tmp_path / "models--maker--tiny"
    snapshot = kept / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    tiny_vlms.qwen(snapshot, "3")
    program = (
        "import sys; from seerseg.reasoners import load_reasoner; made = load_reasoner(sys.argv[1]).members[1];"
        "assert not made.loaded and not {'torch', 'transformers'} & set(sys.modules), 'loaded too early';"
        "assert made.card == made.made.card"
    )
    member = str(snapshot) if named == "folder" else named
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program, f"cascade:lexicon,{member}"], env=environment, check=True)


def test_contract() -> None:
    cascade = load_reasoner("cascade:lexicon,verbatim")
    contract.check_all(cascade)
    assert cascade.card.sees_images is False
    assert cascade.card.identity != load_reasoner("cascade:verbatim,lexicon").card.identity
    told = load_reasoner("cascade:lexicon,verbatim", splits=["train"])
    assert told.card.identity != cascade.card.identity, "settings reach the rules"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("cascade:lexicon", "at least two reasoners"),
        ("cascade:lexicon,lexcon", "Did you mean lexicon"),
        ("cascade:lexicon,committee:nano,lexicon", "cannot be a member"),
    ],
)
def test_what_is_no_cascade(source: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_reasoner(source)


def test_names_and_their_parts() -> None:
    assert parts_of("cascade") == parts_of(" cascade:lexicon, nano ") == ["lexicon", "nano"]
    assert parts_of("nano:folder,with,commas") == ["nano:folder,with,commas"]
    assert [has_rules(n) for n in ("cascade", "committee:nano,lexicon", "lexicon", "nano", "committee:nano,verbatim")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert joined("cascade", ["lexicon", "nano"]) == "cascade"
    assert joined("cascade", ["lexicon", "nano:x"]) == "cascade:lexicon,nano:x"


def test_the_default_and_what_manifests_say(tmp_path: Path) -> None:
    assert ModelSpec().reasoner == DEFAULT_REASONER == "cascade"
    model = tmp_path / "model"
    (model / "sft").mkdir(parents=True)
    write_spec(model, ModelSpec(reasoner=f"cascade:lexicon,nano:{model / 'sft'}"))
    moved = tmp_path / "moved"
    model.rename(moved)
    assert read_spec(moved).reasoner == f"cascade:lexicon,nano:{moved / 'sft'}"
    write_spec(moved, ModelSpec(reasoner="lexicon", descriptions={"L1": LabelDescription("liver", ("zorb",))}))
    assert open_model(moved).reasoner.card.name == "lexicon"
    write_spec(moved, ModelSpec(descriptions={"L1": LabelDescription("liver", ("zorb",))}))
    assert answers(open_model(moved).reasoner.reply(asking("zorb"))) == ["liver"], "the rules in it are told what labels mean"
