"""The models that a trained one stands on: where they are on this machine, where they may be put, and who may pass them on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seerseg.errors import ModelError, SeerSegError
from seerseg.exchange.record import refused
from seerseg.model import ModelSpec, base_place
from seerseg.paths import read_json
from seerseg.reasoners.vlm_loading import BASE_FILE, SHIPPED, find

State = Literal["shipped", "rules", "package", "own", "here", "missing"]
_FREE = frozenset(
    "apache-2.0 mit isc bsd bsd-2-clause bsd-3-clause zlib unlicense cc0-1.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 mpl-2.0".split()
)
_WORDS = (("apache-2.0", "Apache License"), ("mit", "MIT License"), ("bsd", "Redistribution and use in source and binary forms"))
_RULES = ("lexicon", "verbatim", "grow", "scripted")
_SHIPPED_LICENCE = "cc-by-sa-4.0"


@dataclass(frozen=True)
class Base:
    """A model that is used as it is, as one part of another names it.

    state: "shipped" with SeerSeg; "rules", it has no weights; "package", they come with an installed package or its own download;
    "own", an earlier stage in the model folder; "here", on this machine, be it in the model folder's place for it; "missing". files: where
    they are, None where none are or none are needed; place: where they may be put, within the model folder; needed: False where the
    model holds all that came of it.
    """

    role: Literal["reasoner", "segmenter"]
    name: str
    state: State
    files: Path | None = None
    place: str = ""
    identity: str = ""
    needed: bool = True
    fault: str = ""

    @property
    def licence(self) -> str:
        """As its folder says it, in lower case; "" where it says none."""
        if self.state == "shipped":
            return _SHIPPED_LICENCE
        return licence_of(self.files) if self.files is not None else ""


def find_bases(folder: Path, spec: ModelSpec, named: tuple[str, str]) -> list[Base]:
    """The bases of a model folder. named: reasoner and segmenter as the manifest writes them. Nothing is loaded or fetched."""
    from seerseg.reasoners import parts_of

    parts = zip(parts_of(spec.reasoner), parts_of(named[0]), strict=True)
    return [*(base for part, said in parts for base in reasoner_bases(folder, part, said)), *_segmenter(folder, spec, named[1])]


def may_be_passed_on(licence: str) -> bool:
    """Whether a licence is one of those that let anybody hand the files on."""
    return licence in _FREE


def licence_of(place: Path) -> str:
    """The licence that a folder (or a file's folder) states: in the front matter of its card, else in its licence file; "" if neither."""
    folder = place if place.is_dir() else place.parent
    for card in ("README.md", "MODEL_CARD.md"):
        text = _text(folder / card)
        found = re.search(r"\A---\s*$.*?^licen[sc]e:\s*['\"]?([^\s'\"#]+)", text, re.MULTILINE | re.DOTALL)
        if found:
            return found[1].lower()
    for name in ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md", "COPYING"):
        text = _text(folder / name)[:4000]
        for licence, words in _WORDS:
            if words in text:
                return licence
    return ""


def base_files(base: Base) -> dict[str, Path]:
    """Name -> file of a base that has files: those that a transformers folder is made of, the one file, or an nnU-Net's."""
    if base.files is None:
        return {}
    if base.files.is_file():
        return {base.files.name: base.files}
    top = {p.name: p for p in sorted(base.files.iterdir()) if p.is_file() and not p.name.startswith(".")}
    own = {name: path for name, path in top.items() if not refused(name)}
    if any(name.endswith(".safetensors") for name in own):
        return own
    folds = {p.relative_to(base.files).as_posix(): p for p in sorted(base.files.glob("fold_*/checkpoint_*.pth"))}
    return {**top, **folds}


def reasoner_bases(folder: Path, part: str, named: str) -> Iterator[Base]:
    """Those of one reasoner; of a cascade or a committee, that is one of its members."""
    from seerseg.reasoners import available_reasoners

    kind, source = split(part, set(available_reasoners()))
    if not source or kind in _RULES:
        yield _by_name("reasoner", kind)
        return
    path = Path(source).expanduser()
    place = base_place("reasoner", named) or ""
    if path.is_relative_to(folder) and not path.is_relative_to(folder / "base"):
        yield from _trained(folder, path)
        return
    try:
        files = path if kind not in ("", "vlm", "nano") and path.exists() else find(source, offline=True).folder
    except SeerSegError as fault:
        yield Base("reasoner", named, "missing", None, place, fault=str(fault))
        return
    yield Base("reasoner", named, "here", files, place)


def _trained(folder: Path, model: Path) -> Iterator[Base]:
    """The base of weights or adapters that lie in the model folder."""
    said: dict[str, Any] = read_json(model / BASE_FILE, ModelError, 1) if (model / BASE_FILE).is_file() else {}
    name, identity = str(said.get("name", "")), str(said.get("identity", ""))
    adapter = (model / "adapter_config.json").is_file()
    if not adapter:
        if name:
            yield Base("reasoner", name, "shipped" if name in SHIPPED else "own", None, identity=identity, needed=False)
        return
    place = (model.relative_to(folder) / "base").as_posix()
    name = name or str(read_json(model / "adapter_config.json", ModelError).get("base_model_name_or_path") or "")
    try:
        found = find(model, offline=True).folder
    except SeerSegError as fault:
        yield Base("reasoner", name, "missing", None, place, identity, fault=str(fault))
        return
    if found in SHIPPED.values():
        yield Base("reasoner", name, "shipped", None, "", identity)
    else:
        found = Path(os.path.normpath(found))
        own = found.is_relative_to(folder) and found != folder / place
        yield Base("reasoner", name, "own" if own else "here", found, "" if own else place, identity)


def _segmenter(folder: Path, spec: ModelSpec, named: str) -> Iterator[Base]:
    from seerseg.segmenters import available_segmenters

    kind, source = split(spec.segmenter, set(available_segmenters()))
    identity = spec.segmenter_identity or ""
    if not source or kind in ("totalsegmentator", *_RULES):
        yield _by_name("segmenter", kind, identity)
        return
    place = source.partition("?")[0]
    path = Path(place).expanduser()
    inside = base_place("segmenter", named) or ""
    if not path.exists():
        try:
            path = _on_this_machine(kind, place)
        except SeerSegError as fault:
            yield Base("segmenter", named, "missing", None, inside, identity, fault=str(fault))
            return
    yield Base("segmenter", named, "here", path, inside, identity)


def _on_this_machine(kind: str, source: str) -> Path:
    """Folder or file of a hub id, from the hub's cache; WeightsError when it is not there."""
    if kind in ("sam", "medsam2"):
        from seerseg.segmenters.sam2_weights import find as find_original

        return find_original(source, offline=True)
    return find(source, offline=True).folder


def _by_name(role: Literal["reasoner", "segmenter"], name: str, identity: str = "") -> Base:
    state: State = "shipped" if name == "nano" else "rules" if name in _RULES else "package"
    return Base(role, name, state, identity=identity)


def split(part: str, known: set[str]) -> tuple[str, str]:
    """ "NAME:SOURCE" as (NAME, SOURCE), "NAME" as (NAME, ""), a folder or hub id as ("", it)."""
    kind, colon, source = part.partition(":")
    if kind.casefold() in known:
        return kind.casefold(), source if colon else ""
    return "", part


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""
