"""Acceptance of skills: what a round costs is bounded, retrieval is fitted on bank requests, and a bank's metric tells wordings apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_evolution import BANK, SLANG, TRAIN, Knowing, Means, Raw, Table, loop, requests

from seerseg.dataset import Request
from seerseg.errors import BankError
from seerseg.evolution.acceptance import MARGINS, THRESHOLDS, Bench, sample_of
from seerseg.evolution.arena import Outcome
from seerseg.skills.base import EmptyBank, Query, Retriever, Skill
from seerseg.skills.encoder import RETRIEVAL, Adapted, adapted, keep_metric, learn_metric
from seerseg.skills.retrieval import ENCODED, FrozenBank, SkillIndex, Weights, keep_weights, kept_weights
from seerseg.skills.store import BankFolder

NAMES = ("liver", "spleen", "aorta", "heart")
WORDS = ("upper", "lower", "gland", "vessel", "pump", "filter", "lobe", "left", "right", "dark")


class Bags:
    """An encoder by words: what has words in common means nearly the same."""

    identity = "bags-1"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = np.array([[float(w in t.split()) for w in WORDS] + [0.1] for t in texts], np.float32).reshape(-1, len(WORDS) + 1)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def skill(number: int, words: Sequence[str], target: str) -> Skill:
    return Skill(f"s-{number}", f"TAG_{number}", "it says so", f"answer {target}", words=tuple(words), target=target)


@pytest.mark.parametrize("weights", [Weights(threshold=0.5), replace(ENCODED, threshold=0.78, margin=0.01), replace(ENCODED, margin=0.04)])
def test_contenders_are_what_would_be_shown_alone(weights: Weights) -> None:
    rng, encoder, seen = random.Random(3), Bags(), 0
    for _ in range(12):
        pool = [skill(n, [" ".join(rng.sample(WORDS, 2)) for _ in range(2)], rng.choice(NAMES)) for n in range(6)]
        index = SkillIndex.of(pool, encoder)
        for _ in range(8):
            query = Query("please mark the " + " ".join(rng.sample(WORDS, 3)))
            found = {f.skill.id: f for f in index.contenders(query, weights, {s.id for s in pool}, encoder)}
            for one in pool:
                alone = FrozenBank(index.showing({one.id}), "alone", weights=weights, encoder=encoder).retrieve(query, 1)
                f = found.get(one.id)
                shown = f is not None and f.score >= weights.threshold and (f.gap >= weights.margin or not weights.margin)
                assert shown == bool(alone), (query, one)
                seen += shown
    assert seen > 10, "some are shown"


def test_a_sample_is_spread_over_targets_languages_and_few_cases() -> None:
    asked = [
        Request(f"{case}-{t}-{split}-{n}", case, f"the {t} {n}", (t,), "chat", split)
        for case in BANK
        for t in NAMES
        for split in ("train", "val")
        for n in range(20)
    ]
    chosen = sample_of(asked, 96, truth_of=lambda r: (r.target or ("",))[0], known={"train"}, seed=1)
    assert len(chosen) == len({r.id for r in chosen}) == 96
    for name in NAMES:
        mine = [r for r in chosen if r.target == (name,)]
        assert len(mine) == 24
        assert len({r.case for r in mine}) == 1, "each pair of a case and a target costs the segmenter a mask"
        assert sum(r.language_split == "val" for r in mine) == 12
    assert chosen == sample_of(asked, 96, truth_of=lambda r: (r.target or ("",))[0], known={"train"}, seed=1)
    everything = sample_of(asked[:30], 600, truth_of=lambda r: (r.target or ("",))[0], known={"train"}, seed=1)
    assert sorted(r.id for r in everything) == sorted(r.id for r in asked[:30]), "all, where there are few"


def test_what_a_round_costs_is_bounded(tmp_path: Path) -> None:
    arena, raw = Table(), Raw()
    made = loop(tmp_path, arena, rounds=1, per_round=8, bench=10, candidates=1, tests=4, raw=3)
    made.raw = raw
    (report,) = made.run()
    with_skill = [request for request, shown in arena.ran if shown]
    assert report.tested == 1
    assert report.left == report.proposed - 1
    assert len(with_skill) <= 4
    assert len(arena.ran) <= 8 + 8 + 10 + 4
    assert len(raw.ran) <= 3
    assert report.accepted == 1, "the most promising is tested first"


def test_a_run_ends_in_time_and_goes_on_later(tmp_path: Path) -> None:
    now = [0.0]

    class Slow(Table):
        def run(self, requests: Sequence[Request], bank: Retriever) -> list[Outcome]:
            now[0] += 6 * len(requests)
            return super().run(requests, bank)

    made = loop(tmp_path, Slow(), rounds=5, minutes=2)
    made.clock = lambda: now[0]
    done = made.run()
    assert len(done) == 1, "a round that is begun is ended; none is begun that is too late"
    assert (done[0].tested, done[0].left > 0) == (0, True)
    rest = loop(tmp_path, Table(), rounds=2).run()
    assert (len(rest), rest[0].number, rest[0].accepted > 0) == (1, 2, True), "what was left is tested later"


def bench_of(arena: Table, skills: Sequence[Skill], asked: Sequence[Request]) -> Bench:
    plain = arena.run(asked, EmptyBank())
    return Bench(
        asked,
        plain,
        skills,
        [s.id for s in skills],
        arena=arena,
        query_of=lambda r: Query(r.text, "CT"),
        known={"train"},
        weights=ENCODED,
        encoder=Means(),
    )


def test_retrieval_is_fitted_to_what_the_reasoner_knows() -> None:
    """Where a reasoner knows nothing a guess costs nothing; where it knows better a guess must be sure."""
    near = Skill("s-near", "PROMPT_NORMALIZE", "zorb", "answer liver", words=("zorb",), target="liver")
    far = Skill("s-far", "PROMPT_NORMALIZE", "quax", "answer spleen", words=("quax",), target="spleen")
    strange = [
        Request(f"{case}-{n}", case, f"please outline the {w} here", (t,), "chat", "val")
        for case in ("b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8")
        for n, (w, t) in enumerate((("gnorf", "liver"), ("plim", "spleen"), ("gnorf plim", "liver"), ("gnorf, not a plim", "liver")))
    ]
    eager, told = bench_of(Table(), [near, far], strange).fitted()
    assert told["requests"] == 32
    assert told["gain"] > 0.5
    assert (eager.threshold in THRESHOLDS, eager.margin in MARGINS) == (True, True)

    class Knows(Table):
        def run(self, requests: Sequence[Request], bank: Retriever) -> list[Outcome]:
            return [o if o.shown else replace(o, answer=o.truth, dice=0.9) for o in super().run(requests, bank)]

    careful, told = bench_of(Knows(), [near, far], strange).fitted()
    assert (careful, told["gain"] <= 0) == (ENCODED, True), "nothing to gain: as shipped"


def test_skills_are_not_shown_for_what_is_not_there() -> None:
    near = Skill("s-near", "PROMPT_NORMALIZE", "zorb", "answer liver", words=("zorb",), target="liver")
    there = [Request(f"{case}-t", case, "please outline the gnorf here", ("liver",), "chat", "val") for case in BANK * 8]
    gone = [Request(f"{case}-a", case, "please outline the gnorf kidney here", None, "chat", "val") for case in BANK * 8]

    class Absent(Table):
        def run(self, requests: Sequence[Request], bank: Retriever) -> list[Outcome]:
            made = super().run(requests, bank)
            return [replace(o, answer="absent", dice=float(o.truth == "absent")) if not o.shown else o for o in made]

    asked = [replace(r, id=f"{r.id}{n}") for n, r in enumerate((*there, *gone))]
    bench = bench_of(Absent(), [near], asked)
    bench.weights, told = bench.fitted()
    assert told["gain"] == pytest.approx(1.0)
    assert {r.target for r in bench.fitting(near)} == {("liver",)}


def test_a_metric_leaves_out_what_is_said_around_a_phrase(tmp_path: Path) -> None:
    """Two structures differ in one direction, templates in another that is larger; the metric turns the order round."""
    rng = np.random.default_rng(0)
    table: dict[str, np.ndarray] = {}

    class Noisy:
        identity = "noisy-1"

        def __call__(self, texts: Sequence[str]) -> np.ndarray:
            return np.stack([table[t] for t in texts]).astype(np.float32)

    axis = {"front": np.array([0.3, 0, 0, 1.0]), "back": np.array([-0.3, 0, 0, 1.0])}
    said: dict[tuple[str, str], list[str]] = {}
    for word, base in axis.items():
        table[word] = base / np.linalg.norm(base)
        for n in range(60):
            made = base + np.array([0.02, 1, 1, 0.1]) * rng.normal(size=4)
            table[f"{word} {n}"] = made / np.linalg.norm(made)
            said.setdefault((word, word), []).append(f"{word} {n}")
    encoder = Noisy()
    assert learn_metric({key: texts[:20] for key, texts in said.items()}, encoder) is None, "too few texts"
    metric = learn_metric(
        {(f"{word} {part}", word): texts[12 * part :][:12] for (word, _), texts in said.items() for part in range(5)}, encoder
    )
    assert metric is not None

    def right(encode: object) -> float:
        vectors = {text: encode([text])[0] for text in table}  # type: ignore[operator]
        held = [(text, word) for (word, _), texts in said.items() for text in texts]
        return float(np.mean([(vectors[t] @ vectors[w]) > (vectors[t] @ vectors["back" if w == "front" else "front"]) for t, w in held]))

    assert adapted(encoder, tmp_path) is encoder
    keep_metric(metric, encoder, tmp_path)
    found = adapted(encoder, tmp_path)
    assert isinstance(found, Adapted)
    assert found.identity != encoder.identity
    np.testing.assert_allclose(np.linalg.norm(found(["front"]), axis=1), 1, rtol=1e-5)

    def apart(encode: object) -> float:
        a, b = encode(["front", "back"])  # type: ignore[operator]
        return float(a @ b)

    assert right(found) >= right(encoder)
    assert apart(found) < apart(encoder), "names stand further apart"
    (tmp_path / RETRIEVAL / "noisy-1.npz").write_bytes(b"torn")
    with pytest.raises(BankError, match="cannot be read"):
        adapted(encoder, tmp_path)


def test_a_bank_keeps_its_weights_by_state(tmp_path: Path) -> None:
    one = skill(1, ["upper gland"], "liver")
    BankFolder(tmp_path).change(lambda now: {one.id: one}, "one")
    BankFolder(tmp_path).change(lambda now: now, "two")
    encoder = Bags()
    assert kept_weights(tmp_path, encoder, 2) is None
    keep_weights(replace(ENCODED, threshold=0.75, margin=0.001), encoder, tmp_path, 1, {"gain": 0.1})
    keep_weights(replace(ENCODED, threshold=0.9, margin=0.03), encoder, tmp_path, 2, {"gain": 0.2})
    first, second = (FrozenBank.open(tmp_path, number=n, encoder=encoder) for n in (1, 2))
    assert (first.weights.threshold, second.weights.threshold) == (0.75, 0.9)
    assert first.identity != second.identity
    assert FrozenBank.open(tmp_path, weights=ENCODED, encoder=encoder).weights == second.weights, "the shipped values give way"
    assert FrozenBank.open(tmp_path, weights=replace(ENCODED, threshold=0.5), encoder=encoder).weights.threshold == 0.5
    assert FrozenBank.open(tmp_path).weights == Weights(), "without the encoder nothing changes"
    (tmp_path / RETRIEVAL / "bags-1.json").write_text('{"schema": 1, "fitted": [{"state": 1}]}')
    with pytest.raises(BankError, match="must list the state, threshold, margin and scale"):
        FrozenBank.open(tmp_path, encoder=encoder)


def test_words_that_are_fragments_of_known_ones_are_no_news(tmp_path: Path) -> None:
    arena = Knowing()
    made = loop(tmp_path, arena, rounds=1)
    made.training = [
        *made.training,
        *(Request(f"{case}-half", case, "please outline the upper abdominal here", ("upper abdominal organ",), "chat") for case in TRAIN),
    ]
    made.run()
    known = {word for s in BankFolder(tmp_path).skills().values() for word in s.words}
    assert set(SLANG) <= {word for phrase in known for word in phrase.split()}
    assert "abdominal" not in known
    assert requests(["t1"])


def test_taught_words_that_cannot_prove_themselves_are_judged_together(tmp_path: Path) -> None:
    """Many names, two requests of each: no skill has the trials to prove it alone, all of them together do."""
    slang = {
        f"{a}{b}": f"{name} {side}"
        for a, name in (("zo", "liver"), ("qu", "spleen"), ("mi", "kidney"))
        for b, side in (("rb", "one"), ("lp", "two"))
    }

    class Odd(Table):
        def __init__(self, follows: bool = True) -> None:
            super().__init__()
            self.follows = follows

        def run(self, requests: Sequence[Request], bank: Retriever) -> list[Outcome]:
            out = []
            for o in super().run(requests, bank):
                helped = o.shown and o.answer == o.truth and self.follows
                out.append(replace(o, answer=o.truth if helped else "aorta", dice=0.9 if helped else 0.0))
            return out

    def asked(cases: Sequence[str]) -> list[Request]:
        return [Request(f"{c}-{w}", c, f"please outline the {w} here", (t,), "chat") for c in cases for w, t in slang.items()]

    for follows in (True, False):
        made = loop(tmp_path / str(follows), Odd(follows), rounds=1)
        made.training, made.testing, made.fence = asked(TRAIN), asked(BANK[:2]), None
        (report,) = made.run()
        found = [s for s in BankFolder(tmp_path / str(follows)).skills().values() if s.status == "accepted"]
        assert {s.target for s in found} == (set(slang.values()) if follows else set())
        assert report.accepted == len(found)
        assert all(s.audit.note.startswith("judged together with") for s in found)
        assert all(s.audit.accepted is not None and s.audit.accepted.n == 2 for s in found)


def test_masks_are_drawn_once_and_kept(tmp_path: Path) -> None:
    from seerseg.evolution.masks import KeptMasks
    from seerseg.prompts import Prompt
    from seerseg.segmenters.scripted import ScriptedSegmenter
    from seerseg.volume import Grid, Volume

    asked: list[str] = []

    def draw(volume: Volume, prompt: Prompt) -> np.ndarray:
        asked.append(str(prompt.text))
        return volume.array > (10 if prompt.text == "bright" else 999)

    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume, other = (Volume(a, Grid((2, 3, 4), np.diag([2.0, 2, 3, 1])), "CT", "0") for a in (array, array + 1))
    inner = ScriptedSegmenter({"bright": draw, "none": draw}, identity="counted-1")
    prompts = [Prompt(text="bright"), Prompt(text="none"), Prompt(text="unknown thing")]
    first = KeptMasks(inner, tmp_path / "masks").segment(volume, prompts)
    again = KeptMasks(inner, tmp_path / "masks").segment(volume, prompts)
    assert asked == ["bright", "none"], "what was drawn is not drawn again"
    for one, two in zip(first, again, strict=True):
        assert (one.prompt, one.status, one.presence, one.message, one.nearest) == (
            two.prompt,
            two.status,
            two.presence,
            two.message,
            two.nearest,
        )
        assert (one.mask is None) == (two.mask is None)
        if one.mask is not None and two.mask is not None:
            np.testing.assert_array_equal(one.mask.array, two.mask.array)
    KeptMasks(inner, tmp_path / "masks").segment(other, prompts[:1])
    assert asked[2:] == ["bright"], "another scan is another mask"
    for path in (tmp_path / "masks").iterdir():
        path.write_bytes(b"torn")
    assert KeptMasks(inner, tmp_path / "masks").segment(volume, prompts[:1])[0].status == "ok"
    assert asked[3:] == ["bright"]
