"""What an export says of itself (`export.json`), and which files may be in one.

    {"schema": 1, "kind": "seerseg_model", "dataset": ..., "run": ..., "fold": ..., "versions": {package: version},
     "bases": [{"role": "reasoner", "name": "Qwen/Qwen3-VL-4B-Instruct", "state": "copied", "place": "sft/model/base",
                "licence": "apache-2.0", "identity": "...", "included": false,
                "files": [{"name": ..., "size": ..., "sha256": ...}, ...]}, ...],
     "files": [{"name": "manifest.json", "size": 1234, "sha256": "..."}, ...]}

Only data is taken: JSON and text that read as such, safetensors whose head and length agree, tokenizer models. What can hold a
pickle or a program is refused by its name and by its first bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from seerseg.errors import ModelError
from seerseg.paths import read_json

EXPORT = "export.json"
EXPORT_SCHEMA = 1
KIND = "seerseg_model"
BLOCK = 1 << 20
MOST_TEXT_BYTES = 256 << 20
_MOST_HEAD_BYTES = 100 << 20
_TEXT = (".json", ".jsonl", ".txt", ".md", ".jinja")
_DATA = (".safetensors", ".model")
_PLAIN_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_PROGRAMS = {
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\xcf\xfa\xed\xfe": "a program",
    b"#!": "a script",
    b"PK\x03\x04": "a zip, as torch writes pickles",
    b"\x1f\x8b": "a packed file",
    **{bytes([0x80, n]): "a pickle" for n in range(2, 6)},
}
_MOST_PARTS, _MOST_CHARS = 12, 200


@dataclass(frozen=True)
class FileRecord:
    """A file: path within its folder ('/' between parts), size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class BaseRecord:
    """A model that is used as it is.

    state: as of `bases.Base`, "copied" for one whose files have to be on a machine besides; place: where in the model folder they may be
    put, "" where none are needed; files: those that were there when the export was made; identity: as it was trained against.
    """

    role: str
    name: str
    state: str
    place: str = ""
    licence: str = ""
    identity: str = ""
    included: bool = False
    files: tuple[FileRecord, ...] = ()


@dataclass(frozen=True)
class ExportRecord:
    """An export. dataset, run, fold: where below the results folder it belongs, None for a model folder that lay elsewhere."""

    files: tuple[FileRecord, ...]
    bases: tuple[BaseRecord, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    dataset: str | None = None
    run: str | None = None
    fold: int | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": EXPORT_SCHEMA,
            "kind": KIND,
            "dataset": self.dataset,
            "run": self.run,
            "fold": self.fold,
            "versions": dict(self.versions),
            "bases": [asdict(b) for b in self.bases],
            "files": [asdict(f) for f in self.files],
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> ExportRecord:
        """The inverse; ModelError for anything else. Names are checked, so that none leaves the folder."""
        found = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise ModelError(f"{where} does not say that it is a SeerSeg model. Make the export with seerseg_export.")
        if found != EXPORT_SCHEMA:
            raise ModelError(
                f"{where} has schema version {found!r}, this SeerSeg reads version {EXPORT_SCHEMA}. Export the model again with this "
                "version, or install the SeerSeg that it was exported with."
            )
        try:
            bases = tuple(
                BaseRecord(**{**b, "included": bool(b["included"]), "files": tuple(FileRecord(**f) for f in b["files"])})
                for b in value["bases"]
            )
            record = cls(
                files=tuple(FileRecord(str(f["name"]), int(f["size"]), str(f["sha256"])) for f in value["files"]),
                bases=bases,
                versions={str(k): str(v) for k, v in value["versions"].items()},
                dataset=value["dataset"],
                run=value["run"],
                fold=value["fold"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise ModelError(f"{where} is damaged: {type(fault).__name__} {fault}. Export the model again.") from None
        check_names((f.name for f in record.files), where)
        for base in bases:
            check_names([base.place] if base.place else [], where, folders=True)
            check_names((f.name for f in base.files), where, folders=True)
        for said in (record.dataset, record.run):
            if said is not None and (not isinstance(said, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", said)):
                raise ModelError(f"{where} belongs to {said!r}, which is no folder name. Give a folder with -o.")
        if record.fold is not None and not (isinstance(record.fold, int) and 0 <= record.fold < 1000):
            raise ModelError(f"{where} is of fold {record.fold!r}, which is no fold.")
        return record


def read_record(folder: Path) -> ExportRecord | None:
    """What the export said that a model folder was installed from; None for a folder that was trained here."""
    path = folder / EXPORT
    return ExportRecord.from_json(read_json(path, ModelError), str(path)) if path.is_file() else None


def check_names(names: Iterable[str], where: str, *, folders: bool = False) -> None:
    """ModelError unless every name is a plain relative path of a file that may be in an export, and no two are the same on any system."""
    seen: set[str] = set()
    for name in names:
        parts = PurePosixPath(name).parts
        odd = (
            not name
            or name != "/".join(parts)
            or len(parts) > _MOST_PARTS
            or any(part in (".", "..") or part[0] == "." or part[-1] in ". " or len(part) > _MOST_CHARS for part in parts)
            or any(c in '\\:*?"<>|' or not c.isprintable() for c in name)
        )
        if odd:
            raise ModelError(f"{where} holds {name!r}, which is no plain path inside a model folder. It was not made by seerseg_export.")
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise ModelError(f"{where} holds {name!r} twice. It was not made by seerseg_export.")
        seen.add(folded)
        reason = None if folders else refused(name)
        if reason:
            raise ModelError(f"{where} holds {name!r}: {reason} A model is made of JSON, text and safetensors.")
    for name in seen:
        above = [str(p) for p in PurePosixPath(name).parents]
        if not folders and seen.intersection(above):
            raise ModelError(f"{where} holds {name!r} below what is a file. It was not made by seerseg_export.")


def refused(name: str) -> str | None:
    """Why a file of this name may not be in an export, None when it may."""
    path = PurePosixPath(name)
    if path.suffix in (*_TEXT, *_DATA) or path.name in _PLAIN_NAMES:
        return None
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npz", ".npy", ".joblib"):
        return f"{path.suffix} files can hold pickles, which run code when they are read."
    if path.suffix in (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe", ".bat", ".cmd", ".ps1", ".jar"):
        return f"{path.suffix} files hold code."
    return f"{path.suffix or 'files without an ending'} may not be in an export."


class Inspection:
    """Hash and check of one file while its bytes go by: `feed` every block, then `close`."""

    def __init__(self, name: str, size: int, where: str) -> None:
        self.name, self.size, self._where = name, size, where
        self._digest = hashlib.sha256()
        self._kept = bytearray()
        self._seen = 0
        suffix = PurePosixPath(name).suffix
        self._kind = suffix if suffix in (*_TEXT, *_DATA) else ".txt"
        self._wanted = 8 if self._kind == ".safetensors" else 64 if self._kind == ".model" else MOST_TEXT_BYTES
        if self._kind in _TEXT and size > MOST_TEXT_BYTES:
            raise self._fault(f"is {size / 2**20:.0f} MB of text, more than the {MOST_TEXT_BYTES >> 20} MB that are read")

    def feed(self, block: bytes) -> None:
        """The next bytes; ModelError as soon as they cannot be right."""
        self._digest.update(block)
        self._seen += len(block)
        if self._seen > self.size:
            raise self._fault(f"is longer than the {self.size} bytes that it should have")
        while block and len(self._kept) < self._wanted:
            taken = block[: self._wanted - len(self._kept)]
            self._kept += taken
            block = block[len(taken) :]
            if self._kind == ".safetensors" and self._wanted == 8 and len(self._kept) == 8:
                (length,) = struct.unpack("<Q", bytes(self._kept))
                if length > min(_MOST_HEAD_BYTES, self.size - 8):
                    raise self._fault("is no safetensors file, or a cut one")
                self._wanted = 8 + length

    def close(self) -> FileRecord:
        """What was seen; ModelError when it is not what its name says."""
        if self._seen != self.size:
            raise self._fault(f"has {self._seen} of {self.size} bytes")
        start = bytes(self._kept[:4])
        if self._kind != ".safetensors":
            for mark, what in _PROGRAMS.items():
                if start.startswith(mark):
                    raise self._fault(f"is {what}")
        if self._kind == ".safetensors":
            self._check_safetensors()
        elif self._kind in _TEXT:
            self._check_text()
        return FileRecord(self.name, self.size, self._digest.hexdigest())

    def _check_safetensors(self) -> None:
        try:
            head = json.loads(bytes(self._kept[8:]).decode("utf-8"))
            ends = [int(said["data_offsets"][1]) for name, said in head.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise self._fault("is no safetensors file") from None
        if len(self._kept) < self._wanted or self._wanted + max(ends, default=0) != self.size:
            raise self._fault("is a safetensors file whose length is not what its head says")

    def _check_text(self) -> None:
        try:
            text = self._kept.decode("utf-8")
            if self._kind == ".json":
                json.loads(text)
        except (ValueError, RecursionError):
            raise self._fault("is not the JSON that it should be" if self._kind == ".json" else "is not text") from None
        if "\0" in text:
            raise self._fault("is not text")

    def _fault(self, what: str) -> ModelError:
        return ModelError(f"{self._where}: {self.name} {what}.")


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def inspect(name: str, path: Path, where: str) -> FileRecord:
    """The record of a file on disk, checked."""
    inspection = Inspection(name, path.stat().st_size, where)
    for block in blocks(path):
        inspection.feed(block)
    return inspection.close()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()
