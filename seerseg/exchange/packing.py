"""A model folder as one zip: same model, same bytes."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seerseg.errors import ModelError, UsageError
from seerseg.exchange.bases import Base, base_files, find_bases, may_be_passed_on
from seerseg.exchange.record import EXPORT, BaseRecord, ExportRecord, FileRecord, Inspection, blocks, read_record, refused, sha256
from seerseg.model import BANK, BASE, MANIFEST, ModelSpec, read_spec, spec_json
from seerseg.paths import read_json, safe_name, write_atomically
from seerseg.reasoners import parts_of

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "monai", "numpy", "scipy", "scikit-image", "nibabel", "SimpleITK")
_BESIDE = ("plans.json", "MODEL_CARD.md", "README.md", "LICENSE", "LICENCE", "NOTICE")
_DATE = (1980, 1, 1, 0, 0, 0)
_FOLD, _DATASET = re.compile(r"fold_(\d{1,3})"), re.compile(r"Dataset\d{3,}_.+")


@dataclass(frozen=True)
class Exported:
    """A written export. left_out: sentences about files of the parts that were packed which may not be in an export; already: the same
    bytes had been there before."""

    path: Path
    size: int
    record: ExportRecord
    left_out: tuple[str, ...] = ()
    already: bool = False


def export_name(folder: Path) -> str:
    """The usual file name of the export of a model folder."""
    dataset, run, fold = _belongs(folder)
    return f"{dataset}__{run}__fold_{fold}.zip" if dataset else f"{safe_name(folder.resolve().name)}.zip"


def export_model(
    folder: Path,
    target: Path,
    *,
    include_base: bool = False,
    may_pass_on: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Exported:
    """Pack the model in `folder` into the zip `target`: manifest, plans, weights or adapters, bank; with include_base the models that it
    stands on, where their licence lets anybody pass them on or the caller says that he may.

    progress: called with the number of bytes that were packed since. ModelError for what is no whole model or may not be packed;
    UsageError when another file of that name is there and overwrite is not said; OutputError when it cannot be written.
    """
    folder = folder.expanduser().resolve()
    spec, named = read_spec(folder), _named(folder)
    left_out: list[str] = []
    members: dict[str, Path | bytes] = {MANIFEST: _text(spec_json(folder, spec))}
    for name in _BESIDE:
        if (folder / name).is_file():
            members[name] = folder / name
    bases = find_bases(folder, spec, named)
    members |= _own_parts(folder, spec, bases, left_out)
    members |= _bank(folder)
    asked = [b for b in bases if include_base and b.needed and b.state in ("here", "missing", "package")]
    for base in asked:
        members |= _included(base, may_pass_on)
    dataset, run, fold = _belongs(folder)
    known = tuple(_base_record(folder, base, base in asked) for base in bases)
    record = ExportRecord((), known, _versions(), dataset, run, fold)
    packed: list[ExportRecord] = []
    if target.is_dir():
        raise UsageError(f"-o must name the zip to be written, not a folder: {target}.")
    fresh = target.with_name(f"{target.name}.new") if target.exists() and not overwrite else target
    write_atomically(fresh, lambda temporary: packed.append(_pack(temporary, members, record, f"The model in {folder}", progress)))
    already = fresh != target
    if already:
        same = fresh.stat().st_size == target.stat().st_size and sha256(fresh) == sha256(target)
        fresh.unlink()
        if not same:
            raise UsageError(f"{target} is there already and holds something else. Choose another name with -o, or add --overwrite.")
    return Exported(target, target.stat().st_size, packed[0], tuple(left_out), already)


def _pack(
    target: Path, members: Mapping[str, Path | bytes], record: ExportRecord, where: str, progress: Callable[[int], None]
) -> ExportRecord:
    files = []
    with zipfile.ZipFile(target, "w", allowZip64=True) as packed:
        for name, content in sorted(members.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            inspection = Inspection(name, size, where)
            with packed.open(_entry(name, size), "w") as stream:
                for block in [content] if isinstance(content, bytes) else blocks(content):
                    inspection.feed(block)
                    stream.write(block)
                    progress(len(block))
            files.append(inspection.close())
        whole = replace(record, files=tuple(files))
        text = _text(whole.to_json())
        with packed.open(_entry(EXPORT, len(text)), "w") as stream:
            stream.write(text)
    return whole


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.create_system, info.external_attr, info.file_size = 3, 0o100644 << 16, size
    # weights do not get smaller by packing, and stored ones are read at the speed of the disk
    info.compress_type = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
    return info


def _own_parts(folder: Path, spec: ModelSpec, bases: Sequence[Base], left_out: list[str]) -> dict[str, Path | bytes]:
    """Files of the reasoner and the segmenter that lie in the model folder, and of earlier stages that they stand on; what was put into
    the places for bases is no part of the model."""
    places = [
        Path(part.partition(":")[2].partition("?")[0] if ":" in part else part) for part in (*parts_of(spec.reasoner), spec.segmenter)
    ]
    places += [base.files for base in bases if base.state == "own" and base.files is not None]
    apart = [folder / BASE, *(folder / base.place for base in bases if base.place)]
    members: dict[str, Path | bytes] = {}
    for place in places:
        if not place.is_relative_to(folder) or place == folder:
            continue
        for path in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()):
            if any(path.is_relative_to(base) for base in apart):
                continue
            name = path.relative_to(folder).as_posix()
            reason = "a hidden file." if path.name.startswith(".") else refused(name)
            if reason:
                left_out.append(f"{name}: {reason}")
            else:
                members[name] = path
    return members


def _bank(folder: Path) -> dict[str, Path | bytes]:
    """The newest state of the model's bank; not what was handed in since, nor what made it faster or says what was asked."""
    from seerseg.skills.encoder import RETRIEVAL
    from seerseg.skills.store import BankFolder

    bank = BankFolder(folder / BANK)
    head = bank.head()
    if head is None:
        return {}
    number = f"{BANK}/heads/{head.number:08d}.json"
    alone = {**head.to_json(), "parent": None, "consumed": []}
    members: dict[str, Path | bytes] = {number: _text(alone), f"{BANK}/versions/{head.version}.jsonl": bank.version_path(head.version)}
    if (bank.folder / "bank.json").is_file():
        members[f"{BANK}/bank.json"] = bank.folder / "bank.json"
    for path in sorted((bank.folder / RETRIEVAL).glob("*")):  # without it skills would be found otherwise than they were accepted
        members[f"{BANK}/{RETRIEVAL}/{path.name}"] = path
    return members


def _included(base: Base, may_pass_on: bool) -> dict[str, Path | bytes]:
    what = f"The {base.role} {base.name!r}"
    if base.state == "package":
        raise ModelError(
            f"{what} brings its own weights with its package, so --include_base cannot pack it. Export without it; seerseg_doctor --model "
            "says on the other machine what is missing."
        )
    if base.files is None:
        raise ModelError(f"{what} is not on this machine, so --include_base cannot pack it. {base.fault}".rstrip())
    licence = base.licence
    if not may_be_passed_on(licence) and not may_pass_on:
        said = f"is under {licence!r}, which does not let everybody pass it on" if licence else "does not say under which licence it is"
        raise ModelError(
            f"{what} in {base.files} {said}. Export without --include_base and copy it yourself where its licence allows, "
            "or add --may_pass_on if you have the right to."
        )
    files = base_files(base)
    for name in files:
        reason = refused(name)
        if reason:
            raise ModelError(
                f"{what} in {base.files} cannot be packed: {name}: {reason} Export without --include_base and copy that folder yourself; "
                "original SAM 2 checkpoints become safetensors with seerseg_convert_weights."
            )
    prefix = base.place if base.files.is_dir() else base.place.rpartition("/")[0]
    return {f"{prefix}/{name}": path for name, path in files.items()}


def _base_record(folder: Path, base: Base, included: bool) -> BaseRecord:
    """Names and hashes; those of an installed model's export are kept where the base is not on this machine."""
    files = tuple(FileRecord(name, path.stat().st_size, sha256(path)) for name, path in base_files(base).items()) if base.needed else ()
    earlier = read_record(folder)
    if not files and earlier is not None:
        known = next((b for b in earlier.bases if b.role == base.role), None)
        files = known.files if known is not None else ()
    state = "copied" if base.state in ("here", "missing") else base.state
    return BaseRecord(base.role, base.name, state, base.place, base.licence, base.identity, included, files)


def _named(folder: Path) -> tuple[str, str]:
    value = read_json(folder / MANIFEST, ModelError)
    return str(value["reasoner"]), str(value["segmenter"])


def _belongs(folder: Path) -> tuple[str | None, str | None, int | None]:
    """Dataset, run and fold by the folders' names, else as the export says that the model came from."""
    fold, run, dataset = (p.name for p in (folder.resolve(), folder.resolve().parent, folder.resolve().parent.parent))
    found = _FOLD.fullmatch(fold)
    if found and len(run.split("__")) == 4 and _DATASET.fullmatch(dataset):
        return dataset, run, int(found[1])
    earlier = read_record(folder)
    return (earlier.dataset, earlier.run, earlier.fold) if earlier is not None else (None, None, None)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    from seerseg import __version__

    def each() -> Iterator[tuple[str, str]]:
        yield "seerseg", __version__
        yield "python", python_version()
        for name in PACKAGES:
            try:
                yield name, version(name)
            except PackageNotFoundError:
                continue

    return dict(each())


def _text(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
