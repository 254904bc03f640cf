"""From traces to training samples: which cases and words may enter, what the reasoner is shown, and the tensors of a batch.

A sample is one dialogue: everything is as prediction would send it, token for token, and the loss is taken on the replies alone. Where a
model's chat template writes earlier turns anew, or it cannot be shown further images, every turn is a sample of its own. Slices are read
from the store when a batch needs them; whole volumes are decoded only to draw validation answers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset import Fold, RawDataset, load_or_make_splits, open_dataset
from seerseg.episode import Targets, solve
from seerseg.errors import DatasetError, NothingToDoError, UsageError
from seerseg.metrics import dice, over_paraphrases
from seerseg.planning import Plans
from seerseg.protocols.base import ABSENT, Protocol, Trace
from seerseg.protocols.messages import Message, text_message
from seerseg.protocols.traces import TraceRow, read_traces
from seerseg.reasoners.base import Reasoner
from seerseg.reasoners.decoding import Encoded
from seerseg.reasoners.vlm import VlmReasoner
from seerseg.segmenters.base import Segmenter
from seerseg.skills.base import Retriever, Skill, glossed
from seerseg.store import open_case, stored_cases
from seerseg.training.lessons import Lessons
from seerseg.training.settings import views_of
from seerseg.views import CaseViews, ViewSpec, render
from seerseg.volume import Grid, Mask, Volume, decode_runs

TRACES_FILE = "traces.jsonl"
TRAIN, VAL = "train", "val"
IGNORED = -100
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Ground:
    """What every stage stands on. folder: the dataset's preprocessed folder; targets: the names that may be answered, as prediction
    will list them: labels, then unions of labels that traces name, but for structures that are
    drawn as pieces; label_values: name -> values of `dataset.json` whose union it is;
    rows: of the trace file `traces`, None where there is none (GRPO can do without)."""

    dataset: RawDataset
    folder: Path
    number: int
    fold: Fold
    plans: Plans
    protocol: Protocol
    spec: ViewSpec
    channel: int
    targets: Targets
    label_values: dict[str, tuple[int, ...]]
    traces: Path
    rows: tuple[TraceRow, ...] | None

    def values_of(self, labels: Iterable[str]) -> tuple[int, ...]:
        """The label values of a union of labels."""
        return tuple(sorted({value for label in labels for value in self.dataset.labels[label]}))


@dataclass(frozen=True, eq=False)
class Sample:
    """One trace to learn. replies: of all its turns; turn: the one to learn, None for all in one; skills: what it is shown."""

    row: TraceRow
    replies: tuple[str, ...]
    turn: int | None = 0
    skills: tuple[Skill, ...] = ()


@dataclass(frozen=True, eq=False)
class Samples:
    """What to learn and what to validate on; left_out: why traces were passed over -> how many; dealt: kind of skills shown (see
    `lessons`) -> training traces, empty without a bank; bank: what validation requests are answered with."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    dealt: dict[str, int] = field(default_factory=dict)
    bank: Retriever | None = None


class Bounded(OrderedDict[str, Value], Generic[Value]):
    """A dictionary that forgets what was longest unused when the sizes of its values pass `limit_bytes`."""

    def __init__(self, limit_bytes: int, size: Callable[[Value], int]) -> None:
        super().__init__()
        self.limit_bytes, self._size, self._held = limit_bytes, size, 0

    def __setitem__(self, key: str, value: Value) -> None:
        if key in self:
            self._held -= self._size(super().__getitem__(key))
        super().__setitem__(key, value)
        self.move_to_end(key)
        self._held += self._size(value)
        while self._held > self.limit_bytes and len(self) > 1:
            self._held -= self._size(self.pop(next(iter(self))))

    def get(self, key: str, default: Any = None) -> Any:
        """The value, which counts as used now."""
        if key not in self:
            return default
        self.move_to_end(key)
        return super().__getitem__(key)


class Cases:
    """Views, volumes and label maps of stored cases; views are kept while they fit into `limit_bytes`."""

    def __init__(self, ground: Ground, limit_bytes: int = 1 << 28) -> None:
        self.ground = ground
        self._views: Bounded[CaseViews] = Bounded(limit_bytes, lambda views: sum(v.pixels.nbytes for v in (*views.views, *views.others)))

    def views(self, case: str) -> CaseViews:
        """What the reasoner is shown of a case."""
        found: CaseViews | None = self._views.get(case)
        if found is None:
            found = render(open_case(self.ground.folder, case).channel(self.ground.channel), self.ground.spec)
            self._views[case] = found
        return found

    def volume(self, case: str) -> Volume:
        """The whole channel that is segmented."""
        return open_case(self.ground.folder, case).volume(self.ground.channel)

    def truth(self, case: str, labels: Iterable[str]) -> NDArray[np.bool_]:
        """The union of labels (Z, Y, X); DatasetError when the case has no label map."""
        found = open_case(self.ground.folder, case).labels()
        if found is None:
            raise DatasetError(
                f"The case {case} of {self.ground.dataset.name} has no label map in {self.ground.folder}. Preprocess it again."
            )
        return np.isin(found[0], self.ground.values_of(labels))


def open_ground(raw: Path, preprocessed: Path, fold: int, plans: Plans, protocol: Protocol, traces: Path | None = None) -> Ground:
    """Everything but the samples. UsageError for a fold that does not exist, DatasetError for a dataset without requests or for traces
    of another dataset."""
    dataset = open_dataset(raw)
    if not dataset.requests:
        raise DatasetError(
            f"{dataset.name} has no requests, so there is nothing to learn to read. Make {raw / 'requests.jsonl'} with "
            f"seerseg_make_requests -d {dataset.name}."
        )
    splits = load_or_make_splits(dataset, preprocessed)
    if not 0 <= fold < len(splits.folds):
        raise UsageError(f"There is no fold {fold}: {preprocessed / 'splits.json'} has folds 0 to {len(splits.folds) - 1}.")
    values = {dataset.canonical(label): tuple(v) for label, v in dataset.labels.items()}
    path = traces or preprocessed / TRACES_FILE
    rows = _rows(path, dataset) if path.is_file() else None
    for row in rows or ():
        if row.target is not None and row.trace.answer != ABSENT and row.trace.answer not in values:
            values[row.trace.answer] = tuple(sorted({v for label in row.target for v in dataset.labels[label]}))
    labels = Targets(tuple(dataset.canonical(label) for label in dataset.labels), closed=True)
    return Ground(
        dataset=dataset,
        folder=preprocessed,
        number=fold,
        fold=splits.folds[fold],
        plans=plans,
        protocol=protocol,
        spec=views_of(plans, protocol),
        channel=int(plans.value("views.channel")),
        targets=Targets(tuple(name for name in values if not labels.pieces(name)), closed=True),
        label_values=values,
        traces=path,
        rows=rows,
    )


def _rows(path: Path, dataset: RawDataset) -> tuple[TraceRow, ...]:
    header, rows = read_traces(path)
    if header.get("dataset") not in (None, dataset.name):
        raise DatasetError(f"{path} holds traces of {header['dataset']}, not of {dataset.name}. Give the right file with --traces.")
    for row in rows:
        unknown = [label for label in row.target or () if label not in dataset.labels]
        if unknown:
            raise DatasetError(
                f"{path}: the trace {row.id!r} is of the label {unknown[0]!r}, which {dataset.name} does not have. Make the traces again."
            )
    return tuple(rows)


def read_samples(ground: Ground, lessons: Lessons | None = None, *, whole: bool = False) -> Samples:
    """The samples of a fold: training cases in training language, validation cases in validation language.

    lessons: has a share of them shown skills of a bank; whole: a dialogue is one sample, not one a turn. Where no request of the
    validation cases is of the validation language, their training language is taken. DatasetError when there are no traces,
    NothingToDoError when they leave nothing to train on.
    """
    path, rows = ground.traces, ground.rows
    if rows is None:
        raise DatasetError(f"There are no traces at {path}. Make them with seerseg_make_traces -d {ground.dataset.name}.")
    stored = set(stored_cases(ground.folder))
    of_train = [r for r in rows if r.case in ground.fold.train and r.language_split in (TRAIN, "")]
    of_val = [r for r in rows if r.case in ground.fold.val]
    of_val = [r for r in of_val if r.language_split == VAL] or [r for r in of_val if r.language_split in (TRAIN, "")]
    left_out: dict[str, int] = {}
    dealt: Counter[str] = Counter()
    train = tuple(_turns(ground, of_train, stored, left_out, lessons, dealt, whole=whole))
    val = tuple(_turns(ground, of_val, stored, left_out, lessons, Counter(), whole=whole))
    if not train:
        why = "; ".join(f"{count} times: {reason}" for reason, count in left_out.items()) or (
            f"of its {len(rows)} traces none is of the {len(ground.fold.train)} training cases of fold {ground.number} in training language"
        )
        raise NothingToDoError(f"{path} holds nothing to train on: {why}. Make the traces again with seerseg_make_traces.")
    return Samples(train, val, left_out, dict(sorted(dealt.items())), lessons.bank if lessons is not None else None)


def _turns(
    ground: Ground,
    rows: Sequence[TraceRow],
    stored: set[str],
    left_out: dict[str, int],
    lessons: Lessons | None,
    dealt: Counter[str],
    *,
    whole: bool,
) -> Iterator[Sample]:
    blank: dict[str, CaseViews] = {}
    modality: dict[str, str | None] = {}
    for row in rows:
        if row.case not in stored:
            left_out["the case is not preprocessed"] = left_out.get("the case is not preprocessed", 0) + 1
            continue
        if row.case not in blank:
            opened = open_case(ground.folder, row.case)
            blank[row.case], modality[row.case] = render(_Blank(opened.grid), ground.spec), opened.modality(ground.channel)
        skills: tuple[Skill, ...] = ()
        if lessons is not None:
            lesson = lessons.deal(row, modality[row.case])
            row, skills = lesson.row, lesson.skills
            dealt[lesson.kind] += 1
        try:
            replies = ground.protocol.targets(row.trace, blank[row.case])
        except DatasetError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
            continue
        several = whole and len(replies) > 1
        turns: Sequence[int | None] = (None,) if several else [n for n in range(len(replies)) if _is_learned(row.trace, n)]
        yield from (Sample(row, replies, turn, skills) for turn in turns)


@dataclass(frozen=True, eq=False)
class _Blank:
    """Slices without content: what a reply says of places needs the grid alone."""

    grid: Grid
    modality: str | None = None
    percentiles: dict[str, float] = field(default_factory=lambda: {"0.5": 0.0, "99.5": 1.0})

    def read_slice(self, axis: int, index: int) -> NDArray[Any]:
        """Zeros."""
        return np.zeros([n for a, n in enumerate(self.grid.shape_zyx) if a != axis], np.uint8)


def dialogue_of(sample: Sample, ground: Ground, views: CaseViews) -> list[Message]:
    """All messages before the reply to learn (the first one of a whole dialogue), as an episode that went as the trace did would have
    them."""
    messages = ground.protocol.opening(views, glossed(sample.row.text, sample.skills), sample.skills, ground.targets.names)
    for turn in range(sample.turn or 0):
        messages += [text_message("assistant", sample.replies[turn]), shown_after(sample, turn, ground, views)]
    return messages


def shown_after(sample: Sample, turn: int, ground: Ground, views: CaseViews) -> Message:
    """What the reasoner is shown after a turn of the trace. DatasetError when the protocol shows nothing."""
    trace = sample.row.trace
    drawn = _drawn(trace, turn)
    mask = Mask(decode_runs(drawn, views.grid.shape_zyx), views.grid, trace.answer) if drawn else None
    shown = ground.protocol.observe(mask, views)
    if shown is None:
        raise DatasetError(
            f"The trace {sample.row.id!r} has {len(sample.replies)} turns, but {ground.protocol.name} shows nothing after one."
        )
    return shown


def _drawn(trace: Trace, turn: int) -> str:
    return trace.turns[turn].mask if turn < len(trace.turns) else ""


def _is_learned(trace: Trace, turn: int) -> bool:
    return turn >= len(trace.turns) or trace.turns[turn].learn


def schedule(count: int, total: int, seed: int, weights: Sequence[float] | None = None) -> list[int]:
    """`total` sample numbers below `count`: pass after pass, each in an order of its own. Nothing else decides the order, so that
    neither the number of processes nor a restart changes it. weights: in which share of the passes a sample takes part, over 0 and at
    most 1, and 1 for some; all in every pass without them."""
    share = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    begun = np.random.default_rng(seed).random(count)
    order: list[int] = []
    number = 0
    while len(order) < total:
        taking_part = np.floor(share * (number + 1) + begun) > np.floor(share * number + begun)
        order += [int(i) for i in np.random.default_rng([seed, number]).permutation(count) if taking_part[i]]
        number += 1
    return order[:total]


def evenly(items: Sequence[Value], count: int) -> list[Value]:
    """At most `count` of the items, evenly chosen."""
    if len(items) <= count:
        return list(items)
    return [items[int(i)] for i in np.floor(np.arange(count) * len(items) / count)]


class Collator:
    """Sample numbers -> the tensors of a batch, padded on the right: input_ids, attention_mask, labels (IGNORED but for replies to learn),
    what the processor says of each token, image tensors."""

    def __init__(self, reasoner: VlmReasoner, ground: Ground, samples: Sequence[Sample], cache_bytes: int = 1 << 28) -> None:
        self.reasoner, self.ground, self.samples = reasoner, ground, samples
        self.cases = Cases(ground, cache_bytes // 4)
        self._known: MutableMapping[str, Encoded] = Bounded(cache_bytes // 2, _encoded_bytes)

    def encode(self, number: int) -> tuple[Encoded, list[int], list[tuple[int, int]]]:
        """Of one sample: what comes before its last reply, that reply, and where in the first the replies before it lie that are to be
        learnt, too (start, end)."""
        sample = self.samples[number]
        views = self.cases.views(sample.row.case)
        so_far = self.reasoner.encode(dialogue_of(sample, self.ground, views), self._known if not sample.turn else None)
        if sample.turn is not None:
            return so_far, self.reasoner.encode_reply(sample.replies[sample.turn]), []
        earlier: list[tuple[int, int]] = []
        for turn, said in enumerate(sample.replies[:-1]):
            key = f"{sample.row.case}|{_drawn(sample.row.trace, turn)}"  # many requests share a trajectory
            added = self._known.get(key)
            if added is None:
                added = self._known[key] = self.reasoner.continuation(shown_after(sample, turn, self.ground, views))
            reply = self.reasoner.encode_reply(said)
            if _is_learned(sample.row.trace, turn):
                earlier.append((len(so_far.ids), len(so_far.ids) + len(reply)))
            so_far = self.reasoner.append(so_far, reply, added)
        return so_far, self.reasoner.encode_reply(sample.replies[-1]), earlier

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """A batch. examples: {"sample": number}."""
        import torch

        rows = [self.encode(int(example["sample"])) for example in examples]
        longest = max(len(prompt.ids) + len(reply) for prompt, reply, _ in rows)
        pad = self.reasoner.pad_token_id
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        batch |= {name: torch.zeros(shape, dtype=torch.long) for name in rows[0][0].kinds}
        for row, (prompt, reply, earlier) in enumerate(rows):
            start, end = len(prompt.ids), len(prompt.ids) + len(reply)
            batch["input_ids"][row, :end] = torch.tensor(prompt.ids + reply)
            batch["attention_mask"][row, :end] = 1
            batch["labels"][row, start:end] = torch.tensor(reply)
            for first, last in earlier:
                batch["labels"][row, first:last] = batch["input_ids"][row, first:last]
            for name, kind in prompt.kinds.items():
                batch[name][row, :start] = torch.tensor(kind)
        return batch | join_images([prompt.images for prompt, _, _ in rows])


def join_images(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The image tensors of several dialogues as those of one batch: joined along the first axis, others padded with zeros."""
    import torch

    joined = {}
    for name in {name: None for part in parts for name in part}:
        tensors = [part[name] for part in parts if name in part]
        if not hasattr(tensors[0], "shape"):
            joined[name] = [item for tensor in tensors for item in tensor]
            continue
        largest = [max(t.shape[axis] for t in tensors) for axis in range(1, tensors[0].ndim)]
        padded = []
        for tensor in tensors:
            lacking = [n - have for n, have in zip(largest, tensor.shape[1:], strict=True)]
            amounts = [amount for n in reversed(lacking) for amount in (0, n)]
            padded.append(torch.nn.functional.pad(tensor, amounts) if any(lacking) else tensor)
        joined[name] = torch.cat(padded)
    return joined


def _encoded_bytes(encoded: Encoded) -> int:
    return 64 * len(encoded.ids) + sum(int(t.nbytes) for t in encoded.images.values() if hasattr(t, "nbytes"))


def validation_sets(rows: Sequence[TraceRow], count: int) -> list[list[TraceRow]]:
    """At most `count` paraphrase sets (equal case and target), evenly chosen."""
    sets: dict[tuple[str, tuple[str, ...] | None], list[TraceRow]] = {}
    for row in rows:
        sets.setdefault((row.case, row.target), []).append(row)
    return evenly(list(sets.values()), count)


def validate(
    sets: Sequence[Sequence[TraceRow]],
    ground: Ground,
    cases: Cases,
    reasoner: Reasoner,
    segmenter: Segmenter,
    *,
    seed: int = 0,
    bank: Retriever | None = None,
) -> dict[str, float]:
    """Answer the requests of paraphrase sets greedily, with the skills that a bank has for them, and draw the answers.

    "exact": share of all requests whose answer is the trace's; "faults": whose reply could not be read; "dice_mean", "dice_worst",
    "dice_std": means over sets with a present target of mean, worst and std (ddof 0) over their paraphrases.
    """
    exact, faults, scores = [], [], []
    for rows in sets:
        case = rows[0].case
        episodes = solve(
            cases.views(case),
            cases.volume(case),
            [row.text for row in rows],
            protocol=ground.protocol,
            reasoner=reasoner,
            segmenter=segmenter,
            bank=bank,
            targets=ground.targets,
            seed=seed,
        )
        for row, episode in zip(rows, episodes, strict=True):
            said = ABSENT if episode.absent_by == "reasoner" else episode.target
            exact.append(float(said == row.trace.answer))
            faults.append(float(episode.status == "fault"))
        if rows[0].target is not None:
            truth = cases.truth(case, rows[0].target)
            drawn = [np.zeros_like(truth) if episode.mask is None else episode.mask.array for episode in episodes]
            scores.append(over_paraphrases([dice(mask, truth) or 0.0 for mask in drawn]))
    found = {"exact": float(np.mean(exact)), "faults": float(np.mean(faults))} if exact else {}
    if scores:
        found |= {f"dice_{name}": float(np.mean([getattr(s, name) for s in scores])) for name in ("mean", "worst", "std")}
    return found
