"""What a model folder needs to predict on this machine: what is there, what is missing, what to copy where. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seerseg.errors import ModelError, SeerSegError
from seerseg.exchange.bases import Base, base_files, find_bases, reasoner_bases
from seerseg.exchange.record import BaseRecord, ExportRecord, inspect, read_record, sha256
from seerseg.model import BANK, MANIFEST, ModelSpec, read_spec
from seerseg.paths import read_json
from seerseg.reasoners import parts_of
from seerseg.reasoners.vlm_loading import BASE_FILE, weights_identity

_MATTERING = ("seerseg", "torch", "transformers", "peft", "monai")


@dataclass(frozen=True)
class Part:
    """One thing that is needed. remedy: what to do, "" where nothing is."""

    name: str
    state: Literal["ok", "note", "problem"]
    value: str
    remedy: str = ""


def look(folder: Path) -> list[Part]:
    """Everything that the model in `folder` needs, in the order in which it is used. ModelError when it is no model folder.

    Files are hashed where an export says what they should be; weights are looked through but not loaded, apart from the segmenter's.
    """
    folder = folder.expanduser().resolve()
    spec, record = read_spec(folder), read_record(folder)
    value = read_json(folder / MANIFEST, ModelError)
    named = str(value["reasoner"]), str(value["segmenter"])
    segmenter = next((base for base in find_bases(folder, spec, named) if base.role == "segmenter"), None)
    return [
        _files(folder, record),
        *_versions(record),
        _protocol(spec),
        *_reasoners(folder, spec, named[0], record),
        *_segmenter(folder, spec, segmenter, _known(record, "segmenter")),
        *_bank(folder, spec),
    ]


def _known(record: ExportRecord | None, role: str, name: str | None = None) -> BaseRecord | None:
    """What the export knew of the base in a role; name: of which, where there are several."""
    found = [base for base in record.bases if base.role == role] if record is not None else []
    return next((base for base in found if base.name == name), found[0] if found else None)


def _files(folder: Path, record: ExportRecord | None) -> Part:
    if record is None:
        return Part("files", "ok", f"{folder} (not from an export, so there are no hashes to compare)")
    for file in record.files:
        path = folder / file.name
        state = "is missing" if not path.is_file() else "is not as it was exported" if sha256(path) != file.sha256 else ""
        if state:
            return Part(
                "files", "problem", f"{file.name} {state}", f"Move {folder} away and install the export again with seerseg_install."
            )
    return Part("files", "ok", f"{folder}: {len(record.files)} files as they were exported")


def _versions(record: ExportRecord | None) -> Iterator[Part]:
    from importlib.metadata import PackageNotFoundError, version

    from seerseg import __version__

    for name in _MATTERING if record is not None else ():
        before = record.versions.get(name) if record is not None else None
        try:
            here = __version__ if name == "seerseg" else version(name)
        except PackageNotFoundError:
            here = "none"
        if before is not None and before.split("+")[0] != here.split("+")[0]:
            remedy = "Masks may differ in single voxels; install the same version where they must not."
            yield Part(f"version of {name}", "note", f"{here} here, {before} where it was exported", remedy)


def _protocol(spec: ModelSpec) -> Part:
    from seerseg.protocols import load_protocol

    try:
        return Part("protocol", "ok", load_protocol(spec.protocol).name)
    except SeerSegError as fault:
        return Part("protocol", "problem", str(fault), "Install the package that this protocol comes with.")


def _reasoners(folder: Path, spec: ModelSpec, named: str, record: ExportRecord | None) -> Iterator[Part]:
    """The reasoner, or every member of a cascade or committee."""
    for part, said in zip(parts_of(spec.reasoner), parts_of(named), strict=True):
        base = next(reasoner_bases(folder, part, said), None)
        yield from _reasoner(folder, part, base, _known(record, "reasoner", base.name if base is not None else None))


def _reasoner(folder: Path, part: str, base: Base | None, known: BaseRecord | None) -> Iterator[Part]:
    own = Path(part.partition(":")[2] if ":" in part else part)
    if own.is_relative_to(folder) and own.is_dir():
        try:
            sizes = [inspect(p.name, p, str(own)).size for p in sorted(own.glob("*.safetensors"))]
        except (ModelError, OSError) as fault:
            yield Part("reasoner's weights", "problem", str(fault), "Copy or install the model again.")
            return
        kind = "adapter" if (own / "adapter_config.json").is_file() else "weights"
        if not sizes:
            yield Part("reasoner's weights", "problem", f"{own} holds no *.safetensors", "Copy or install the model again.")
            return
        yield Part("reasoner's weights", "ok", f"{kind} in {own.relative_to(folder)}, {_size(sum(sizes))}")
        if kind == "adapter" and base is not None:
            yield _base(folder, base, known, own)
        return
    if base is not None:
        yield _base(folder, base, known, None)


def _base(folder: Path, base: Base, known: BaseRecord | None, adapter: Path | None) -> Part:
    what = f"{base.role}'s base" if adapter is not None else base.role
    if base.state == "missing":
        return Part(what, "problem", f"{base.name} is not on this machine", _copy(folder, base, known))
    if base.state in ("shipped", "rules", "package"):
        files: Path | None = base.files
        if base.state == "shipped" and adapter is not None:
            from seerseg.reasoners.vlm_loading import SHIPPED

            files = SHIPPED[base.name]
        value = {"shipped": "comes with SeerSeg", "rules": "has no weights", "package": "comes with an installed package"}[base.state]
    else:
        files, value = base.files, f"in {base.files}"
    if adapter is not None and files is not None and (adapter / BASE_FILE).is_file():
        if weights_identity(files) != base.identity:
            return Part(what, "problem", f"{base.name}: {files} holds other weights than those trained on", _copy(folder, base, known))
    if base.files is not None and known is not None and base.state != "shipped":
        here = base_files(base)
        for file in known.files:
            path = here.get(file.name)
            if path is None or path.stat().st_size != file.size or sha256(path) != file.sha256:
                state = "is missing" if path is None else "is not the file that the export knew"
                return Part(what, "problem", f"{base.name}: {file.name} in {base.files} {state}", _copy(folder, base, known))
    return Part(what, "ok", f"{base.name} {value}" if base.name != str(files) else value)


def _segmenter(folder: Path, spec: ModelSpec, base: Base | None, known: BaseRecord | None) -> Iterator[Part]:
    """The segmenter is opened, as its identity is part of what the model is."""
    from seerseg.segmenters import load_segmenter

    if base is not None:
        part = _base(folder, base, known, None)
        if part.state == "problem":
            yield part
            return
    try:
        identity = load_segmenter(spec.segmenter, offline=True).card.identity
    except SeerSegError as fault:
        yield Part("segmenter", "problem", str(fault), _copy(folder, base, known) if base is not None and base.place else "")
        return
    if spec.segmenter_identity is not None and identity != spec.segmenter_identity:
        value = f"{spec.segmenter} is here as {identity}, and the model was trained with {spec.segmenter_identity}"
        advice = "Install the version of SeerSeg that the model was trained with."
        remedy = _copy(folder, base, known) if base is not None and base.place else advice
        yield Part("segmenter", "problem", value, remedy)
        return
    yield Part("segmenter", "ok", f"{spec.segmenter}, {identity}")


def _bank(folder: Path, spec: ModelSpec) -> Iterator[Part]:
    from seerseg.skills.store import BankFolder

    bank = BankFolder(folder / BANK)
    try:
        head, skills = bank.head(), len(bank.skills())
    except SeerSegError as fault:
        yield Part("bank", "problem", str(fault), "Install the model again.")
        return
    if head is not None and spec.bank == "none":
        yield Part("bank", "note", f"{skills} skills, not used unless asked for", f"Use it with --bank {folder / BANK}.")
    elif head is not None:
        yield Part("bank", "ok", f"{skills} skills, {head.version}")
    elif spec.bank != "none":
        yield Part("bank", "problem", f"{folder / BANK} holds none", "Copy or install the model again, or predict with --bank none.")


def _copy(folder: Path, base: Base, known: BaseRecord | None) -> str:
    """What to copy where, with what is known of the files."""
    files = known.files if known is not None else ()
    named = f" ({len(files)} files, {_size(sum(f.size for f in files))}; their SHA-256 are in {folder}/export.json)" if files else ""
    single = len(files) == 1 and base.place.endswith(files[0].name)
    return f"Copy the {'file' if single else 'folder'} of {base.name}{named} from a machine that has it to {folder}/{base.place}."


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"
