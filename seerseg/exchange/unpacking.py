"""An export put into place: looked through wholly before anything is written, whole or not there afterwards, never over something else."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from seerseg.errors import ModelError, OutputError, UsageError
from seerseg.exchange.record import BLOCK, EXPORT, ExportRecord, FileRecord, Inspection, check_names, sha256
from seerseg.model import MANIFEST, read_spec

MOST_BYTES = 200 << 30
MOST_FILES = 10_000
MOST_RATIO = 200
"""How many times smaller a file may have been packed. Text of models is 3 to 30 times smaller; zip bombs are a thousand times and more."""
_END_BYTES = 22
"""A zip without a comment ends with a record of this length: nothing is cut off and nothing was appended."""
_FREE_RATIO_BYTES = 1 << 20
_MOST_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class Installed:
    """An installed model. already: it had been there before, file by file the same."""

    folder: Path
    record: ExportRecord
    already: bool = False


def install_model(
    archive: Path,
    *,
    results: Path | None = None,
    target: Path | None = None,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[int], None] = lambda count: None,
) -> Installed:
    """Install an export at `target`, else where it belongs below the folder `results`.

    progress: called with the number of bytes checked or written since (twice the size of the model in all). ModelError for anything but
    a whole export made by `export_model`; UsageError where to put it is not said, or something else is there; OutputError when it
    cannot be written. Nothing is written before all is checked, and nothing stays of an install that fails.
    """
    if not archive.is_file():
        raise UsageError(f"There is no file {archive}. Give the zip that seerseg_export wrote.")
    with _readable(archive) as packed:
        entries = _check_entries(packed, archive, most_bytes)
        record = _record(packed, entries, archive)
        _check_complete(record, entries, archive)
        place = (target or _place(record, results, archive)).expanduser()
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            return _compared(place, record, archive)
        for file in record.files:
            _stream(packed, file, archive, lambda block: None, progress)
        _check_space(place, record)
        try:
            _write(packed, record, place, archive, progress)
        except OutputError:
            if place.is_dir() and any(place.iterdir()):  # somebody else installed meanwhile
                return _compared(place, record, archive)
            raise
    return Installed(place, record)


@contextmanager
def _readable(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The zip; whatever damage the reader meets is one sentence."""
    cut = f"{archive} is damaged or was not copied wholly. Copy it again, and compare its size and SHA-256 with the original's."
    try:
        with archive.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise ModelError(f"{archive} does not begin as a zip does. Give the file that seerseg_export wrote.")
            file.seek(-min(_END_BYTES, archive.stat().st_size), os.SEEK_END)
            if file.read(4) != b"PK\x05\x06":
                raise zipfile.BadZipFile("its end is not that of an export")
        with zipfile.ZipFile(archive) as packed:
            yield packed
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, UnicodeDecodeError) as fault:
        raise ModelError(f"{cut} ({str(fault).rstrip('.')})") from None
    except OSError as fault:
        raise ModelError(f"Cannot read {fault.filename or archive}: {fault.strerror}. Copy {archive.name} again.") from None


def _check_entries(packed: zipfile.ZipFile, archive: Path, most_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Every entry by its name, after all that can be told without unpacking anything."""
    infos = packed.infolist()
    where, size = str(archive), archive.stat().st_size
    if len(infos) > MOST_FILES:
        raise ModelError(f"{where} holds {len(infos)} files, more than the {MOST_FILES} that a model can have.")
    for info in infos:
        mode = info.external_attr >> 16
        if info.filename != info.orig_filename:
            raise ModelError(f"{where} holds {info.orig_filename!r}, which is no plain path inside a model folder.")
        if stat.S_ISLNK(mode):
            raise ModelError(f"{where} holds the link {info.filename!r}. Links are not installed; export the model again.")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or info.is_dir():
            raise ModelError(f"{where} holds {info.filename!r}, which is no plain file. It was not made by seerseg_export.")
        if mode & 0o111:
            raise ModelError(f"{where} holds {info.filename!r}, which is marked as a program. A model has none.")
        if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelError(f"{where} holds {info.filename!r}, which is encrypted or packed in a way that exports are not.")
        if info.file_size > max(_FREE_RATIO_BYTES, MOST_RATIO * info.compress_size):
            raise ModelError(
                f"{where} holds {info.filename!r}, which unpacks {info.compress_size} bytes to {info.file_size}: a zip bomb, no model."
            )
    check_names((info.filename for info in infos), where)
    total = sum(info.file_size for info in infos)
    if total > most_bytes:
        raise ModelError(
            f"{where} unpacks to {total / 2**30:.1f} GiB, more than {most_bytes / 2**30:g}. If that is right, raise --max_size."
        )
    ordered = sorted(infos, key=lambda i: i.header_offset)
    ends = [*(i.header_offset for i in ordered[1:]), size]
    if any(i.header_offset < 0 or i.header_offset + i.compress_size > end for i, end in zip(ordered, ends, strict=True)):
        raise ModelError(f"{where} holds files that share bytes, as zip bombs do. It was not made by seerseg_export.")
    return {info.filename: info for info in infos}


def _record(packed: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], archive: Path) -> ExportRecord:
    where = f"{EXPORT} in {archive}"
    if EXPORT not in entries or entries[EXPORT].file_size > _MOST_RECORD_BYTES:
        raise ModelError(
            f"{archive} holds no {EXPORT}, so it is no model that seerseg_export wrote. It holds: {', '.join(sorted(entries)[:5])}."
        )
    try:
        value = json.loads(packed.read(EXPORT).decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        raise ModelError(f"{where} is not valid JSON ({fault}). Export the model again.") from None
    return ExportRecord.from_json(value, where)


def _check_complete(record: ExportRecord, entries: dict[str, zipfile.ZipInfo], archive: Path) -> None:
    said = {file.name: file.size for file in record.files}
    missing = sorted(said.keys() - entries.keys())
    if missing:
        raise ModelError(f"{archive} lacks {missing[0]}, which its {EXPORT} lists. Export the model again.")
    extra = sorted(entries.keys() - said.keys() - {EXPORT})
    if extra:
        raise ModelError(
            f"{archive} holds {extra[0]}, which its {EXPORT} does not list. Something was added to it; export the model again."
        )
    if MANIFEST not in said:
        raise ModelError(f"{archive} holds no {MANIFEST}, so it is no model.")
    for name, size in said.items():
        if entries[name].file_size != size:
            raise ModelError(f"{archive}: {name} has {entries[name].file_size} bytes instead of {size}. Copy or export it again.")


def _stream(
    packed: zipfile.ZipFile, file: FileRecord, archive: Path, take: Callable[[bytes], object], progress: Callable[[int], None]
) -> None:
    """One file's bytes, checked against its hash and its kind."""
    inspection = Inspection(file.name, file.size, str(archive))
    with packed.open(file.name) as stream:
        while block := stream.read(BLOCK):
            inspection.feed(block)
            take(block)
            progress(len(block))
    if inspection.close().sha256 != file.sha256:
        raise ModelError(f"{archive}: {file.name} has another SHA-256 than its {EXPORT} says. It was changed or damaged; copy it again.")


def _place(record: ExportRecord, results: Path | None, archive: Path) -> Path:
    if record.dataset is None or record.run is None or record.fold is None:
        raise UsageError(f"{archive} does not belong to a dataset's results. Say with -o which folder the model is to be.")
    if results is None:
        raise UsageError(
            "Say where the results live with --results_folder or the variable seerseg_results, or with -o which folder the model is to be."
        )
    return results / record.dataset / record.run / f"fold_{record.fold}"


def _compared(place: Path, record: ExportRecord, archive: Path) -> Installed:
    """What to say where something is already."""
    if not place.is_dir():
        raise UsageError(f"{place} is a file. Say with -o which folder the model is to be.")
    for file in record.files:
        path = place / file.name
        if not (path.is_file() and path.stat().st_size == file.size and sha256(path) == file.sha256):
            state = "differs" if path.exists() else "is not there"
            raise UsageError(
                f"{place} holds something else than {archive} ({file.name} {state}), and nothing is written over. Give another folder with "
                "-o, or move that one away."
            )
    return Installed(place, record, already=True)


def _check_space(place: Path, record: ExportRecord) -> None:
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if record.size > free:
        raise OutputError(f"The model needs {record.size / 2**20:.0f} MB and {there} has {free / 2**20:.0f} MB free. Make room, or use -o.")


def _write(packed: zipfile.ZipFile, record: ExportRecord, place: Path, archive: Path, progress: Callable[[int], None]) -> None:
    """Into a folder beside the place, which is renamed when all is on the disk."""
    fresh: Path | None = None
    made = [p for p in place.parents if not p.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".tmp-install-", dir=place.parent))
        for file in record.files:
            path = fresh / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as out:
                _stream(packed, file, archive, out.write, progress)
                out.flush()
                os.fsync(out.fileno())
        (fresh / EXPORT).write_bytes(packed.read(EXPORT))
        read_spec(fresh)  # a manifest that this version cannot read is no model here
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o777 & ~umask)
        fresh.rename(place)  # fails where somebody else has put something there meanwhile
    except BaseException as fault:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break  # it holds something, and so do those above it
        if isinstance(fault, OSError):
            raise OutputError(f"Cannot install to {place}: {fault.strerror or fault}. Choose another folder with -o.") from fault
        raise
