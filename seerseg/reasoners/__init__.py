"""Reasoners by name, folder or hub id. Importing this package loads no torch, transformers, numpy or plug-in.

Built in: `lexicon` (rules over words, no model), `nano` (a small model shipped with the package), `cascade` (one after the other),
`committee` (several together), `verbatim` (the request as it is), `scripted` (replies from a file), `vlm` (any transformers
image-text-to-text model). More come from the entry-point group `seerseg.reasoners` of installed packages (NAME = "module:factory", see
`base.ReasonerFactory`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerseg.errors import MissingExtraError, ModelError, SeerSegError, UsageError, did_you_mean

if TYPE_CHECKING:
    from seerseg.reasoners.base import Reasoner

__all__ = ["available_reasoners", "has_rules", "joined", "load_members", "load_reasoner", "parts_of"]

GROUP = "seerseg.reasoners"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOGETHER = {"cascade": "lexicon,nano", "committee": ""}
"""Reasoners that are made of others -> their members when none are named."""
_BUILT_IN = {
    "cascade": ("seerseg.reasoners.cascade:load", "the rules, then nano for words that they do not know (cascade:lexicon,nano)"),
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
    if given and _is_model(given):
        return _build("vlm", given, device=device, dtype=dtype, offline=offline, **settings)
    names = ", ".join(sorted(known.values()))
    raise UsageError(
        f"There is no reasoner or folder called {given!r}.{did_you_mean(name, known.values())} The reasoners here are: {names}."
    )


def load_members(
    whole: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = True,
    lazily: bool = False,
    **settings: Any,
) -> list[Reasoner]:
    """The reasoners that "cascade:SOURCE" or "committee:SOURCE" is made of. settings: those of the lexicon among them; lazily: models are
    loaded when they are first asked. UsageError for a member that is made of others itself; else as `load_reasoner`."""
    names = parts_of(whole)
    if any(_kind(name) in _TOGETHER for name in names):
        raise UsageError(f"A cascade or a committee cannot be a member of {whole}: name its members.")
    parts: dict[str, Any] = {"device": device, "dtype": dtype, "offline": offline}
    later = _later if lazily else load_reasoner
    return [load_reasoner(name, **parts, **settings) if _kind(name) == "lexicon" else later(name, **parts) for name in names]


def _later(name: str, **parts: Any) -> Reasoner:
    """As `load_reasoner`; where it is a model, that is loaded when it is first asked."""
    known = {k.casefold() for k in available_reasoners()}
    kind, _, source = name.partition(":")
    if kind.casefold() == "nano":
        from seerseg.reasoners.nano import load_later

        return load_later(source=source.strip() or None, **parts)
    if (kind.casefold() == "vlm" and source.strip()) or (kind.casefold() not in known and _is_model(name)):
        from seerseg.reasoners.vlm import load_later as load_vlm_later

        return load_vlm_later(source=source.strip() if kind.casefold() == "vlm" else name, **parts)
    return load_reasoner(name, **parts)


def _is_model(name: str) -> bool:
    """Whether what is no reasoner's name is a folder or a hub id."""
    return Path(name).expanduser().exists() or bool(_HUB_ID.fullmatch(name))


def parts_of(name: str) -> list[str]:
    """Names of the members of a cascade or a committee, in order; of any other reasoner its own."""
    kind, colon, source = name.strip().partition(":")
    if kind.casefold() not in _TOGETHER:
        return [name]
    return [one for part in (source if colon else _TOGETHER[kind.casefold()]).split(",") if (one := part.strip())]


def joined(name: str, parts: Sequence[str]) -> str:
    """The name of the same cascade or committee of other parts; the name as it was where they are the same."""
    return name if parts_of(name) == list(parts) else f"{name.strip().partition(':')[0]}:{','.join(parts)}"


def has_rules(name: str) -> bool:
    """Whether the lexicon is what a reasoner's name loads, or one of its members: it has to be told what a dataset's labels mean."""
    return any(_kind(one) == "lexicon" for one in parts_of(name))


def _kind(name: str) -> str:
    """The built-in reasoner that a name means, "" for none of them."""
    kind = name.strip().partition(":")[0].casefold()
    return kind if kind in _BUILT_IN else ""


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
