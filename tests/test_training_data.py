"""Training samples: the right cases and words, prompts token for token as prediction sends them, loss on the reply alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_cases as tc
from hypothesis import given
from hypothesis import strategies as st

from seerseg.dataset import load_or_make_splits, open_dataset
from seerseg.episode import open_dialogues
from seerseg.errors import DatasetError, NothingToDoError, UsageError
from seerseg.prompts import Box2D, Prompt
from seerseg.protocols import load_protocol
from seerseg.protocols.base import KeySlice, Trace, Turn
from seerseg.protocols.traces import TraceRow, read_traces, write_traces
from seerseg.reasoners.decoding import Decoding
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.reasoners.vlm_loading import find, load
from seerseg.segmenters import load_segmenter
from seerseg.training.data import (
    IGNORED,
    Bounded,
    Cases,
    Collator,
    Ground,
    dialogue_of,
    evenly,
    join_images,
    open_ground,
    read_samples,
    schedule,
    validate,
    validation_sets,
)
from seerseg.training.settings import plans_for
from seerseg.training.tuning import goes_on
from seerseg.volume import encode_runs

SMALL = {"views.count": 2, "views.size_px": 64}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tc.Toy:
    return tc.make(tmp_path_factory.mktemp("toy"))


def ground_of(toy: tc.Toy, protocol: str = "seer", fold: int = 0, traces: Path | None = None) -> Ground:
    plans = plans_for(toy.preprocessed, "plans", SMALL)
    return open_ground(toy.root / "raw" / tc.NAME, toy.preprocessed, fold, plans, load_protocol(protocol), traces)


@pytest.fixture(scope="module")
def ground(toy: tc.Toy) -> Ground:
    return ground_of(toy)


@pytest.fixture(scope="module")
def reasoner(toy: tc.Toy) -> Callable[[str], VlmReasoner]:
    made: dict[str, VlmReasoner] = {}

    def get(kind: str) -> VlmReasoner:
        if kind not in made:
            folder = tc.tiny_reasoner(toy.root / f"tiny_{kind}", kind)
            made[kind] = VlmReasoner(load(find(folder, offline=True), device="cpu", dtype=None), Decoding(max_new_tokens=2))
        return made[kind]

    return get


# --- which cases and which words


def test_only_training_cases_and_training_language_enter(toy: tc.Toy, ground: Ground) -> None:
    splits = load_or_make_splits(open_dataset(toy.root / "raw" / tc.NAME), toy.preprocessed)
    samples = read_samples(ground)
    assert {s.row.case for s in samples.train} == set(splits.folds[0].train)
    assert {s.row.case for s in samples.val} == set(splits.folds[0].val)
    assert not {s.row.case for s in (*samples.train, *samples.val)} & set(splits.test)
    assert {s.row.language_split for s in samples.train} == {"train"}
    assert {s.row.language_split for s in samples.val} == {"val"}
    assert len(samples.train) == 5 * len(splits.folds[0].train)
    assert samples.left_out == {}


def test_validation_falls_back_to_training_language(toy: tc.Toy, tmp_path: Path) -> None:
    header, rows = read_traces(toy.preprocessed / "traces.jsonl")
    write_traces(tmp_path / "t.jsonl", header, [r for r in rows if r.language_split == "train"])
    assert {s.row.language_split for s in read_samples(ground_of(toy, traces=tmp_path / "t.jsonl")).val} == {"train"}


def test_missing_traces(toy: tc.Toy, tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"There are no traces at .*nothing\.jsonl. Make them with seerseg_make_traces -d Dataset007_Toy"
    ):
        read_samples(ground_of(toy, traces=tmp_path / "nothing.jsonl"))


def test_traces_of_another_dataset_or_label(toy: tc.Toy, tmp_path: Path) -> None:
    _, rows = read_traces(toy.preprocessed / "traces.jsonl")
    write_traces(tmp_path / "t.jsonl", {"dataset": "Dataset009_Other"}, rows)
    with pytest.raises(DatasetError, match="holds traces of Dataset009_Other, not of Dataset007_Toy"):
        ground_of(toy, traces=tmp_path / "t.jsonl")
    strange = TraceRow("x", rows[0].case, "tail", ("tail",), "messy", "train", Trace("a", "b", "tail"))
    write_traces(tmp_path / "t.jsonl", {"dataset": tc.NAME}, [strange])
    with pytest.raises(DatasetError, match="of the label 'tail', which Dataset007_Toy does not have"):
        ground_of(toy, traces=tmp_path / "t.jsonl")


def test_traces_that_leave_nothing(toy: tc.Toy, tmp_path: Path) -> None:
    header, rows = read_traces(toy.preprocessed / "traces.jsonl")
    write_traces(tmp_path / "t.jsonl", header, [r for r in rows if r.language_split == "test"])
    with pytest.raises(NothingToDoError, match=r"holds nothing to train on: of its .* traces none is of the"):
        read_samples(ground_of(toy, traces=tmp_path / "t.jsonl"))
    left = read_samples(ground_of(toy, "medvol-r1"))
    assert all(s.row.target is None for s in left.train), "what is absent needs no boxes"
    assert [(count, "seerseg_make_traces" in why) for why, count in left.left_out.items()]
    write_traces(tmp_path / "t.jsonl", header, [r for r in rows if r.target])
    with pytest.raises(NothingToDoError, match=r"holds nothing to train on: .* times: The trace of"):
        read_samples(ground_of(toy, "medvol-r1", traces=tmp_path / "t.jsonl"))


def test_a_fold_that_does_not_exist(toy: tc.Toy) -> None:
    with pytest.raises(UsageError, match=r"There is no fold 9: .*splits\.json has folds 0 to 4"):
        ground_of(toy, fold=9)


def test_a_dataset_without_requests(tmp_path: Path) -> None:
    toy = tc.make(tmp_path, cases=3)
    (toy.root / "raw" / tc.NAME / "requests.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"Dataset007_Toy has no requests.*seerseg_make_requests -d Dataset007_Toy"):
        ground_of(toy)


def test_unions_that_traces_name_may_be_answered(toy: tc.Toy, tmp_path: Path) -> None:
    header, rows = read_traces(toy.preprocessed / "traces.jsonl")
    both = TraceRow("both", rows[0].case, "all of it", ("liver", "spleen"), "messy", "train", Trace("a", "b", "liver and spleen"))
    write_traces(tmp_path / "t.jsonl", header, [*rows, both])
    ground = ground_of(toy, traces=tmp_path / "t.jsonl")
    assert ground.targets.names == ("liver", "spleen", "liver and spleen")
    assert ground.label_values["liver and spleen"] == (1, 2)
    assert ground_of(toy).targets.names == ("liver", "spleen")


# --- tensors


@pytest.mark.parametrize("kind", ["qwen3", "idefics3", "llava", "gemma3"])
def test_the_prompt_is_token_for_token_what_prediction_sends(ground: Ground, reasoner: Any, kind: str) -> None:
    model = reasoner(kind)
    samples = read_samples(ground).train
    collator = Collator(model, ground, samples)
    for number in (0, 1, len(samples) - 1):
        sample = samples[number]
        views = Cases(ground).views(sample.row.case)
        (dialogue,) = open_dialogues(views, [sample.row.text], protocol=ground.protocol, targets=ground.targets)
        fed: list[int] = []
        if model.shares_prefix:
            model.decoder.forget()  # else what earlier dialogues share with this one is not fed again
        hook = model.model.register_forward_pre_hook(lambda m, a, k, fed=fed: fed.extend(k["input_ids"][0].tolist()), with_kwargs=True)
        try:
            model.reply([dialogue.messages])
        finally:
            hook.remove()
        prompt, reply, earlier = collator.encode(number)
        assert not earlier
        assert fed[: len(prompt.ids)] == prompt.ids
        assert model.text(reply) == sample.replies[0]
        batch = collator([{"sample": number}])
        assert batch["input_ids"][0].tolist() == prompt.ids + reply


def test_the_loss_is_on_the_reply_alone(ground: Ground, reasoner: Any) -> None:
    model = reasoner("qwen3")
    samples = read_samples(ground).train
    collator = Collator(model, ground, samples)
    batch = collator([{"sample": n} for n in (0, 4)])
    for row, number in enumerate((0, 4)):
        learned = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert learned == collator.encode(number)[1]
        assert learned[-1] == model.tokenizer.eos_token_id, "where to stop is learned too"
        assert batch["attention_mask"][row].sum() == sum(map(len, (collator.encode(number)[0].ids, learned)))
    image = model.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert ((batch["input_ids"] == image) == (batch["mm_token_type_ids"] == 1)).all()
    assert len(batch["image_grid_thw"]) == 4


@pytest.mark.parametrize("kind", ["qwen3", "idefics3", "llava", "gemma3"])
def test_a_batch_has_the_loss_of_its_samples(ground: Ground, reasoner: Any, kind: str) -> None:
    model = reasoner(kind)
    collator = Collator(model, ground, read_samples(ground).train)

    def loss(*numbers: int) -> tuple[float, int]:
        batch = collator([{"sample": n} for n in numbers])
        with torch.inference_mode():
            logits = model.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        chosen = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum", ignore_index=IGNORED)
        return float(chosen), int((batch["labels"] != IGNORED).sum())

    one, two, both = loss(0), loss(4), loss(0, 4)
    assert both[1] == one[1] + two[1]
    assert both[0] == pytest.approx(one[0] + two[0], rel=2e-4)


def spatial_trace(toy: tc.Toy, ground: Ground, case: str) -> TraceRow:
    truth = Cases(ground).truth(case, ["liver"])
    index = int(truth.any(axis=(1, 2)).nonzero()[0][0])
    box = Box2D(0, index, (1, 2), (4, 6))
    part = truth.copy()
    part[index + 1 :] = False
    turns = (
        Turn(Prompt(boxes=(box,)), 0.5, encode_runs(part)),
        Turn(Prompt(boxes=(box,)), 1.0, encode_runs(truth)),
        Turn(None, 1.0, encode_runs(truth)),
    )
    key = KeySlice(0, index, int(truth[index].sum()), (box,), ((index, 3, 3), (index, 4, 3)))
    return TraceRow(f"{case}-turns", case, "the liver", ("liver",), "messy", "train", Trace("e", "r", "liver", None, (key,), turns))


def test_several_turns_are_several_rows_with_the_mask_shown_back(toy: tc.Toy, ground: Ground, reasoner: Any, tmp_path: Path) -> None:
    row = spatial_trace(toy, ground, ground.fold.train[0])
    write_traces(tmp_path / "t.jsonl", {"dataset": tc.NAME}, [row])
    agent = ground_of(toy, "medsam-agent", traces=tmp_path / "t.jsonl")
    samples = read_samples(agent).train
    assert [s.turn for s in samples] == [0, 1, 2]
    views = Cases(agent).views(row.case)
    last = dialogue_of(samples[2], agent, views)
    assert [m.role for m in last][1:] == ["user", "assistant", "user", "assistant", "user"]
    assert [m.text for m in last if m.role == "assistant"] == list(samples[2].replies[:2])
    painted = last[3].images[0].pixels
    green = (painted[..., 1].astype(int) - painted[..., 0] > 50).sum()
    assert green > 0, "the mask of the turn before is shown"
    batch = Collator(reasoner("qwen3"), agent, samples)([{"sample": 0}, {"sample": 2}])
    assert len(batch["image_grid_thw"]) == len(last[1].images) + sum(len(m.images) for m in last)


def test_a_whole_dialogue_is_one_row_with_the_loss_of_its_turns(toy: tc.Toy, ground: Ground, reasoner: Any, tmp_path: Path) -> None:
    row = spatial_trace(toy, ground, ground.fold.train[0])
    write_traces(tmp_path / "t.jsonl", {"dataset": tc.NAME}, [row])
    agent = ground_of(toy, "medsam-agent", traces=tmp_path / "t.jsonl")
    model = reasoner("qwen3")
    assert model.goes_on
    (whole,) = read_samples(agent, whole=True).train
    assert whole.turn is None
    turns = read_samples(agent).train

    def losses(samples: Any, *numbers: int) -> tuple[list[int], float]:
        batch = Collator(model, agent, samples)([{"sample": n} for n in numbers])
        with torch.inference_mode():
            logits = model.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        learnt = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), learnt, reduction="sum", ignore_index=IGNORED)
        return learnt[learnt != IGNORED].tolist(), float(loss)

    rows = [losses(turns, n) for n in range(3)]
    found, loss = losses([whole], 0)
    assert found == [token for tokens, _ in rows for token in tokens]
    assert loss == pytest.approx(sum(part for _, part in rows), rel=1e-5)
    apart = losses([whole, turns[0]], 0, 1)
    assert apart[1] == pytest.approx(loss + rows[0][1], rel=1e-5), "padded beside a shorter one"


def test_a_deliberately_bad_start_is_seen_and_not_learned(toy: tc.Toy, ground: Ground, reasoner: Any, tmp_path: Path) -> None:
    row = spatial_trace(toy, ground, ground.fold.train[0])
    first, *others = row.trace.turns
    bad = replace(row, trace=replace(row.trace, turns=(replace(first, learn=False), *others)))
    write_traces(tmp_path / "t.jsonl", {"dataset": tc.NAME}, [bad])
    agent = ground_of(toy, "medsam-agent", traces=tmp_path / "t.jsonl")
    model = reasoner("qwen3")
    turns = read_samples(agent).train
    assert [s.turn for s in turns] == [1, 2]
    (whole,) = read_samples(agent, whole=True).train
    labels = Collator(model, agent, [whole])([{"sample": 0}])["labels"][0]
    assert labels[labels != IGNORED].tolist() == [t for reply in whole.replies[1:] for t in model.encode_reply(reply)]


def test_who_goes_on_from_tokens(toy: tc.Toy, reasoner: Any) -> None:
    for kind, expected in (("qwen3", True), ("idefics3", False), ("gemma3", False)):
        assert reasoner(kind).goes_on is expected
        assert goes_on(find(toy.root / f"tiny_{kind}", offline=True)) is expected


def test_images_of_other_sizes_join() -> None:
    joined = join_images(
        [{"pixel_values": torch.ones(1, 2, 3), "sizes": [(1, 2)]}, {"pixel_values": torch.ones(1, 4, 3), "sizes": [(3, 4)]}]
    )
    assert joined["pixel_values"].shape == (2, 4, 3)
    assert joined["pixel_values"][0, 2:].abs().sum() == 0
    assert joined["sizes"] == [(1, 2), (3, 4)]


# --- order and caches


@given(count=st.integers(1, 50), total=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_the_schedule_passes_over_everything(count: int, total: int, seed: int) -> None:
    order = schedule(count, total, seed)
    assert len(order) == total
    for start in range(0, total - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert order == schedule(count, total, seed)
    assert order[: total // 2] == schedule(count, max(1, total // 2), seed)[: total // 2], "a longer run begins alike"


@given(rare=st.floats(0.05, 1.0), count=st.integers(2, 30), seed=st.integers(0, 2**31))
def test_rare_samples_take_part_in_their_share_of_the_passes(rare: float, count: int, seed: int) -> None:
    weights, passes = [1.0] * (count - 1) + [rare], 40
    order = schedule(count, passes * (count - 1), seed, weights)
    assert order == schedule(count, 10 * passes * count, seed, weights)[: len(order)], "a longer run begins alike"
    drawn, whole = order.count(count - 1), order.count(0)
    assert abs(drawn - rare * whole) <= 2
    assert max(order.count(i) for i in range(count - 1)) - min(order.count(i) for i in range(count - 1)) <= 1


def test_a_bounded_cache_forgets_the_oldest() -> None:
    cache: Bounded[bytes] = Bounded(10, len)
    for name in "abc":
        cache[name] = b"1234"
    assert list(cache) == ["b", "c"]
    cache.get("b")
    cache["d"] = b"1234"
    assert list(cache) == ["b", "d"]
    cache["d"] = b"123456"
    assert list(cache) == ["b", "d"]
    cache["big"] = b"0" * 100
    assert list(cache) == ["big"], "one value is always held"


def test_evenly() -> None:
    assert evenly([1, 2, 3], 5) == [1, 2, 3]
    assert evenly(list(range(10)), 4) == [0, 2, 5, 7]


# --- validation


class Says:
    """Replies by a rule of the request."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        self.rule = rule

    def reply(self, dialogues: Any, samples: int = 1, seed: int = 0) -> list[list[str]]:
        return [[self.rule(dialogue[-1].text)] for dialogue in dialogues]


def answer(name: str) -> str:
    return f"<evidence>e</evidence><rationale>r</rationale><answer>{name}</answer>"


def test_validation_draws_answers_and_scores_them(toy: tc.Toy, ground: Ground) -> None:
    segmenter = load_segmenter(toy.segmenter)
    rows = [s.row for s in read_samples(ground).val]
    sets = validation_sets(rows, 100)
    assert {len(s) for s in sets} == {1, 2}
    truth = {row.text: row.trace.answer for row in rows}
    asked = lambda text: text.split("<raw_prompt>")[1].split("<")[0]  # noqa: E731
    right = validate(sets, ground, Cases(ground), Says(lambda text: answer(truth[asked(text)])), segmenter)
    assert right == {"exact": 1.0, "faults": 0.0, "dice_mean": 1.0, "dice_worst": 1.0, "dice_std": 0.0}
    liver = validate(sets, ground, Cases(ground), Says(lambda text: answer("liver") if "v" in asked(text) else "what?"), segmenter)
    assert liver["exact"] == pytest.approx(np.mean([r.trace.answer == "liver" for r in rows]))
    assert liver["dice_mean"] == pytest.approx(0.5)
    assert liver["faults"] > 0
