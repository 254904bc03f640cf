"""The three folders, dataset names, and writing files so that a crash leaves either the old or the new one.

The folder variables are read when used, never at import. JSON files carry a schema version under "schema".
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seerseg.errors import FolderError, OutputError, SeerSegError, did_you_mean

RAW_VARIABLE = "seerseg_raw"
PREPROCESSED_VARIABLE = "seerseg_preprocessed"
RESULTS_VARIABLE = "seerseg_results"
_DATASET_NAME = re.compile(r"Dataset(\d{3,})_(.+)")


def folder(variable: str, override: str | Path | None = None) -> Path:
    """The folder that a variable names, or the override; FolderError with the variable's name when neither is set."""
    value = str(override) if override is not None else os.environ.get(variable, "")
    if not value.strip():
        raise FolderError(
            f"The environment variable {variable} is not set, so SeerSeg does not know where its "
            f"{variable.removeprefix('seerseg_')} data live. Set it, for example: export {variable}=/data/{variable}"
        )
    return Path(value).expanduser()


def raw_folder(override: str | Path | None = None) -> Path:
    """Where raw datasets live."""
    return folder(RAW_VARIABLE, override)


def preprocessed_folder(override: str | Path | None = None) -> Path:
    """Where plans, splits and preprocessed cases live."""
    return folder(PREPROCESSED_VARIABLE, override)


def results_folder(override: str | Path | None = None) -> Path:
    """Where trained models live."""
    return folder(RESULTS_VARIABLE, override)


def resolve_dataset(identifier: str | int, root: Path) -> str:
    """The folder name under `root` that a number ("4", "004", 4) or a full name ("Dataset004_Hippocampus") means.

    FolderError when it is unknown (with the nearest names) or when a number fits several folders.
    """
    text = str(identifier)
    known = sorted(p.name for p in root.iterdir() if p.is_dir() and _DATASET_NAME.fullmatch(p.name)) if root.is_dir() else []
    if text in known:
        return text
    if text.isdigit():
        fitting = [name for name in known if int(_DATASET_NAME.fullmatch(name).group(1)) == int(text)]  # type: ignore[union-attr]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise FolderError(f"Dataset number {text} is ambiguous in {root}: {', '.join(fitting)}. Give the full name.")
    listed = f" Known datasets: {', '.join(known[:8])}{' ...' if len(known) > 8 else ''}." if known else f" {root} holds no dataset folder."
    raise FolderError(
        f"There is no dataset {text!r} in {root}.{did_you_mean(text, known)}{listed} "
        "A dataset is a folder DatasetXXX_Name, named by its number or its full name."
    )


def safe_name(text: str, limit: int = 80) -> str:
    """A file-system-safe form of a name: letters, digits, '.', '_' and '-'; never empty, never starting with a dot."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
    return cleaned[:limit]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then fsync it and rename it to `path`.

    The temporary name keeps the suffixes of `path` (writers choose formats by them) and starts with '.tmp-'.
    A full disk or a read-only folder becomes an OutputError naming the folder; no partial file is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix="-" + path.name, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"There is no space left to write {path}. Free some space and run the same command again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG):
            raise OutputError(f"Cannot write {path}: {error.strerror}. Choose a folder that you may write to.") from error
        raise
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: _fill(temporary, text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented by one space as nnU-Net's files are, keys in the given order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, fault: type[SeerSegError] = SeerSegError, schema: int | None = None) -> Any:
    """Read a JSON file; `fault` with one sentence when it is missing, no UTF-8, no JSON or of another schema version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise fault(f"The file {path} does not exist.") from None
    except OSError as error:
        raise fault(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise fault(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise fault(f"{path} is not valid JSON ({error}). Mend or remove it.") from None
    if schema is not None and (not isinstance(value, dict) or value.get("schema") != schema):
        found = value.get("schema") if isinstance(value, dict) else None
        raise fault(f"{path} has schema version {found!r}, this SeerSeg reads version {schema}. Make it again with this version.")
    return value


def _fill(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
