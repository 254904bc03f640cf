"""What was done, one line per finished case: append-only, each line on disk before the next case counts as done.

A run reads every ledger of the output folder (one per shard), so the number of shards may change between runs. A case is
done when a line holds its present key (image bytes, requests, model, plan, output options) and every file of that line
still has the recorded size and digest. A file is not read again for its digest where the file system says that it is the very file that
was read before: same inode, size, time of change of content and of inode. The last of these no program can set back, so that a
scan that was replaced is always seen; thousands of finished cases are passed over without reading a scan.

The lock on a ledger only keeps two runs from doing the same work. Where a file system has no locks, or breaks them, nothing that is
done is lost: files are replaced by renaming, equal work gives equal bytes, and a case whose line was garbled is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seerseg.errors import OutputError, UsageError

SCHEMA = 1
_BLOCK = 1 << 20
_UNSETTLED_S = 3.0
_REQUEUED_WAIT_S, _POLL_S = 180.0, 0.5
_BEGINNING = b'{"schema":1,'


Stamp = tuple[int, ...]
"""Inode, size in bytes, nanoseconds of the last change of content and of inode; () where none is known."""


@dataclass(frozen=True)
class OutputFile:
    """A written file: name within the output folder, size in bytes, hex digest of its bytes, `stamp` when it was written."""

    name: str
    size: int
    digest: str
    stamp: Stamp = field(default=(), compare=False)


@dataclass(frozen=True)
class Seen:
    """An image file as it was hashed: hex digest of its bytes, and its `stamp` at that time."""

    path: str
    digest: str
    stamp: Stamp


@dataclass(frozen=True)
class Entry:
    """One line. status: "done" (every request answered), "partial" (some failed) or "failed" (no mask written);
    error: the sentence when it failed; time: seconds since the epoch; requests: request id -> its status."""

    case: str
    key: str
    status: str
    files: tuple[OutputFile, ...] = ()
    error: str = ""
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    time: float = 0.0
    requests: tuple[tuple[str, str], ...] = ()
    images: tuple[Seen, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": SCHEMA, **asdict(self), "requests": dict(self.requests)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Entry:
        """The inverse of `to_json`; KeyError, TypeError or ValueError when it is no such thing."""
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']!r}")
        files = tuple(
            OutputFile(str(f["name"]), int(f["size"]), str(f["digest"]), tuple(map(int, f.get("stamp", ())))) for f in value["files"]
        )
        if any(f.name != os.path.basename(f.name) for f in files):
            raise ValueError("a file outside of the folder")
        return cls(
            case=_string(value["case"]),
            key=_string(value["key"]),
            status=_string(value["status"]),
            files=files,
            error=_string(value["error"]),
            seconds=float(value["seconds"]),
            peak_rss_mb=float(value["peak_rss_mb"]),
            time=float(value["time"]),
            requests=tuple((_string(k), _string(v)) for k, v in value["requests"].items()),
            images=tuple(Seen(_string(i["path"]), _string(i["digest"]), tuple(map(int, i["stamp"]))) for i in value.get("images", ())),
        )


class Ledger:
    """The ledgers of an output folder, and the one of this shard, opened for appending.

    UsageError when another process holds the same ledger; OutputError when it cannot be written. `problems` has a sentence for
    every line that could not be read; such lines are kept in the file and have no other effect.
    """

    def __init__(self, folder: Path, *, num_parts: int = 1, part_id: int = 0) -> None:
        self.folder = folder
        self.path = folder / ledger_name(num_parts, part_id)
        self.problems: list[str] = []
        self._entries: dict[str, list[Entry]] = {}
        self._file = _open_to_append(self.path)
        try:
            for path in sorted(folder.glob("ledger*.jsonl")):
                entries, problems = read_ledger(path)
                self.problems += problems
                for entry in entries:
                    self._entries.setdefault(entry.case, []).append(entry)
            for entries in self._entries.values():
                entries.sort(key=lambda e: e.time)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def append(self, entry: Entry) -> None:
        """Write one line and have it on disk before returning."""
        line = json.dumps(entry.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n"
        try:
            _write_all(self._file, line.encode("utf-8", "replace"))
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error.strerror}. Free some space or choose another folder.") from error
        self._entries.setdefault(entry.case, []).append(entry)

    def lines(self, case: str) -> Sequence[Entry]:
        """All lines of a case, the newest last."""
        return self._entries.get(case, ())

    def latest(self, case: str) -> Entry | None:
        """The newest line of a case."""
        entries = self._entries.get(case)
        return entries[-1] if entries else None

    def finished(self, case: str, key: str) -> Entry | None:
        """The line that shows this case as done with this key, its files being intact; None when there is none."""
        for entry in reversed(self._entries.get(case, [])):
            if entry.key == key and entry.status == "done":
                return entry if all(is_intact(self.folder, file) for file in entry.files) else None
        return None


def ledger_name(num_parts: int, part_id: int) -> str:
    """ "ledger.jsonl" for a whole run, "ledger.0.jsonl" and so on for shards."""
    return "ledger.jsonl" if num_parts == 1 else f"ledger.{part_id}.jsonl"


def read_ledger(path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of one ledger, and a sentence for each line that is none. A cut last line (a killed run) is no problem."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OutputError(f"Cannot read {path}: {error.strerror}. Mend or remove it.") from error
    entries: list[Entry] = []
    problems: list[str] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            entries.append(Entry.from_json(json.loads(raw.decode("utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            begun = _BEGINNING.startswith(raw[: len(_BEGINNING)]) and not raw.endswith(b"}}")
            if not (begun and isinstance(error, json.JSONDecodeError | UnicodeDecodeError)):
                problems.append(f"{path.name}:{number} is no entry of a ledger; the line was skipped and its case will be done again.")
    return entries, problems


def is_intact(folder: Path, file: OutputFile) -> bool:
    """Whether a file is there as it was written, or with the recorded size and digest."""
    path = os.path.join(folder, file.name)
    try:
        found = os.stat(path)
        return stamp_of(found) == file.stamp or (found.st_size == file.size and digest_file(Path(path)) == file.digest)
    except OSError:
        return False


def stamp_of(found: os.stat_result) -> Stamp:
    """What tells a file that was not touched."""
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def describe(path: Path) -> OutputFile:
    """Name, size, digest and stamp of a written file."""
    digest, found = digest_file(path), path.stat()
    return OutputFile(path.name, found.st_size, digest, stamp_of(found))


def digest_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_images(paths: Sequence[Path]) -> list[str]:
    """For each image the hex digest of its bytes; of a DICOM folder, that of its files' names and bytes, sorted."""
    return [digest for digest, _ in map(see_image, paths)]


def see_image(path: Path, known: Mapping[str, Seen] | None = None) -> tuple[str, Seen | None]:
    """The digest of an image, and what allows the next run to pass over it: None for a DICOM folder and for a file that was changed so
    lately that another change could have the same time. known: by path, what was seen before. OSError when it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY)  # on a network file system, opening brings what is known of a file up to date
    found = os.fstat(handle)
    if stat.S_ISDIR(found.st_mode):
        os.close(handle)
        return _digest_folder(path), None
    with open(handle, "rb") as file:
        before = known.get(str(path)) if known else None
        if before is not None and before.stamp == stamp_of(found):
            return before.digest, before
        settled = time.time() - found.st_ctime > _UNSETTLED_S
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(_BLOCK):
            digest.update(block)
        same = stamp_of(os.fstat(handle)) == stamp_of(found)
    return digest.hexdigest(), Seen(str(path), digest.hexdigest(), stamp_of(found)) if settled and same else None


def _digest_folder(path: Path) -> str:
    parts = [f"{p.name}:{digest_file(p)}" for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def make_key(images: Iterable[str], requests: Iterable[tuple[str, str]], settings: Any) -> str:
    """The key of a case: digests of its images, (id, text) of its requests in order, and whatever else shapes the output."""
    value = {"images": list(images), "requests": [list(r) for r in requests], "settings": settings}
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def now() -> float:
    """Seconds since the epoch, to the millisecond."""
    return round(time.time(), 3)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _open_to_append(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}. Choose an output folder that you may write to.") from error
    try:
        _lock(file, path)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            _write_all(file, b"\n")
    except OSError as error:
        os.close(file)
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from error
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    # a job that is requeued after its node died may find the dead node's lock until the file server lets go of it
    until = time.monotonic() + (_REQUEUED_WAIT_S if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # file systems without locks (some network ones) are used without
            if time.monotonic() < until:
                time.sleep(_POLL_S)
                continue
            raise UsageError(
                f"Another seerseg_predict is writing to {path.parent} (it holds {path.name}). Wait for it, choose another folder, "
                "or share the work with --num_parts and --part_id."
            ) from None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
