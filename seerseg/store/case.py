"""One preprocessed case: the channels in cases/<case>.b2nd, the label map in labels/<case>.b2nd.

Both are on the case's canonical grid and hold the file's own numbers: windows and normalisation are applied after reading, so
changing them never means preprocessing again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import DatasetError, GeometryError, StoreError
from seerseg.store.layout import StoreLayout
from seerseg.store.sealed import MEND, Sealed, read_seal, write_sealed
from seerseg.volume import Grid, SourceGeometry, Volume

CASES = "cases"
LABELS = "labels"
ENDING = ".b2nd"
HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """What a raw file was: its name without folders, its size, and the BLAKE2b of its bytes (of all files, for a folder)."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, eq=False)
class StoredCase:
    """A preprocessed case, open for reading. Only the seal was read; voxels are decoded when asked for, chunk by chunk.

    Every method that reads voxels raises StoreError when the chunks it needs are damaged.
    """

    id: str
    grid: Grid
    source: SourceGeometry
    channels: int
    image: Sealed
    label_path: Path

    def modality(self, channel: int = 0) -> str | None:
        """The modality of a channel, None when unknown."""
        value = self._channel(channel)["modality"]
        return None if value is None else str(value)

    def percentiles(self, channel: int = 0) -> dict[str, float]:
        """Intensities of a channel as `volume.intensity_percentiles` gives them."""
        return dict(self._channel(channel)["percentiles"])

    def content_hash(self, channel: int = 0) -> str:
        """`Volume.content_hash` of the channel, without reading it."""
        return str(self._channel(channel)["content_hash"])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the voxels: int16 or float32."""
        return self.image.dtype

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """The raw files this case was made from: its channels, then its label when it has one."""
        return tuple(SourceFile(**item) for item in self.image.metadata["sources"])

    @property
    def record(self) -> dict[str, Any] | None:
        """What planning measured on this case while it was decoded, None when nothing was asked for."""
        value: dict[str, Any] | None = self.image.metadata["record"]
        return value

    @property
    def has_labels(self) -> bool:
        """Whether the case was stored with a label map."""
        return self.image.metadata["labels"] is not None

    def read_slice(self, axis: int, index: int, channel: int = 0) -> NDArray[Any]:
        """The 2D array at `index` of array axis `axis` (0 z: (Y, X), 1 y: (Z, X), 2 x: (Z, Y)); IndexError outside."""
        return _slice(self.image, (channel,), self.grid.shape_zyx, axis, index)

    def read_patch(self, lo_zyx: Sequence[int], hi_zyx: Sequence[int], channel: int = 0) -> NDArray[Any]:
        """array[lo:hi] (z, y, x) of a channel, half-open, inside the array; IndexError outside."""
        return np.asarray(self.image.read((channel, *lo_zyx), (channel + 1, *hi_zyx))[0])

    def volume(self, channel: int = 0) -> Volume:
        """A whole channel, decoded."""
        facts = self._channel(channel)
        array = self.read_patch((0, 0, 0), self.grid.shape_zyx, channel)
        source = SourceGeometry.from_json(facts["source"]) if facts["source"] is not None else None
        volume = Volume(array, self.grid, self.modality(channel), channel, source, self.id, self._volumes)
        volume._hash.append(self.content_hash(channel))  # spares hashing what was hashed when it was written
        return volume

    def _volumes(self) -> tuple[Volume, ...]:
        return tuple(self.volume(channel) for channel in range(self.channels))

    def channel(self, channel: int = 0) -> ChannelSlices:
        """The channel as a source of slices for `seerseg.views`."""
        self._channel(channel)
        return ChannelSlices(self, channel)

    def labels(self) -> tuple[NDArray[Any], Grid] | None:
        """The whole label map (Z, Y, X) on the case's grid, None when the case has none."""
        return (self._labels.read((0, 0, 0), self.grid.shape_zyx), self.grid) if self._labels is not None else None

    def read_label_slice(self, axis: int, index: int) -> NDArray[Any] | None:
        """A slice of the label map as `read_slice` gives one of the image, None when the case has no label map."""
        return _slice(self._labels, (), self.grid.shape_zyx, axis, index) if self._labels is not None else None

    def read_label_patch(self, lo_zyx: Sequence[int], hi_zyx: Sequence[int]) -> NDArray[Any] | None:
        """labels[lo:hi] as `read_patch` gives it of the image, None when the case has no label map."""
        return self._labels.read(lo_zyx, hi_zyx) if self._labels is not None else None

    def label_counts(self) -> dict[int, int]:
        """Voxels per label value, without reading the label map; empty when the case has none."""
        stored = self.image.metadata["labels"]
        return {int(value): int(count) for value, count in stored["counts"].items()} if stored is not None else {}

    def _channel(self, channel: int) -> dict[str, Any]:
        if not 0 <= channel < self.channels:
            raise IndexError(f"Case {self.id} has {self.channels} channel(s), there is no channel {channel}.")
        facts: dict[str, Any] = self.image.metadata["channels"][channel]
        return facts

    @cached_property
    def _labels(self) -> Sealed | None:
        stored = self.image.metadata["labels"]
        if stored is None:
            return None
        sealed = read_seal(self.label_path)
        if sealed.metadata.get("digest") != stored["digest"] or sealed.shape != self.grid.shape_zyx:
            raise StoreError(f"{self.label_path} does not belong to {self.image.path}: one of them is older. {MEND}")
        return sealed


@dataclass(frozen=True, eq=False)
class ChannelSlices:
    """One channel of a stored case, read slice by slice (a `seerseg.views.SliceSource`)."""

    case: StoredCase
    number: int = 0
    grid: Grid = field(init=False)
    modality: str | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", self.case.grid)
        object.__setattr__(self, "modality", self.case.modality(self.number))

    @property
    def percentiles(self) -> dict[str, float]:
        """Intensities as `volume.intensity_percentiles` gives them."""
        return self.case.percentiles(self.number)

    def read_slice(self, axis: int, index: int) -> NDArray[Any]:
        """The 2D array at `index` of array axis `axis`, decoding only the chunks it touches."""
        return self.case.read_slice(axis, index, self.number)


def case_path(folder: Path, case_id: str) -> Path:
    """Where a case's channels are stored."""
    return _path(folder, CASES, case_id)


def write_case(
    folder: Path,
    case_id: str,
    volumes: Sequence[Volume],
    labels: tuple[NDArray[Any], Grid] | None,
    layout: StoreLayout,
    *,
    sources: Sequence[SourceFile] = (),
    record: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> StoredCase:
    """Store the channels of one case, all on one grid, and its label map on that grid; both are read back and compared.

    The image is renamed into place last: until then the case counts as not done. sources: the raw files, for resuming by
    content; record, settings: JSON-ready, what was measured on the case and how it was read. GeometryError when the grids
    differ; DatasetError for a label map of negative or fractional values; OutputError without space or rights; StoreError when
    a file does not read back as written.
    """
    if not volumes:
        raise DatasetError(f"Case {case_id} has no channel to store. Check its image files.")
    grid = volumes[0].grid
    for number, volume in enumerate(volumes):
        if not volume.grid.close_to(grid):
            raise GeometryError(f"Channel {number} of case {case_id} is not on the grid of channel 0. Resample it first.")
    label_facts = _write_labels(folder, case_id, labels, grid, layout)
    arrays = _one_dtype([volume.array for volume in volumes])
    stored = [
        volume if array is volume.array else Volume(array, volume.grid, volume.modality, volume.channel, volume.source, volume.name)
        for volume, array in zip(volumes, arrays, strict=True)
    ]
    metadata = {
        "case": case_id,
        "grid": grid.to_json(),
        "layout": layout.to_json(),
        "channels": [_channel_facts(volume) for volume in stored],
        "labels": label_facts,
        "sources": [asdict(source) for source in sources],
        "record": record,
        "settings": settings,
    }
    path = _path(folder, CASES, case_id)
    sealed = write_sealed(path, arrays, (1, *layout.chunk_zyx(grid.shape_zyx, arrays[0].dtype)), metadata)
    if labels is None:
        _path(folder, LABELS, case_id).unlink(missing_ok=True)
    return _stored_case(folder, case_id, sealed)


def open_case(folder: Path, case_id: str) -> StoredCase:
    """Open a preprocessed case; `folder` is the dataset's preprocessed folder. StoreError when it is missing or unusable."""
    return _stored_case(folder, case_id, read_seal(_path(folder, CASES, case_id)))


def verify_case(folder: Path, case_id: str) -> StoredCase:
    """Open a case and check every byte of its files, decoding nothing; StoreError at the first damage."""
    case = open_case(folder, case_id)
    case.image.check_bytes()
    if case._labels is not None:
        case._labels.check_bytes()
    return case


def stored_cases(folder: Path) -> list[str]:
    """Ids of the cases stored under the dataset's preprocessed folder, sorted; whether each is whole, opening it tells."""
    return sorted(path.name.removesuffix(ENDING) for path in (folder / CASES).glob(f"*{ENDING}") if not path.name.startswith("."))


def hash_source(path: Path) -> SourceFile:
    """Name, size and digest of a raw file, or of all files in a folder (DICOM); OSError when it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    for file in files:
        if file is not path:
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(HASH_BLOCK):
                digest.update(block)
                size += len(block)
    return SourceFile(path.name, size, digest.hexdigest())


def _path(folder: Path, kind: str, case_id: str) -> Path:
    if not case_id or case_id.startswith(".") or any(mark in case_id for mark in "/\\\0"):
        raise StoreError(f"{case_id!r} is no name for a case: it must be a file name without folders. Rename its files.")
    return folder / kind / f"{case_id}{ENDING}"


def _stored_case(folder: Path, case_id: str, sealed: Sealed) -> StoredCase:
    facts = sealed.metadata.get("channels")
    if not facts or len(sealed.shape) != 4:
        raise StoreError(f"{sealed.path} is a sealed file, but not the image of a case. {MEND}")
    first = facts[0]["source"]
    grid = Grid.from_json(sealed.metadata["grid"])
    source = SourceGeometry.from_json(first) if first is not None else _unknown_source(grid)
    return StoredCase(case_id, grid, source, len(facts), sealed, _path(folder, LABELS, case_id))


def _unknown_source(grid: Grid) -> SourceGeometry:
    z, y, x = grid.shape_zyx
    return SourceGeometry((x, y, z), grid.affine, np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]), format="array")


def _channel_facts(volume: Volume) -> dict[str, Any]:
    return {
        "modality": volume.modality,
        "percentiles": volume.percentiles,
        "content_hash": volume.content_hash,
        "source": volume.source.to_json() if volume.source is not None else None,
    }


def _one_dtype(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """int16 when every array's type fits into it or every value does, else float32."""
    small = np.iinfo(np.int16)

    def fits(array: NDArray[Any]) -> bool:
        if np.can_cast(array.dtype, np.int16) or array.size == 0:
            return True
        return array.dtype.kind in "iu" and int(array.min()) >= small.min and int(array.max()) <= small.max

    dtype = np.dtype(np.int16 if all(fits(array) for array in arrays) else np.float32)
    return [array if array.dtype == dtype else array.astype(dtype) for array in arrays]


def _write_labels(
    folder: Path, case_id: str, labels: tuple[NDArray[Any], Grid] | None, grid: Grid, layout: StoreLayout
) -> dict[str, Any] | None:
    if labels is None:
        return None
    array, label_grid = labels
    if array.shape != grid.shape_zyx or not label_grid.close_to(grid):
        raise GeometryError(f"The label map of case {case_id} is not on the grid of its image. Read it with `like` set to that grid.")
    if array.dtype.kind not in "iub" or (array.size and int(array.min()) < 0):
        raise DatasetError(f"The label map of case {case_id} holds negative or fractional values. Labels count from 0; mend the file.")
    array = np.ascontiguousarray(array, np.min_scalar_type(int(array.max(initial=0))))
    values, counts = np.unique(array, return_counts=True) if array.dtype.itemsize > 2 else _counts(array)
    digest = hashlib.blake2b(repr((array.dtype.str, array.shape)).encode() + array.tobytes(), digest_size=16).hexdigest()
    facts = {"digest": digest, "counts": {str(int(value)): int(count) for value, count in zip(values, counts, strict=True)}}
    metadata = {"case": case_id, "grid": grid.to_json(), **facts}
    write_sealed(_path(folder, LABELS, case_id), [array], layout.chunk_zyx(grid.shape_zyx, array.dtype), metadata)
    return facts


def _counts(array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    counts = np.bincount(array.reshape(-1))
    values = np.flatnonzero(counts)
    return values, counts[values]


def _slice(sealed: Sealed, before: tuple[int, ...], shape_zyx: tuple[int, int, int], axis: int, index: int) -> NDArray[Any]:
    if axis not in (0, 1, 2) or not 0 <= index < shape_zyx[axis]:
        raise IndexError(f"There is no slice {index} on axis {axis} of an array of shape {shape_zyx}.")
    lo, hi = [0, 0, 0], list(shape_zyx)
    lo[axis], hi[axis] = index, index + 1
    array = sealed.read((*before, *lo), (*(number + 1 for number in before), *hi))
    return np.asarray(np.squeeze(array, axis=(*range(len(before)), axis + len(before))))
