"""Several readings of a request: the one the others agree with, how sure it is, and abstaining."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from prediction_cases import make_folder, write_script

from seerseg.cli.predict import predict
from seerseg.consensus import LEAST_SHARE, ConsensusSettings, expected_best, medoid, reworded
from seerseg.episode import Episode
from seerseg.errors import UsageError
from seerseg.prediction import Predictor
from seerseg.prompts import Prompt
from seerseg.protocols.base import Answer
from seerseg.protocols.messages import Message
from seerseg.reasoners.base import ReasonerCard, Weighed
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
    with pytest.raises(UsageError, match="likeliest or expected_dice"):
        ConsensusSettings(decide="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="caution from 0 to 1"):
        ConsensusSettings(decide="expected_dice", caution=2.0)


def part(name: str, lo: int, hi: int) -> Episode:
    array = np.zeros(64, bool)
    array[lo:hi] = True
    answer = Answer(target=name, prompt=Prompt(text=name), evidence="", rationale="")
    return Episode("q", "ok", (), answer, Mask(array.reshape(4, 4, 4), GRID, name), presence=0.5)


HEAD, TAIL, LIVER = part("anterior hippocampus", 0, 8), part("posterior hippocampus", 8, 16), part("liver", 30, 40)


def test_the_surest_mask_is_kept_and_the_whole_where_none_is_sure() -> None:
    assert expected_best([HEAD, TAIL], [0.9, 0.1]) == (HEAD, pytest.approx(0.9))
    whole, expected = expected_best([HEAD, TAIL], [0.55, 0.45])
    assert (whole.target, int(whole.mask.array.sum()), expected) == ("hippocampus", 16, pytest.approx(2 / 3))
    assert whole.mask.name == "hippocampus"
    assert whole.message == ("The request may mean 'anterior hippocampus' (0.55) or 'posterior hippocampus' (0.45): all of it is drawn.")
    bold, cautious = (expected_best([HEAD, TAIL], [0.7, 0.3], caution=c)[0].target for c in (0.0, 1.0))
    assert (bold, cautious) == ("anterior hippocampus", "hippocampus")


def test_what_has_nothing_in_common_is_never_drawn_together() -> None:
    kept, expected = expected_best([HEAD, LIVER], [0.51, 0.49])
    assert (kept, expected) == (HEAD, pytest.approx(0.51))
    some, _ = expected_best([part("vertebra L1", 0, 8), part("vertebra L2", 8, 16)], [0.5, 0.5])
    assert some.target == "vertebra L1 and vertebra L2", "some pieces of a structure are not called by its name"


def test_absent_and_faults_have_their_say() -> None:
    none = episode(0)
    assert expected_best([none, HEAD], [0.6, 0.4]) == (none, pytest.approx(0.6))
    fault = episode(None)
    assert expected_best([fault, HEAD], [0.9, 0.1]) == (HEAD, pytest.approx(0.1)), "a fault agrees with nothing"


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 1)), min_size=1, max_size=4), st.floats(0, 1))
def test_nothing_of_the_group_can_be_expected_to_fit_better(drawn: list[tuple[int, float]], caution: float) -> None:
    group = [(HEAD, TAIL, LIVER, episode(0))[which] for which, _ in drawn]
    shares = [share / sum(s for _, s in drawn) for _, share in drawn]
    _kept, expected = expected_best(group, shares)
    best = max(sum(s for g, s in zip(group, shares, strict=True) if g is one) for one in group)
    assert expected >= best - 1e-9
    _careful, less = expected_best(group, shares, caution=caution)
    assert less <= expected + 1e-9


class Doubtful(Sampler):
    """Weighs "a=0.6 b=0.4" as it says; "?" it does not know, and then replies 64."""

    def weigh(self, dialogues: Sequence[Sequence[Message]]) -> list[list[Weighed]]:
        out = []
        for dialogue in dialogues:
            text = dialogue[-1].text
            told = text[text.rindex("<raw_prompt>") + 12 : text.rindex("</raw_prompt>")].split()
            pairs = [one.split("=") for one in told if "=" in one]
            out.append([Weighed(f"<evidence>e</evidence><rationale>r</rationale><answer>{a}</answer>", float(p)) for a, p in pairs])
        return out

    def reply(self, dialogues: Sequence[Sequence[Message]], samples: int = 1, seed: int = 0) -> list[list[str]]:
        return [["<evidence>e</evidence><rationale>r</rationale><answer>64</answer>"] * samples for _ in dialogues]


def test_prediction_by_expected_dice() -> None:
    predictor = Predictor(Sizes(), Doubtful(), consensus=ConsensusSettings(decide="expected_dice", caution=0.0))  # type: ignore[arg-type]
    split, tiny, unknown = predictor.predict(VOLUME, ["64=0.4 16=0.3 15=0.3", f"8=0.99 64={LEAST_SHARE / 2}", "?"])
    assert int(split.mask.array.sum()) == 16, "two that nearly agree outvote the likeliest"
    found = split.episode.consensus.to_json()
    assert found["readings"] == [
        {"text": "64=0.4 16=0.3 15=0.3", "answer": answer, "share": share} for answer, share in (("64", 0.4), ("16", 0.3), ("15", 0.3))
    ]
    assert found["agreement"] == pytest.approx(0.4 * 0.4 + 0.3 + 0.3 * 30 / 31, abs=1e-3)
    assert (int(tiny.mask.array.sum()), len(tiny.episode.consensus.readings)) == (8, 1), "what is next to impossible is not drawn"
    assert (int(unknown.mask.array.sum()), unknown.episode.consensus.agreement) == (64, 1.0)
    assert predictor.identity["consensus"]["decide"] == "expected_dice"


def test_readings_that_cannot_be_weighed_count_alike_and_little_agreement_draws_nothing() -> None:
    settings = ConsensusSettings(3, least=0.9, decide="expected_dice")
    predictor = Predictor(Sizes(), Sampler(), consensus=settings)  # type: ignore[arg-type]
    unsure, sure = predictor.predict(VOLUME, ["64 8 1", "16 16 16"])
    assert (unsure.status, int(unsure.mask.array.sum())) == ("empty", 0)
    assert (sure.status, int(sure.mask.array.sum())) == ("ok", 16)
    alone = Predictor(Sizes(), Doubtful(), consensus=ConsensusSettings(least=0.7, decide="expected_dice"))  # type: ignore[arg-type]
    assert alone.predict(VOLUME, "64=0.5 1=0.5").message.startswith("What the request may mean agrees too little")


def test_as_it_is_typed(tmp_path: Path) -> None:
    images = make_folder(tmp_path, 1)
    write_script(tmp_path)
    line = ["-i", str(images), "-o", str(tmp_path / "out"), "--segmenter", f"scripted:{tmp_path / 'script.json'}", "-device", "cpu"]
    line += ["--reasoner", "lexicon", "--prompt", "outline the livr"]

    def record(*more: str) -> tuple[Any, float]:
        done = CliRunner().invoke(predict, [*line, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        made = tmp_path / "out" / "case0.json"
        return json.loads(made.read_text())["requests"][0]["consensus"], made.stat().st_mtime_ns

    plain, before = record()
    assert plain is None
    weighed, after = record("--decide", "expected_dice")
    assert weighed == {"agreement": 1.0, "readings": [{"text": "outline the livr", "answer": "liver", "share": 1.0}]}
    assert after > before, "masks that were decided otherwise are not taken for these"
    assert record("--decide", "expected_dice") == (weighed, after)
