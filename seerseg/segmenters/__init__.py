"""Segmenters by name or folder. Importing this package loads no torch, numpy or plug-in; a segmenter's code is loaded when it is asked for.

Built in: `grow` (classical, no weights), `nano` (text, shipped weights), `voxtell` (free text), `nnunet` and `totalsegmentator` (classes of
a trained model), `medsam2` and `sam` (boxes, points, masks), `scripted` (answers from a file). More come from the entry-point group
`seerseg.segmenters` of installed packages (NAME = "module:factory", see `base.SegmenterFactory`).
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from seerseg.errors import MissingExtraError, ModelError, SeerSegError, UsageError, did_you_mean

if TYPE_CHECKING:
    from seerseg.segmenters.base import Segmenter

__all__ = ["available_segmenters", "load_segmenter"]

GROUP = "seerseg.segmenters"
KIND_SUFFIX = "_segmenter"
"""A folder's config.json, or a JSON file, with "kind": NAME + this is opened by the segmenter NAME."""

_BUILT_IN = {
    "grow": ("seerseg.segmenters.grow:load", "boxes, points or a mask grown to 3D by classical methods; no weights"),
    "medsam2": ("seerseg.segmenters.medsam2:load", "boxes, points or a mask followed through the slices; weights by folder or file"),
    "nano": ("seerseg.segmenters.nano:load", "small text-promptable 3D network; shipped weights"),
    "sam": ("seerseg.segmenters.sam:load", "boxes, points or a mask on a single slice; SAM's or MedSAM's weights, by folder or hub id"),
    "nnunet": ("seerseg.segmenters.nnunet:load", "a trained nnU-Net v2 folder (nnunet:FOLDER); its classes by name"),
    "scripted": ("seerseg.segmenters.scripted:load", "answers from label maps named in a JSON file (scripted:FILE.json); for tests"),
    "voxtell": ("seerseg.segmenters.voxtell:load", "free text in 3D; VoxTell's weights by folder or hub id (voxtell:FOLDER)"),
    "totalsegmentator": ("seerseg.segmenters.totalsegmentator:load", "TotalSegmentator's structures by name (totalsegmentator:TASK)"),
}


def available_segmenters() -> dict[str, str]:
    """Name -> one line about it, sorted; plug-ins are listed by their package, unimported. A built-in name cannot be taken."""
    found = {name: line for name, (_, line) in _BUILT_IN.items()}
    for name, point in _plug_ins().items():
        package = point.dist.name if point.dist is not None else point.value
        found.setdefault(name, f"from the package {package}")
    return dict(sorted(found.items()))


def load_segmenter(
    name_or_folder: str | Path, *, device: str = "cpu", dtype: str | None = None, offline: bool = True, accept_license: bool = False
) -> Segmenter:
    """The segmenter called NAME, NAME:SOURCE (SOURCE: a folder, file or hub id), or lying in a folder or file.

    A name wins over a folder of that name: write ./NAME for the folder. A bare folder is known by the "kind" of its config.json.
    accept_license: the licence of its weights was read and allows this use; asked for only where it is not open to all.
    Raises UsageError for an unknown name, ModelError for a folder or plug-in that cannot be used, or a licence that was not accepted.
    """
    given = str(name_or_folder).strip()
    name, colon, source = given.partition(":")
    known = {k.casefold(): k for k in available_segmenters()}
    if name.casefold() in known:
        if colon and not source:
            raise UsageError(f"Nothing follows the colon of the segmenter {given!r}: give a folder, file or hub id, or leave it out.")
        return _build(known[name.casefold()], source or None, device=device, dtype=dtype, offline=offline, accept_license=accept_license)
    path = Path(given).expanduser() if given else None
    if path is not None and path.exists():
        return _build(_recognise(path), str(path), device=device, dtype=dtype, offline=offline, accept_license=accept_license)
    names = ", ".join(sorted(known.values()))
    hint = did_you_mean(name, known.values())
    raise UsageError(f"There is no segmenter, file or folder called {given!r}.{hint} The segmenters here are: {names}.")


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _recognise(path: Path) -> str:
    """The name of the segmenter that opens this folder or JSON file; ModelError says what was found there."""
    config = path / "config.json" if path.is_dir() else path
    names = available_segmenters()
    advice = f"Write NAME:{path} to say which segmenter opens it; the names are: {', '.join(names)}."
    if _is_trained(path):
        return "nnunet" if (path / "dataset.json").is_file() else "voxtell"
    if not config.is_file():
        listed = ", ".join(sorted(child.name for child in path.iterdir())[:6]) or "nothing"
        raise ModelError(f"The folder {path} has no config.json (it holds: {listed}), so it is not known which segmenter it is. {advice}")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ModelError(f"{config} cannot be read as JSON ({fault}), so it is not known which segmenter it is. {advice}") from fault
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f'{config} does not say a "kind", so it is not known which segmenter it is. {advice}')
    name = kind.removesuffix(KIND_SUFFIX)
    if name not in names:
        raise ModelError(f"{config} is of the kind {kind!r}, and no segmenter for it is installed.{did_you_mean(name, names)} {advice}")
    return name


def _is_trained(path: Path) -> bool:
    """A folder as nnU-Net trains it: plans.json and a fold with a checkpoint. nnU-Net's own has dataset.json too, VoxTell's has not."""
    return (path / "plans.json").is_file() and any(path.glob("fold_*/checkpoint_*.pth"))


def _build(name: str, source: str | None, *, device: str, dtype: str | None, offline: bool, accept_license: bool) -> Segmenter:
    from seerseg.segmenters.base import Segmenter as Seam

    value = _BUILT_IN[name][0] if name in _BUILT_IN else _plug_ins()[name].value
    try:
        point = EntryPoint(name=name, value=value, group=GROUP)
        factory = point.load()
        extra = {"accept_license": True} if accept_license and "accept_license" in inspect.signature(factory).parameters else {}
        made = factory(source=source, device=device, dtype=dtype, offline=offline, **extra)
    except SeerSegError:
        raise
    except ImportError as fault:
        raise MissingExtraError(_broken(name, value, fault) + _install_hint(fault)) from fault
    except Exception as fault:
        if name in _BUILT_IN:
            raise
        raise ModelError(
            _broken(name, value, fault)
        ) from fault  # a plug-in may raise anything: a sentence for the user, the chain for its author
    if not isinstance(made, Seam):
        raise ModelError(f"The plug-in {value} of the segmenter {name} made a {type(made).__name__}, which lacks methods of a segmenter.")
    return made


def _broken(name: str, value: str, fault: Exception) -> str:
    return f"The segmenter {name} ({value}) cannot be loaded: {type(fault).__name__}: {str(fault).rstrip('.')}."


def _install_hint(fault: ImportError) -> str:
    if isinstance(fault, ModuleNotFoundError) and fault.name and importlib.util.find_spec(fault.name.partition(".")[0]) is None:
        return f" Install the package that holds {fault.name.partition('.')[0]}, then try again."
    return ""
