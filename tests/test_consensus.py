"""Several readings of a request: the one the others agree with, how sure it is, and abstaining."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seerseg.consensus import ConsensusSettings, medoid, reworded
from seerseg.episode import Episode
from seerseg.errors import UsageError
from seerseg.prediction import Predictor
from seerseg.prompts import Prompt
from seerseg.protocols.messages import Message
from seerseg.reasoners.base import ReasonerCard
from seerseg.segmenters.base import Capabilities, ModelCard, Segmentation, answered
from seerseg.skills.base import Query, Skill
from seerseg.skills.retrieval import FrozenBank
from seerseg.volume import Grid, Mask, Volume

GRID = Grid((4, 4, 4), np.eye(4))
VOLUME = Volume(np.zeros((4, 4, 4), np.int16), GRID, modality="CT")
BANK = FrozenBank.of([Skill("", "TAG", "slang", "answer liver", words=("the zorb", "zorby"), target="liver")])


def episode(count: int | None) -> Episode:
    """An episode whose mask holds the first `count` voxels, None for no mask."""
    if count is None:
        return Episode("q", "fault", (), None, None)
    array = np.zeros(64, bool)
    array[:count] = True
    return Episode("q", "ok" if count else "absent", (), None, Mask(array.reshape(4, 4, 4), GRID))


def test_the_medoid_agrees_most() -> None:
    assert medoid([episode(8)]) == (0, 1.0)
    place, agreement = medoid([episode(64), episode(8), episode(8), episode(9)])
    assert place == 1
    assert agreement == pytest.approx((2 * 8 / 72 + 1 + 16 / 17) / 3)
    assert medoid([episode(0), episode(0), episode(8)]) == (0, 0.5)
    assert medoid([episode(None), episode(8), episode(8)]) == (1, 0.5)


@given(st.lists(st.none() | st.integers(0, 64), min_size=1, max_size=6))
def test_agreement_is_a_share_and_order_breaks_ties_only(counts: list[int | None]) -> None:
    place, agreement = medoid([episode(c) for c in counts])
    assert 0 <= agreement <= 1
    again, same = medoid([episode(c) for c in reversed(counts)])
    assert same == pytest.approx(agreement)
    assert 0 <= place < len(counts) > again


def test_a_request_is_put_into_other_words_of_its_skill() -> None:
    query = Query("Outline The Zorb, please", "CT")
    assert reworded(query.text, BANK, query, 5) == ["Outline liver, please", "Outline zorby, please"]
    assert reworded(query.text, BANK, query, 1) == ["Outline liver, please"]
    assert reworded("the spleen", BANK, Query("the spleen"), 5) == []


class Sampler:
    """Answers "a b c" by its words in turn: the first greedily, the others as samples; a request of one word always by that word."""

    card = ReasonerCard(name="sampler", identity="sampler-1")

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        out = []
        for dialogue in dialogues:
            text = dialogue[-1].text
            words = text[text.rindex("<raw_prompt>") + 12 : text.rindex("</raw_prompt>")].split()
            chosen = words[:1] if samples == 1 and seed == 0 else [words[(1 + i) % len(words)] for i in range(samples)]
            out.append([f"<evidence>e</evidence><rationale>r</rationale><answer>{w}</answer>" for w in chosen])
        return out


class Sizes:
    """A segmenter that draws as many voxels as the name says."""

    capabilities = Capabilities(text="open")
    card = ModelCard(name="sizes", identity="sizes-1")

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        out = []
        for prompt in prompts:
            array = np.zeros(64, bool)
            array[: int(prompt.text or 0)] = True
            out.append(answered(volume, prompt, array.reshape(4, 4, 4)))
        return out


def test_prediction_keeps_the_medoid_and_says_how_sure_it_is() -> None:
    predictor = Predictor(Sizes(), Sampler(), consensus=ConsensusSettings(4))  # type: ignore[arg-type]
    outlier, plain = predictor.predict(VOLUME, ["64 8 8 9", "16"])
    assert int(outlier.mask.array.sum()) == 8
    assert outlier.episode.consensus.to_json() == {
        "agreement": pytest.approx((2 * 8 / 72 + 1 + 16 / 17) / 3, abs=1e-4),
        "readings": [{"text": "64 8 8 9", "answer": a} for a in ("64", "8", "8", "9")],
    }
    assert (int(plain.mask.array.sum()), plain.episode.consensus.agreement) == (16, 1.0)
    one = Predictor(Sizes(), Sampler())  # type: ignore[arg-type]
    assert int(one.predict(VOLUME, "64 8 8 9").mask.array.sum()) == 64
    assert one.identity != predictor.identity


def test_under_the_least_agreement_nothing_is_drawn() -> None:
    predictor = Predictor(Sizes(), Sampler(), consensus=ConsensusSettings(3, least=0.6))  # type: ignore[arg-type]
    unsure, sure = predictor.predict(VOLUME, ["64 8 1", "16 16 16"])
    assert (unsure.status, int(unsure.mask.array.sum())) == ("empty", 0)
    assert "agree too little" in unsure.message
    assert sure.status == "ok"


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 reading"):
        ConsensusSettings(0)
    with pytest.raises(UsageError, match="least agreement"):
        ConsensusSettings(3, least=1.5)
