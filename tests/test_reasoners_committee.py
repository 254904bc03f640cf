"""Several reasoners about one request."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import reasoner_contract as contract
from hypothesis import given
from hypothesis import strategies as st

from seerseg.errors import UsageError
from seerseg.protocols.messages import Message
from seerseg.reasoners import load_reasoner
from seerseg.reasoners.base import ReasonerCard, Weighed, WeighingReasoner
from seerseg.reasoners.committee import DISSENT, CommitteeReasoner


def said(answer: str, why: str = "r") -> str:
    return f"<evidence>e</evidence><rationale>{why}</rationale><answer>{answer}</answer>"


class Plain:
    """Answers by a table of the request's last word; it weighs nothing."""

    def __init__(self, name: str, table: dict[str, str]) -> None:
        self.card = ReasonerCard(name=name, identity=f"{name}-1", licence="CC0", sees_images=False)
        self.table = table

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        return [[said(self.table.get(_asked(d), "absent"), self.card.name)] * samples for d in dialogues]


class Weigher(Plain):
    """Its table has shares; of other requests it knows nothing."""

    def __init__(self, name: str, shares: dict[str, dict[str, float]]) -> None:
        super().__init__(name, {})
        self.shares = shares

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        found = [self.shares.get(_asked(d), {}) for d in dialogues]
        return [[Weighed(said(a, self.card.name), s) for a, s in sorted(f.items(), key=lambda p: -p[1])] for f in found]


def _asked(dialogue: Sequence[Message]) -> str:
    return dialogue[-1].text.split("<raw_prompt>")[1].split("<")[0]


def shares(found: Sequence[Weighed]) -> dict[str, float]:
    return {w.reply.split("<answer>")[1].split("<")[0]: w.share for w in found}


def test_shares_are_multiplied_and_who_knows_nothing_is_not_heard() -> None:
    one = Weigher("one", {"q": {"liver": 0.6, "spleen": 0.4}, "alone": {"liver": 0.7, "spleen": 0.3}})
    two = Weigher("two", {"q": {"Spleen": 0.9, "liver": 0.1}})
    both = CommitteeReasoner([one, two])
    together, alone, nobody = both.weigh([contract.dialogue(t) for t in ("q", "alone", "none")])
    assert shares(together).keys() == {"Spleen", "liver"}
    least = DISSENT / 2
    expected = (0.9 * 0.4 + least) * (0.9 * 0.9 + least), (0.9 * 0.6 + least) * (0.9 * 0.1 + least)
    assert together[0].share == pytest.approx(expected[0] / sum(expected))
    assert "two" in together[0].reply, "the reply of the member that is surer"
    assert shares(alone) == {"liver": pytest.approx(0.9 * 0.7 + least), "spleen": pytest.approx(0.9 * 0.3 + least)}
    assert nobody == []
    assert both.reply([contract.dialogue("none")]) == one.reply([contract.dialogue("none")])


def test_a_member_that_cannot_weigh_gives_all_of_its_say_to_its_reply() -> None:
    both = CommitteeReasoner([Plain("plain", {"q": "liver"}), Weigher("weigher", {"q": {"spleen": 0.5, "liver": 0.5}})])
    (found,) = both.weigh([contract.dialogue("q")])
    assert list(shares(found)) == ["liver", "spleen"]
    assert found[0].share > 0.8
    assert both.reply([contract.dialogue("q")])[0][0].endswith("<answer>liver</answer>")


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1.0), max_size=4), min_size=2, max_size=4))
def test_shares_sum_to_one_and_nothing_is_ruled_out(tables: list[dict[str, float]]) -> None:
    members = [Weigher(str(i), {"q": {a: s / sum(t.values()) for a, s in t.items()}}) for i, t in enumerate(tables)]
    (found,) = CommitteeReasoner(members).weigh([contract.dialogue("q")])
    assert set(shares(found)) == {a for t in tables for a in t}
    assert not found or sum(w.share for w in found) == pytest.approx(1.0)
    assert all(w.share > 0 for w in found)
    assert [w.share for w in found] == sorted((w.share for w in found), reverse=True)


class Once(Weigher):
    """Counts how often it is asked, and says something else than what it finds likeliest."""

    def __init__(self, name: str, table: dict[str, dict[str, float]], says: str) -> None:
        super().__init__(name, table)
        self.says, self.weighed, self.replied = says, 0, 0

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        self.weighed += len(dialogues)
        return [[Weighed(w.reply, w.share, f">{self.says}<" in w.reply) for w in found] for found in super().weigh(dialogues)]

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        self.replied += len(dialogues)
        return [[said(self.says, self.card.name)] * samples for _ in dialogues]


def test_who_alone_has_an_opinion_speaks_for_itself_and_is_asked_once() -> None:
    own = Once("own", {"q": {"liver": 0.6, "spleen": 0.4}}, says="spleen")
    both = CommitteeReasoner([Weigher("silent", {}), own])
    assert both.reply([contract.dialogue("q"), contract.dialogue("none")]) == [[said("spleen", "own")], [said("absent", "silent")]]
    assert (own.weighed, own.replied) == (2, 0), "what it weighed tells what it says"
    (drawn,) = both.reply([contract.dialogue("q")], samples=300, seed=1)
    assert 0.5 < sum("liver" in reply for reply in drawn) / 300 < 0.7


def test_a_lone_member_that_cannot_weigh_is_sampled_itself() -> None:
    class Sampled(Plain):
        def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
            return [[said(f"{seed}-{n}") for n in range(samples)] for _ in dialogues]

    both = CommitteeReasoner([Sampled("plain", {}), Weigher("silent", {})])
    assert both.reply([contract.dialogue("q")], samples=2, seed=5) == [[said("5-0"), said("5-1")]]


def test_contract() -> None:
    committee = load_reasoner("committee:lexicon,verbatim")
    assert isinstance(committee, WeighingReasoner)
    contract.check_card(committee)
    contract.check_shape(committee)
    contract.check_deterministic(committee)
    contract.check_survives(committee)
    assert committee.card.sees_images is False
    assert committee.card.identity != load_reasoner("committee:verbatim,lexicon").card.identity


def test_samples_are_drawn_by_share() -> None:
    even = {"q": {"liver": 0.5, "spleen": 0.5}}
    both = CommitteeReasoner([Weigher("one", {"q": {"liver": 0.7, "spleen": 0.3}}), Weigher("two", even)])
    (drawn,) = both.reply([contract.dialogue("q")], samples=400, seed=3)
    assert 0.6 < sum("liver" in reply for reply in drawn) / 400 < 0.8
    assert both.reply([contract.dialogue("q")], samples=400, seed=3) == [drawn]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("committee", "at least two reasoners"),
        ("committee:lexicon", "at least two reasoners"),
        ("committee:lexicon,lexcon", "Did you mean lexicon"),
        ("committee:lexicon,committee", "cannot be a member"),
    ],
)
def test_what_is_no_committee(source: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_reasoner(source)
