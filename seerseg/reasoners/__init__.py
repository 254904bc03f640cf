"""Reasoners by name, folder or hub id. Importing this package loads no torch, transformers, numpy or plug-in.

Built in: `lexicon` (rules over words, no model), `nano` (a small model shipped with the package), `committee` (several together),
`verbatim` (the request as it is), `scripted` (replies from a file), `vlm` (any transformers image-text-to-text model). More come from
the entry-point group `seerseg.reasoners` of installed packages (NAME = "module:factory", see `base.ReasonerFactory`).
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerseg.errors import MissingExtraError, ModelError, SeerSegError, UsageError, did_you_mean

if TYPE_CHECKING:
    from seerseg.reasoners.base import Reasoner

__all__ = ["available_reasoners", "load_reasoner"]

GROUP = "seerseg.reasoners"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BUILT_IN = {
    "committee": ("seerseg.reasoners.committee:load", "several of these together, each with a say (committee:nano,lexicon)"),
    "lexicon": ("seerseg.reasoners.lexicon:load", "spelling repair, abbreviations, synonyms and sides by rule; no model, sees no image"),
    "nano": ("seerseg.reasoners.nano:load", "a small vision-language model shipped with SeerSeg; a default to start from"),
    "scripted": ("seerseg.reasoners.scripted:load", "replies from a JSON file (scripted:FILE.json); for tests"),
    "verbatim": ("seerseg.reasoners.verbatim:load", "the request's own words as the answer; a control"),
    "vlm": ("seerseg.reasoners.vlm:load", "any transformers image-text-to-text model (vlm:FOLDER, a bare folder, or a hub id)"),
}


def available_reasoners() -> dict[str, str]:
    """Name -> one line about it, sorted; plug-ins are listed by their package, unimported. A built-in name cannot be taken."""
    found = {name: line for name, (_, line) in _BUILT_IN.items()}
    for name, point in _plug_ins().items():
        found.setdefault(name, f"from the package {point.dist.name if point.dist is not None else point.value}")
    return dict(sorted(found.items()))


def load_reasoner(
    name_or_folder: str | Path, *, device: str = "cpu", dtype: str | None = None, offline: bool = True, **settings: Any
) -> Reasoner:
    """The reasoner called NAME or NAME:SOURCE, or the `vlm` of a folder or of a hub id ("org/name").

    A name wins over a folder of that name: write ./NAME for the folder. `settings` go to the factory.
    Raises UsageError for an unknown name, ModelError for a folder, a file or a plug-in that cannot be used.
    """
    given = str(name_or_folder).strip()
    name, colon, source = given.partition(":")
    known = {k.casefold(): k for k in available_reasoners()}
    if name.casefold() in known:
        if colon and not source.strip():
            raise UsageError(f"Nothing follows the colon of the reasoner {given!r}: give a folder, file or hub id, or leave it out.")
        return _build(known[name.casefold()], source.strip() or None, device=device, dtype=dtype, offline=offline, **settings)
    if given and (Path(given).expanduser().exists() or _HUB_ID.fullmatch(given)):
        return _build("vlm", given, device=device, dtype=dtype, offline=offline, **settings)
    names = ", ".join(sorted(known.values()))
    raise UsageError(
        f"There is no reasoner or folder called {given!r}.{did_you_mean(name, known.values())} The reasoners here are: {names}."
    )


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _build(name: str, source: str | None, *, device: str, dtype: str | None, offline: bool, **settings: Any) -> Reasoner:
    from seerseg.reasoners.base import Reasoner as Seam

    value = _BUILT_IN[name][0] if name in _BUILT_IN else _plug_ins()[name].value
    broken = f"The reasoner {name} ({value}) cannot be loaded"
    try:
        made = EntryPoint(name=name, value=value, group=GROUP).load()(
            source=source, device=device, dtype=dtype, offline=offline, **settings
        )
    except SeerSegError:
        raise
    except ImportError as fault:
        missing = fault.name if isinstance(fault, ModuleNotFoundError) and fault.name else "what it needs"
        raise MissingExtraError(f"{broken}: {str(fault).rstrip('.')}. Install {missing.partition('.')[0]}, then try again.") from fault
    except Exception as fault:
        if name in _BUILT_IN:
            raise
        # a plug-in may raise anything: a sentence for the user, the chain for its author
        raise ModelError(f"{broken}: {type(fault).__name__}: {str(fault).rstrip('.')}.") from fault
    if not isinstance(made, Seam):
        raise ModelError(f"The plug-in {value} of the reasoner {name} made a {type(made).__name__}, which lacks methods of a reasoner.")
    return made
