"""Requests for a whole dataset: which targets each case really has, in which language each case is asked, how many wordings.

Language follows the splits: training and bank cases get training language, validation cases validation language, test cases test
language. Bank cases get training language because skills are accepted on them before the reasoner is frozen: validation and test
language must stay unseen until then.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seerseg.dataset import CaseFiles, RawDataset, Request, Splits
from seerseg.dataset.workers import each
from seerseg.errors import DatasetError, NothingToDoError, SeerSegError, UsageError, did_you_mean
from seerseg.planning import Plans
from seerseg.vocabulary import Entry, Vocabulary
from seerseg_data.requests.forms import names_of
from seerseg_data.requests.styles import PARAPHRASE_STYLES, SPLITS, STYLES, Context, Split, Wording
from seerseg_data.requests.wording import paraphrase_set, write_request

_BESIDE: dict[str, tuple[str, ...]] = {
    "head": ("neck", "spine"),
    "neck": ("head", "chest", "spine", "upper limb"),
    "chest": ("neck", "abdomen", "spine", "upper limb"),
    "abdomen": ("chest", "pelvis", "spine"),
    "pelvis": ("abdomen", "spine", "lower limb"),
    "spine": ("head", "neck", "chest", "abdomen", "pelvis"),
    "upper limb": ("chest", "neck"),
    "lower limb": ("pelvis",),
}
"""What a scan of one region may show of others, so that nothing there counts as out of region."""


@dataclass(frozen=True)
class Settings:
    """per_target: wordings of each target of each case and language (K); styles: their order; absent_per_case: requests for what
    is not in the scan; unions: also ask for wholes of several labels; folds: whose validation cases get validation language;
    language: one split for all cases instead."""

    per_target: int = 16
    styles: tuple[str, ...] = PARAPHRASE_STYLES
    absent_per_case: int = 4
    unions: bool = False
    folds: tuple[int, ...] = (0,)
    language: Split | None = None

    def __post_init__(self) -> None:
        if self.per_target < 1 or self.absent_per_case < 0:
            raise UsageError(
                f"per_target must be at least 1 and absent_per_case at least 0, not {self.per_target} and {self.absent_per_case}."
            )
        for style in self.styles:
            if style not in STYLES:
                raise UsageError(f"There is no style {style!r}.{did_you_mean(style, STYLES)} The styles are {', '.join(STYLES)}.")
            if STYLES[style].absent:
                raise UsageError(f"The style {style!r} is of targets that are not in the scan; how many of them is --absent_per_case.")
        if not self.styles:
            raise UsageError("A paraphrase set needs at least one style.")
        if self.language is not None and self.language not in SPLITS:
            raise UsageError(f"There is no language split {self.language!r}; they are {', '.join(SPLITS)}.")

    @classmethod
    def from_plans(cls, plans: Plans | None, **given: Any) -> Settings:
        """What the plans fix (`requests.per_target`, `requests.styles`), the defaults where they say nothing; `given` comes first."""
        planned: dict[str, Any] = {}
        for name in ("per_target", "styles"):
            if plans is not None and f"requests.{name}" in plans.values:
                value = plans.value(f"requests.{name}")
                planned[name] = tuple(value) if name == "styles" else int(value)
        return cls(**{**planned, **{key: value for key, value in given.items() if value is not None}})


@dataclass(frozen=True)
class Made:
    """A request and all that its wording was made from. name: canonical name of what is asked for, also of what is absent; writer:
    the language model that rewrote it, "" when none did."""

    request: Request
    wording: Wording
    name: str
    writer: str = ""

    def to_json(self) -> dict[str, Any]:
        """One line of requests.jsonl; beside the request's own keys those that prove where its language came from."""
        line = self.request.to_json()
        line |= {"asked": self.name, "surface": self.wording.surface}
        if self.wording.template:
            line["template"] = self.wording.template
        if self.wording.slips:
            line["slips"] = list(self.wording.slips)
        if self.writer:
            line["writer"] = self.writer
        return line


@dataclass(frozen=True)
class Report:
    """What was made. faults: case -> the sentence why it has no requests; notes: sentences; replaced: style -> wordings that the style
    could not give for a target, so that another took its place; vocabulary: all splits of it, with the dataset's own names."""

    made: tuple[Made, ...]
    settings: Settings
    seed: int
    context: Context
    vocabulary: Vocabulary
    faults: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    replaced: Mapping[str, int] = field(default_factory=dict)

    @property
    def requests(self) -> list[Request]:
        """The requests alone."""
        return [made.request for made in self.made]


def make_requests(
    dataset: RawDataset,
    *,
    splits: Splits,
    settings: Settings | None = None,
    plans: Plans | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    workers: int = 1,
) -> list[Request]:
    """Requests for every labelled case that the splits give a place. DatasetError for the first case whose label map cannot be used;
    `make` gives the rest beside the faults."""
    report = make(
        dataset, splits=splits, settings=settings or Settings.from_plans(plans), seed=seed, vocabulary=vocabulary, workers=workers
    )
    if report.faults:
        raise DatasetError(next(iter(report.faults.values())))
    return report.requests


def make(
    dataset: RawDataset,
    *,
    splits: Splits,
    settings: Settings | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    workers: int = 1,
    progress: Callable[[], None] | None = None,
) -> Report:
    """As `make_requests`, with the wordings, and with what went wrong case by case. NothingToDoError when no case has a label map."""
    settings = settings or Settings()
    known = (vocabulary or Vocabulary.load()).extend(dataset.descriptions)
    context = context_of(dataset, known)
    languages = languages_of(dataset, splits, settings)
    files = [f for f in (*dataset.cases.values(), *dataset.test_cases.values()) if f.id in languages]
    without = sorted(f.id for f in files if f.label is None)
    labelled = [f for f in files if f.label is not None]
    faults = {case: f"Case {case} has no label map, so nobody knows what is in it. Add it to the labels folder." for case in without}
    if not labelled:
        raise NothingToDoError(f"{dataset.name} has no case with a label map among its splits, so no requests can be made for it.")
    count = _CountLabels(dataset.labels, dataset.ignore_label)
    found: dict[str, Present] = {}
    for case, result in each(count, labelled, workers, preload=("seerseg.volume", "seerseg_data.requests.generate")):
        if isinstance(result, SeerSegError):
            faults[case.id] = str(result)
        else:
            found[case.id] = result
        if progress is not None:
            progress()
    maker = _Maker(dataset, context, known, settings, seed)
    made = [one for f in labelled if f.id in found for split in languages[f.id] for one in maker.case(f.id, found[f.id], split)]
    left_out = sorted(set(dataset.cases) - splits.cases)
    notes = [f"The splits give no place to {len(left_out)} cases, which get no requests: {', '.join(left_out[:5])}."] if left_out else []
    wholes = [] if settings.unions else [name for name, _ in unions(dataset, known, dataset.labels)]
    if wholes:
        more = f" and {len(wholes) - 3} more" if len(wholes) > 3 else ""
        notes.append(f"Labels together make up {', '.join(wholes[:3])}{more}: --unions asks for wholes too, which training should know.")
    return Report(tuple(made), settings, seed, context, known, faults, tuple(notes), dict(maker.replaced))


@dataclass(frozen=True)
class Present:
    """Which labels a case holds. here: their names, in the dataset's order; certain: whether what is not there is known to be absent
    (no voxel is marked as not annotated)."""

    here: tuple[str, ...]
    certain: bool


@dataclass(frozen=True)
class _CountLabels:
    """Reads a label map and finds what is in it; DatasetError for undeclared values. Can be pickled."""

    labels: Mapping[str, tuple[int, ...]]
    ignore: int | None

    def __call__(self, case: CaseFiles) -> Present:
        import numpy as np

        from seerseg.volume import read_labels

        path = case.label
        if path is None or not path.is_file():
            raise DatasetError(f"The label map {path} of case {case.id} does not exist. Put it there.")
        array, _ = read_labels(path)
        if np.issubdtype(array.dtype, np.integer) and array.size and 0 <= int(array.min()) and int(array.max()) < 1 << 16:
            values = set(np.flatnonzero(np.bincount(array.ravel())).tolist())
        else:
            values = {int(v) for v in np.unique(array)}
        declared = {0, *(v for listed in self.labels.values() for v in listed), *([self.ignore] if self.ignore is not None else [])}
        strange = sorted(values - declared)
        if strange:
            raise DatasetError(
                f"The label map {path} holds the value {strange[0]}, which dataset.json does not declare. Declare it or mend the file."
            )
        here = tuple(name for name, listed in self.labels.items() if values & set(listed))
        return Present(here, self.ignore is None or self.ignore not in values)


def context_of(dataset: RawDataset, vocabulary: Vocabulary) -> Context:
    """What all requests of a dataset share: modality, region, names, and whether sides may be said."""
    names = tuple(dict.fromkeys(dataset.canonical(label) for label in dataset.labels))
    entries = [e for e in (vocabulary.resolve(name) for name in names) if e is not None]
    regions = Counter(region for entry in entries for region in entry.regions if region != "whole body")
    region = regions.most_common(1)[0][0] if regions else None
    sided = any(vocabulary.key(name)[1] in ("left", "right") for name in names)
    sided = sided or any(e.side in ("left", "right") or any(d.laterality for d in dataset.descriptions.values()) for e in entries)
    return Context(next((m for m in dataset.modalities if m), None), region, names, not sided)


def languages_of(dataset: RawDataset, splits: Splits, settings: Settings) -> dict[str, tuple[Split, ...]]:
    """Case -> the languages that it is asked in. A case that one of `settings.folds` validates on and another trains on gets both."""
    unknown = [k for k in settings.folds if not 0 <= k < len(splits.folds)]
    if unknown:
        raise UsageError(f"There is no fold {unknown[0]}; the splits of {dataset.name} have folds 0 to {len(splits.folds) - 1}.")
    found: dict[str, set[Split]] = {}
    for k in settings.folds:
        fold = splits.folds[k]
        for case in (*fold.train, *fold.bank):
            found.setdefault(case, set()).add("train")
        for case in fold.val:
            found.setdefault(case, set()).add("val")
    for case in (*splits.test, *dataset.test_cases):
        found[case] = {"test"}
    if settings.language is not None:
        return {case: (settings.language,) for case in found}
    return {case: tuple(s for s in SPLITS if s in languages) for case, languages in found.items()}


class _Maker:
    """Makes the requests of one case after the other."""

    def __init__(self, dataset: RawDataset, context: Context, vocabulary: Vocabulary, settings: Settings, seed: int) -> None:
        self.dataset, self.context, self.vocabulary, self.settings, self.seed = dataset, context, vocabulary, settings, seed
        self.label_of = {dataset.canonical(label): label for label in dataset.labels}
        self.elsewhere = out_of_region(vocabulary, context)
        self.replaced: Counter[str] = Counter()

    def case(self, case: str, present: Present, split: Split) -> list[Made]:
        made: list[Made] = []
        targets: list[tuple[str, tuple[str, ...]]] = [(self.dataset.canonical(label), (label,)) for label in present.here]
        if self.settings.unions:
            targets += unions(self.dataset, self.vocabulary, present.here)
        for name, labels in targets:
            seed = f"{self.seed}|{self.dataset.name}|{case}"
            wordings = paraphrase_set(
                name,
                split=split,
                count=self.settings.per_target,
                seed=seed,
                vocabulary=self.vocabulary,
                context=self.context,
                styles=self.settings.styles,
            )
            self._count(wordings)
            made += [self._made(case, f"{self._number(name, labels):03d}_{n:02d}", w, labels, name) for n, w in enumerate(wordings, 1)]
        return made + self._absent(case, present, split)

    def _count(self, wordings: Sequence[Wording]) -> None:
        wished = Counter(self.settings.styles[: self.settings.per_target])
        got = Counter(w.style for w in wordings)
        self.replaced.update({style: wished[style] - got[style] for style in wished if wished[style] > got[style]})

    def _number(self, name: str, labels: tuple[str, ...]) -> int:
        order = list(self.dataset.labels)
        return order.index(labels[0]) + 1 if len(labels) == 1 else 900 + order.index(labels[0])

    def _made(self, case: str, number: str, wording: Wording, labels: tuple[str, ...] | None, name: str) -> Made:
        identifier = f"{case}__{wording.split}_{number}_{wording.style}"
        return Made(Request(identifier, case, wording.text, labels, wording.style, wording.split), wording, name)

    def _absent(self, case: str, present: Present, split: Split) -> list[Made]:
        rng = random.Random(f"{self.seed}|{self.dataset.name}|{case}|{split}|absent")
        here = set(present.here)
        missing = [self.dataset.canonical(label) for label in self.dataset.labels if label not in here] if present.certain else []
        inside = rng.sample(missing, min(len(missing), self.settings.absent_per_case // 2))
        plan = [("absent", name) for name in inside]
        outside = rng.sample(self.elsewhere, min(len(self.elsewhere), 3 * self.settings.absent_per_case))
        made: list[Made] = []
        for style, name in (*plan, *(("out_of_region_reference", entry) for entry in outside)):
            if len(made) >= self.settings.absent_per_case:
                break
            for _ in range(6):
                wording = write_request(name, style=style, split=split, rng=rng, vocabulary=self.vocabulary, context=self._without(name))
                if wording is not None:
                    made.append(self._made(case, f"000_{len(made) + 1:02d}", wording, None, name))
                    break
        return made

    def _without(self, name: str) -> Context:
        """The context for asking for what is not there: sides may be said, as nothing contradicts them."""
        return replace(self.context, unsided=False) if name not in self.label_of else self.context


def unions(dataset: RawDataset, vocabulary: Vocabulary, here: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(canonical name, labels) of wholes whose parts are all labels of their own and present, and which are no label themselves:
    pairs of a left and a right structure, and wholes that are known to be the union of their parts."""
    present = set(here)
    by_entry = {e.name: label for label in dataset.labels if (e := vocabulary.resolve(dataset.canonical(label))) is not None}
    found: list[tuple[str, tuple[str, ...]]] = []
    for entry in vocabulary:
        labels = tuple(by_entry[piece] for piece in vocabulary.pieces(entry.name, by_entry))
        if len(labels) > 1 and present.issuperset(labels):
            found.append((entry.name, labels))
    return found


def out_of_region(vocabulary: Vocabulary, context: Context) -> list[str]:
    """Structures that no scan of this region can show, in the vocabulary's order: those that people ask for, with lay words or a
    description."""
    entries = names_of(vocabulary, context).entries.values()
    here = {region for entry in entries for region in entry.regions}
    if not here or "whole body" in here:
        return []
    near = here | {beside for region in here for beside in _BESIDE.get(region, ())}
    return [e.name for e in vocabulary if e.regions and near.isdisjoint(e.regions) and _well_known(e)]


def _well_known(entry: Entry) -> bool:
    return "whole body" not in entry.regions and any(s.kind in ("lay", "description") for s in entry.surfaces)
