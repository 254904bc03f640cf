"""A SeerSeg that can predict: which reasoner, segmenter, protocol, bank, views and targets belong together.

On disk a trained one is a folder with `manifest.json` (schema 1):

    {"schema": 1, "protocol": "seer", "dataset": "Dataset004_Hippocampus" | null, "fold": 0 | null,
     "reasoner": "cascade" | "lexicon" | folder name inside this folder | hub id | "nano:" and a folder name inside this folder,
     "segmenter": "nano" | ...,
     "segmenter_identity": "..." | null, "views": {...} | null, "targets": ["...", ...], "closed": true | false,
     "label_values": {"anterior hippocampus": [1], ...} | null, "bank": "frozen" | "none",
     "descriptions": {"anterior hippocampus": {"canonical": ..., "synonyms": [...], "region": ..., "laterality": ...}} | null}

Nothing in it can run code. Parts are loaded when first used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seerseg.episode import Targets
from seerseg.errors import ModelError, UsageError
from seerseg.paths import read_json, resolve_dataset, safe_name, write_json
from seerseg.protocols import load_protocol
from seerseg.protocols.base import Protocol
from seerseg.protocols.combined import lacking_kinds
from seerseg.reasoners import joined, parts_of
from seerseg.reasoners.base import Reasoner
from seerseg.segmenters.base import Segmenter
from seerseg.skills.base import EmptyBank, Retriever
from seerseg.views import SEER_VIEWS, ViewSpec, agreed_views
from seerseg.vocabulary import LabelDescription

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
BANK = "bank"
BASE = "base"
"""Where the models that are used as they are may lie inside a model folder: base/reasoner, base/segmenter."""
DEFAULT_REASONER = "cascade"
DEFAULT_SEGMENTER = "nano"
DEFAULT_PROTOCOL = "seer"


@dataclass(frozen=True)
class ModelSpec:
    """What a manifest says. Names of parts that lie inside the model folder are already resolved to paths."""

    reasoner: str = DEFAULT_REASONER
    segmenter: str = DEFAULT_SEGMENTER
    protocol: str = DEFAULT_PROTOCOL
    views: ViewSpec | None = None
    targets: tuple[str, ...] = ()
    closed: bool = False
    label_values: Mapping[str, tuple[int, ...]] | None = None
    descriptions: Mapping[str, LabelDescription] | None = None
    dataset: str | None = None
    fold: int | None = None
    bank: str = "none"
    segmenter_identity: str | None = None
    folder: Path | None = None


@dataclass(eq=False)
class Model:
    """The loaded parts of one SeerSeg; each is loaded when first used, and once."""

    spec: ModelSpec
    device: str = "cpu"
    dtype: str | None = None
    offline: bool = True
    accept_license: bool = False
    reasoner_given: Reasoner | None = None
    segmenter_given: Segmenter | None = None
    bank: Retriever = field(default_factory=EmptyBank)

    @cached_property
    def protocol(self) -> Protocol:
        """The dialogue grammar."""
        return load_protocol(self.spec.protocol)

    @cached_property
    def reasoner(self) -> Reasoner:
        """The reasoner."""
        if self.reasoner_given is not None:
            return self.reasoner_given
        from seerseg.reasoners import has_rules, load_reasoner

        # a model that was trained has learned what labels mean; the rules have to be told
        told = {"descriptions": self.spec.descriptions} if self.spec.descriptions and has_rules(self.spec.reasoner) else {}
        return load_reasoner(self.spec.reasoner, device=self.device, dtype=self.dtype, offline=self.offline, **told)

    @cached_property
    def segmenter(self) -> Segmenter:
        """The frozen segmenter, behind the memoising cache; ModelError when it is another than the manifest's, or cannot
        take what the protocol's answers are made of."""
        from seerseg.segmenters import load_segmenter
        from seerseg.segmenters.cache import CachedSegmenter

        made = self.segmenter_given or load_segmenter(
            self.spec.segmenter, device=self.device, dtype=self.dtype, offline=self.offline, accept_license=self.accept_license
        )
        expected = self.spec.segmenter_identity
        if expected is not None and made.card.identity != expected:
            raise ModelError(
                f"The model in {self.spec.folder} was trained with segmenter {self.spec.segmenter!r} of identity {expected}, "
                f"but the one here is {made.card.identity}. Install the same weights, or name another with --segmenter."
            )
        lacking = lacking_kinds(self.protocol, made.capabilities)
        if lacking:
            raise ModelError(
                f"The protocol {self.protocol.name!r} answers with {', '.join(lacking)}, which the segmenter {made.card.name!r} "
                "cannot take. "
                "Choose another segmenter with --segmenter or another protocol with --protocol."
            )
        return made if isinstance(made, CachedSegmenter) else CachedSegmenter(made)

    @cached_property
    def targets(self) -> Targets:
        """The names that may be answered: the dataset's, else what the segmenter lists."""
        if self.spec.targets:
            return Targets(self.spec.targets, closed=self.spec.closed)
        able = self.segmenter.capabilities
        return Targets(able.vocabulary, closed=able.text == "closed")

    @property
    def view_spec(self) -> ViewSpec:
        """The views that the reasoner is shown."""
        return self.spec.views or self.protocol.view_spec

    @cached_property
    def identity(self) -> str:
        """Hex digest of everything that could change a mask: for resume and records."""
        parts = {
            "protocol": self.protocol.name,
            "reasoner": self.reasoner.card.identity,
            "segmenter": self.segmenter.card.identity,
            "bank": self.bank.identity,
            "views": self.view_spec.to_json(),
            "targets": list(self.targets.names),
            "closed": self.targets.closed,
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What is written beside every result."""
        return {
            "protocol": self.protocol.name,
            "reasoner": self.reasoner.card.name,
            "reasoner_identity": self.reasoner.card.identity,
            "segmenter": self.segmenter.card.name,
            "segmenter_identity": self.segmenter.card.identity,
            "bank": self.bank.mode,
            "bank_identity": self.bank.identity,
            "dataset": self.spec.dataset,
            "fold": self.spec.fold,
            "identity": self.identity,
        }


def resolve_device(name: str) -> str:
    """ "auto" as "cuda", "mps" or "cpu", whichever torch finds first; UsageError for a device that is not there."""
    if name == "cpu":
        return name  # without torch: not every segmenter and reasoner needs it
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise UsageError(f"There is no device {name!r}. Choose auto, cpu, cuda, cuda:1 or mps.")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        raise UsageError(
            f"The device {name!r} is not here ({there} of kind {kind}). Use -device auto or cpu; seerseg_doctor shows what torch sees."
        )
    return name


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a model folder; ModelError when it is none or damaged."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ModelError(f"There is no model folder {folder}.")
    value = read_json(path, ModelError, schema=MANIFEST_SCHEMA)
    try:
        values = value.get("label_values")
        return ModelSpec(
            reasoner=_inside(folder, value["reasoner"], "reasoner"),
            segmenter=_inside(folder, value["segmenter"], "segmenter"),
            protocol=str(value["protocol"]),
            views=ViewSpec.from_json(value["views"]) if value.get("views") else None,
            targets=tuple(str(t) for t in value.get("targets", ())),
            closed=bool(value.get("closed", False)),
            label_values={str(k): tuple(int(i) for i in v) for k, v in values.items()} if values else None,
            descriptions={
                str(k): LabelDescription(**{**v, "synonyms": tuple(v.get("synonyms", ()))}) for k, v in value["descriptions"].items()
            }
            if value.get("descriptions")
            else None,
            dataset=value.get("dataset"),
            fold=value.get("fold"),
            bank=str(value.get("bank", "none")),
            segmenter_identity=value.get("segmenter_identity"),
            folder=folder,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {type(error).__name__} {error}. Export the model again.") from None


def write_spec(folder: Path, spec: ModelSpec) -> None:
    """Write `manifest.json`; parts that lie inside the folder are named relative to it."""
    write_json(folder / MANIFEST, spec_json(folder, spec))


def spec_json(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """What `write_spec` writes."""

    def name(part: str) -> str:
        if len(parts := parts_of(part)) > 1:
            return joined(part, [name(one) for one in parts])
        kind, colon, source = part.partition(":")
        path = Path(source if colon else part)
        for root in (folder, folder.resolve()):
            if path.is_absolute() and path.is_relative_to(root):
                return (kind + colon if colon else "") + path.relative_to(root).as_posix()
        return part

    return {
        "schema": MANIFEST_SCHEMA,
        "protocol": spec.protocol,
        "dataset": spec.dataset,
        "fold": spec.fold,
        "reasoner": name(spec.reasoner),
        "segmenter": name(spec.segmenter),
        "segmenter_identity": spec.segmenter_identity,
        "views": spec.views.to_json() if spec.views else None,
        "targets": list(spec.targets),
        "closed": spec.closed,
        "label_values": {k: list(v) for k, v in spec.label_values.items()} if spec.label_values else None,
        "descriptions": {k: asdict(v) for k, v in spec.descriptions.items()} if spec.descriptions else None,
        "bank": spec.bank,
    }


def base_place(role: str, part: str) -> str | None:
    """Where inside a model folder the model that a manifest names as its reasoner or segmenter may lie: what is there is taken instead of
    the path or hub id that was named. None for a part that is known by its name alone.

    >>> base_place("segmenter", "nnunet:/models/Dataset042/3d_fullres?folds=0")
    'base/segmenter/3d_fullres'
    """
    _, colon, source = part.partition(":") if ":" in part else ("", "", part)
    place = source.partition("?")[0].rstrip("/")
    return f"{BASE}/{role}/{place.rpartition('/')[2]}" if place and (colon or "/" in place) else None


def _inside(folder: Path, part: Any, role: str) -> str:
    """A part of the manifest: a path (after "NAME:", if it has that) when the folder holds it, else a name; nothing may point out of
    the folder."""
    text = str(part)
    if len(parts := parts_of(text)) > 1:
        return joined(text, [_inside(folder, one, role) for one in parts])
    kind, colon, source = text.partition(":") if ":" in text else ("", "", text)
    place, mark, options = source.partition("?")
    if ".." in Path(text).parts or ".." in Path(source).parts:
        raise ModelError(f"{folder / MANIFEST} names {text!r}, which points out of the model folder.")
    if (folder / text).exists():
        return str(folder / text)
    for own in filter(None, (base_place(role, text), place if colon else "")):
        if (folder / own).exists():
            return f"{kind}{colon}{folder / own}{mark}{options}"
    return text


def run_name(plans: str, protocol: str, reasoner: str, segmenter: str) -> str:
    """The folder name of a run, file-system-safe. Of a part that is a folder or file its last name counts."""
    return "__".join(_label(part) for part in (plans, protocol, reasoner, segmenter))


def _label(part: str) -> str:
    name, colon, source = part.partition(":")
    if colon and source:
        last = Path(source).name
        part = last if name == "vlm" else f"{name}-{last}"
    elif Path(part).expanduser().is_absolute() or part.startswith((".", "~")) or ("/" in part and Path(part).is_dir()):
        part = Path(part).expanduser().resolve().name
    return re.sub("__+", "_", safe_name(part, 60))


def find_run(results: Path, dataset: str, fold: int, *, plans: str | None = None, hints: Mapping[str, str | None] | None = None) -> Path:
    """The one run folder of a dataset and fold; several are listed, never guessed.

    hints: "protocol", "reasoner", "segmenter" -> name, None for any.
    """
    root = results / resolve_dataset(dataset, results)
    wanted = [plans, *((hints or {}).get(part) for part in ("protocol", "reasoner", "segmenter"))]
    found = []
    for path in sorted(root.iterdir()):
        parts = path.name.split("__")
        fits = len(parts) == 4 and all(want is None or _label(want) == part for want, part in zip(wanted, parts, strict=True))
        if fits and (path / f"fold_{fold}" / MANIFEST).is_file():
            found.append(path)
    if not found:
        raise ModelError(f"{root} holds no trained model of fold {fold}. Train one, or give a model folder with -m.")
    if len(found) > 1:
        raise UsageError(
            f"Several models of fold {fold} fit: {', '.join(p.name for p in found)}. Say which, with -m {found[0]}/fold_{fold}."
        )
    return found[0] / f"fold_{fold}"


def open_model(
    folder: Path | None = None,
    *,
    reasoner: str | Reasoner | None = None,
    segmenter: str | Segmenter | None = None,
    protocol: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = True,
    accept_license: bool = False,
    bank: Retriever | str | Path | None = None,
) -> Model:
    """The model in a folder, or the shipped defaults; what is given besides replaces a part.

    bank: a retriever, a bank folder, or "none"; None for the model's own. BankError when it cannot be opened.
    """
    spec = read_spec(folder) if folder is not None else ModelSpec()
    changes: dict[str, Any] = {}
    if isinstance(reasoner, str):
        changes["reasoner"] = reasoner
    if segmenter is not None:
        changes["segmenter_identity"] = None
    if isinstance(segmenter, str):
        changes["segmenter"] = segmenter
    if protocol is not None:
        changes["protocol"] = protocol
        if spec.views is not None and protocol != spec.protocol:  # the manifest's views were agreed with another protocol
            changes["views"] = _views_for(protocol, spec.protocol, spec.views)
    spec = replace(spec, **changes)
    return Model(
        spec=spec,
        device=resolve_device(device),
        dtype=dtype,
        offline=offline,
        accept_license=accept_license,
        reasoner_given=None if reasoner is None or isinstance(reasoner, str) else reasoner,
        segmenter_given=None if segmenter is None or isinstance(segmenter, str) else segmenter,
        bank=_bank(bank, spec),
    )


def _views_for(protocol: str, before: str, views: ViewSpec) -> ViewSpec:
    """What the reasoner is shown when another protocol takes the place of the one that the manifest's views were agreed with."""
    if load_protocol(before).view_spec != SEER_VIEWS:  # how many slices were planned is not in the manifest
        views = replace(SEER_VIEWS, plane=views.plane, window=views.window, gamma=views.gamma)
    return agreed_views(views, load_protocol(protocol).view_spec)


def _bank(given: Retriever | str | Path | None, spec: ModelSpec) -> Retriever:
    """The bank that was given, else the one in the model's folder; its mode is what results are marked with."""
    if given is not None and not isinstance(given, str | Path):
        return given
    if given == "none" or (given is None and (spec.bank == "none" or spec.folder is None)):
        return EmptyBank()
    from seerseg.skills.retrieval import FrozenBank

    if given is not None:
        return FrozenBank.open(Path(given).expanduser())
    return FrozenBank.open(Path(str(spec.folder)) / BANK)
