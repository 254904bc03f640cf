"""Episodes on cases whose truth is known, run once however often they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from seerseg.consensus import ConsensusSettings, Readings
from seerseg.dataset import RawDataset, Request
from seerseg.episode import SKILLS_SHOWN, finish
from seerseg.metrics.masks import dice
from seerseg.model import Model
from seerseg.protocols.base import ABSENT
from seerseg.skills.base import EmptyBank, Query, Retriever, Skill
from seerseg.store import open_case
from seerseg.views import render


@dataclass(frozen=True)
class Outcome:
    """What came of one request. truth: canonical name of the target or "absent"; answer: the name that was answered, "absent", or ""
    when the reply could not be read or nothing was drawn; dice: of the mask, 1 or 0 for a right or wrong "absent"; shown, named: ids of
    skills."""

    case: str
    request: str
    text: str
    truth: str
    style: str
    modality: str | None
    answer: str
    dice: float
    wellformed: float
    shown: tuple[str, ...] = ()
    named: tuple[str, ...] = ()

    @property
    def credited(self) -> tuple[str, ...]:
        """Skills that the outcome is credited to: those that the rationale names, else the first that was shown."""
        return self.named or self.shown[:1]


SHOWN = 2
"""Counts how skills are shown, so that outcomes of an earlier way are not taken for those of this one."""


class Arena(Protocol):
    """Something that runs requests with a bank and knows how well they went."""

    def run(self, requests: Sequence[Request], bank: Retriever) -> list[Outcome]:
        """Outcomes in the order of the requests."""
        ...


class StoreArena:
    """Preprocessed cases with labels, a model's reasoner and its frozen segmenter.

    An outcome depends on the request and the skills it is shown alone, so it is kept under both; `memo` is a JSON Lines file that keeps
    them between runs (several processes may append to files of their own and read each other's). consensus: plainly read once when None.
    """

    def __init__(
        self,
        dataset: RawDataset,
        folder: Path,
        model: Model,
        *,
        memo: Path | None = None,
        read_also: Sequence[Path] = (),
        consensus: ConsensusSettings | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._dataset, self._folder, self._model, self._progress = dataset, folder, model, progress
        self._memo_path, self._consensus = memo, consensus or ConsensusSettings()
        self._identity = hashlib.blake2b(
            f"{model.reasoner.card.identity}|{model.segmenter.card.identity}|{model.protocol.name}|{model.view_spec}".encode(),
            digest_size=8,
        ).hexdigest()
        self._memo: dict[str, Outcome] = {}
        self._modalities: dict[str, str | None] = {}
        for path in (*read_also, *((memo,) if memo else ())):
            self._memo |= _read_memo(path)

    def run(self, requests: Sequence[Request], bank: Retriever) -> list[Outcome]:
        """Outcomes in order; every case is opened once, its views rendered once, its new requests reasoned in one batch."""
        shown = {r.id: tuple(bank.retrieve(self._query(r), SKILLS_SHOWN)) for r in requests}
        keys = {r.id: self._key(r, shown[r.id]) for r in requests}
        missing: dict[str, list[Request]] = {}
        for request in requests:
            if keys[request.id] not in self._memo:
                missing.setdefault(request.case, []).append(request)
        done, total = len(requests) - sum(map(len, missing.values())), len(requests)
        for case, mine in missing.items():
            fresh = {keys[r.id]: outcome for r, outcome in zip(mine, self._solve(case, mine, shown), strict=True)}
            self._memo |= fresh
            self._append(fresh)
            done += len(mine)
            self._progress(done, total)
        return [self._memo[keys[r.id]] for r in requests]

    def _query(self, request: Request) -> Query:
        allowed = self._model.targets
        return Query(request.text, self.modality(request.case), targets=allowed.names if allowed.closed else ())

    def modality(self, case: str) -> str | None:
        """The modality of a case, read once."""
        if case not in self._modalities:
            self._modalities[case] = open_case(self._folder, case).modality()
        return self._modalities[case]

    def _key(self, request: Request, skills: Sequence[Skill]) -> str:
        consensus = 1 if self._consensus.plain else asdict(self._consensus)
        said = [self._identity, consensus, request.case, request.text, [f"{s.id}/{SHOWN}" for s in skills], self._truth(request)]
        return hashlib.blake2b(json.dumps(said, ensure_ascii=False).encode(), digest_size=12).hexdigest()

    def _truth(self, request: Request) -> str:
        if request.target is None:
            return ABSENT
        names = [self._dataset.canonical(label) for label in request.target]
        return names[0] if len(names) == 1 else " and ".join(names)

    def _solve(self, case: str, requests: Sequence[Request], shown: Mapping[str, Sequence[Skill]]) -> list[Outcome]:
        model = self._model
        stored = open_case(self._folder, case)
        views, volume = render(stored.channel(0), model.view_spec), stored.volume(0)
        readings = Readings.open(
            views,
            [r.text for r in requests],
            settings=self._consensus,
            protocol=model.protocol,
            bank=_Known({r.text: shown[r.id] for r in requests}),
            targets=model.targets,
        )
        readings.ask(model.reasoner)
        episodes = readings.settle(finish(readings.dialogues, volume, reasoner=model.reasoner, segmenter=model.segmenter))
        held = stored.labels()
        labels = None if held is None else held[0]
        out = []
        for request, episode in zip(requests, episodes, strict=True):
            absent = episode.status == "absent"
            out.append(
                Outcome(
                    case=case,
                    request=request.id,
                    text=request.text,
                    truth=self._truth(request),
                    style=request.style,
                    modality=views.modality,
                    answer=ABSENT if absent else episode.target or "",
                    dice=self._dice(request, episode.mask.array if episode.mask is not None else None, absent, labels),
                    wellformed=model.protocol.wellformed(episode.replies[-1]) if episode.replies else 0.0,
                    shown=tuple(s.id for s in shown[request.id]),
                    named=tuple(episode.answer.skills) if episode.answer else (),
                )
            )
        return out

    def _dice(self, request: Request, mask: NDArray[np.bool_] | None, absent: bool, labels: NDArray[Any] | None) -> float:
        if request.target is None:
            return float(absent)
        if mask is None or labels is None or absent:
            return 0.0
        values = [v for label in request.target for v in self._dataset.labels[label]]
        return dice(mask, np.isin(labels, values)) or 0.0

    def _append(self, fresh: Mapping[str, Outcome]) -> None:
        if self._memo_path is None:
            return
        self._memo_path.parent.mkdir(parents=True, exist_ok=True)
        with self._memo_path.open("a", encoding="utf-8") as file:
            for key, outcome in fresh.items():
                file.write(json.dumps({"key": key, **asdict(outcome)}, ensure_ascii=False) + "\n")


class _Known:
    """Skills that were looked up already, by the request's text."""

    mode = identity = "known"

    def __init__(self, skills: Mapping[str, Sequence[Skill]]) -> None:
        self._skills = skills

    def retrieve(self, query: Query, limit: int) -> Sequence[Skill]:
        """As `Retriever.retrieve`."""
        return self._skills[query.text][:limit]


def bare(arena: Arena, requests: Sequence[Request]) -> list[Outcome]:
    """The outcomes without any skill."""
    return arena.run(requests, EmptyBank())


def _read_memo(path: Path) -> dict[str, Outcome]:
    """What an earlier run kept; a line that was cut by a crash is done again."""
    kept: dict[str, Outcome] = {}
    if not path.exists():
        return kept
    for raw in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(raw)
            key = line.pop("key")
            outcome = Outcome(**line)
            kept[key] = replace(outcome, shown=tuple(outcome.shown), named=tuple(outcome.named))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return kept
