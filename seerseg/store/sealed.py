"""One array in one file that cannot be read wrongly: a blosc2 frame with a seal behind it.

    [ b2nd frame: the array, readable by any blosc2 ][ pool ][ seal: JSON, table ][ footer, 56 bytes ]

Blosc2 keeps no checksums, and its parser may crash on damaged bytes. So SeerSeg parses no frame: the seal says where each
chunk's bytes lie and what their checksum is, and only bytes that pass are decompressed. The pool holds the chunks that a
frame keeps as a mere flag (all zeros), so that every chunk is read in the same way. A chunk is a single block, which makes
its decompressed bytes plain C order. The frame's own metadata ("seerseg" in vlmeta) repeat the seal's JSON for other tools.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import StoreError
from seerseg.paths import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAGIC = b"SeerSeal"
# magic; bytes of the JSON, of the table, of the file; CRC-32 of frame and pool; BLAKE2b of these four numbers and the seal
FOOTER = struct.Struct("<8sQQQQ16s")
ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("check", "<u4")])
TAIL_BYTES = 1 << 15
READ_BYTES = 1 << 20
ROW_BYTES = 2048
ZEROS = bytes(ROW_BYTES)
Part = tuple[slice, ...]
SCHEMA = 1
MEND = "Run seerseg_preprocess again; it redoes this case only."


@dataclass(frozen=True, eq=False)
class Sealed:
    """A sealed file whose seal was read and found whole; chunks are checked whenever they are read.

    shape, chunk: voxels per axis, as many axes each; metadata: what the writer gave; table: one ENTRY per chunk, C order;
    body: bytes before the seal, and their CRC-32; identity: what tells this file from one written in its place.
    It holds no open file, so it may be pickled and used by several threads.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    metadata: dict[str, Any]
    table: NDArray[np.void]
    body: tuple[int, int]
    identity: tuple[int, int, int]

    def read(self, lo: Sequence[int], hi: Sequence[int]) -> NDArray[Any]:
        """array[lo:hi] (half-open, one number per axis), decoding only the chunks it touches.

        IndexError outside the array; StoreError when a chunk is damaged or the file changed since it was opened.
        """
        if not all(0 <= low <= high <= size for low, high, size in zip(lo, hi, self.shape, strict=True)):
            raise IndexError(f"{tuple(lo)} to {tuple(hi)} does not lie in an array of shape {self.shape}.")
        out = np.empty([high - low for low, high in zip(lo, hi, strict=True)], self.dtype)
        with self._open() as file:
            for here, there, decoded in self._chunks(file, lo, hi):
                out[here] = decoded[there]
        return out

    def check_bytes(self) -> None:
        """StoreError unless every byte before the seal is as it was written; nothing is decoded."""
        size, expected = self.body
        crc = 0
        buffer = memoryview(bytearray(min(READ_BYTES, size)))
        with self._open() as file:
            for start in range(0, size, READ_BYTES):
                part = buffer[: size - start]
                self._fill(file, start, part)
                crc = zlib.crc32(part, crc)
        if crc != expected:
            raise StoreError(f"{self.path} is damaged: its bytes are not those that were written. {MEND}")

    def check_voxels(self, arrays: Sequence[NDArray[Any]]) -> None:
        """StoreError unless every chunk decodes to exactly these `arrays`, given as to `write_sealed`."""
        bits = np.dtype(f"u{self.dtype.itemsize}")
        stacked = arrays[0].ndim < len(self.shape)
        with self._open() as file:
            for here, there, decoded in self._chunks(file, (0,) * len(self.shape), self.shape):
                given = arrays[here[0].start][None][(slice(None), *here[1:])] if stacked else arrays[0][here]
                if not np.array_equal(decoded[there].view(bits), np.ascontiguousarray(given).view(bits)):
                    raise StoreError(f"{self.path} does not hold what was just written to it. Check the disk and run the command again.")

    def _chunks(self, file: IO[bytes], lo: Sequence[int], hi: Sequence[int]) -> Iterator[tuple[Part, Part, NDArray[Any]]]:
        """(where in array[lo:hi], where in the chunk, the chunk decoded) for every chunk that the box touches.

        The decoded array is overwritten by the next one.
        """
        import blosc2

        decoded = np.empty(self.chunk, self.dtype)
        rows = _rows(int(self.table["length"].max()))
        buffer = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        spans = []  # per axis, of every chunk touched: its share in the chunk's number, and its two slices
        stride = len(self.table)
        for low, high, size, step in zip(lo, hi, self.shape, self.chunk, strict=True):
            stride //= -(-size // step)
            spans.append([_span(at, step, stride, low, high) for at in range(low // step, -(-high // step) if high > low else 0)])
        for box in itertools.product(*spans):
            offset, length, check = self.table[sum([span[0] for span in box])].item()
            data = buffer[:length]
            self._fill(file, offset, data)
            if _check(rows, buffer, length) != check:
                raise StoreError(f"{self.path} is damaged: the bytes at {offset} are not those that were written. {MEND}")
            blosc2.decompress2(data, dst=decoded, nthreads=1)
            yield tuple([span[1] for span in box]), tuple([span[2] for span in box]), decoded

    def _open(self) -> IO[bytes]:
        file = _open(self.path)
        if _identity(file) != self.identity:
            file.close()
            raise StoreError(f"{self.path} was written anew while it was being read. Run the same command again.")
        return file

    def _fill(self, file: IO[bytes], offset: int, buffer: memoryview) -> None:
        try:
            file.seek(offset)
            found = file.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            raise StoreError(f"Cannot read {self.path}: {error.strerror}. Check the disk and run the same command again.") from error
        if found != len(buffer):
            raise StoreError(f"{self.path} became shorter while it was read. {MEND}")


def read_seal(path: Path) -> Sealed:
    """Open a sealed file by its seal alone; no voxel is read.

    StoreError when the file is missing, unreadable, damaged, cut short, foreign or of another schema version.
    """
    with _open(path) as file:
        identity = _identity(file)
        size = identity[1]
        try:
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
            if len(tail) < FOOTER.size or tail[-FOOTER.size :][: len(MAGIC)] != MAGIC:
                raise StoreError(f"{path} is cut short, or was not written by SeerSeg: it ends without a seal. {MEND}")
            _, document_bytes, table_bytes, file_bytes, body_crc, digest = FOOTER.unpack(tail[-FOOTER.size :])
            seal_bytes = document_bytes + table_bytes + FOOTER.size
            whole = file_bytes == size and seal_bytes <= size
            if whole and seal_bytes > len(tail):
                file.seek(size - seal_bytes)
                tail = file.read()
        except OSError as error:
            raise StoreError(f"Cannot read {path}: {error.strerror}. Check the disk and run the same command again.") from error
    seal = tail[-seal_bytes : -FOOTER.size] if whole else b""
    if not whole or _digest(seal, document_bytes, table_bytes, file_bytes, body_crc) != digest:
        raise StoreError(f"The seal of {path} is damaged. {MEND}")
    document = json.loads(seal[:document_bytes])
    if document.get("schema") != SCHEMA:
        raise StoreError(f"{path} has schema version {document.get('schema')!r}, this SeerSeg reads version {SCHEMA}. {MEND}")
    table = np.frombuffer(seal[document_bytes:], ENTRY)
    return Sealed(
        path=path,
        dtype=np.dtype(document["dtype"]),
        shape=tuple(document["shape"]),
        chunk=tuple(document["chunk"]),
        metadata=document,
        table=table,
        body=(size - seal_bytes, body_crc),
        identity=identity,
    )


def write_sealed(path: Path, arrays: Sequence[NDArray[Any]], chunk: tuple[int, ...], metadata: dict[str, Any]) -> Sealed:
    """Write one array, or several of one shape and dtype stacked on a new first axis, and verify the file by reading it back.

    chunk: one number per axis of the file's array: one more than the arrays have means stacked, and begins with 1. metadata:
    JSON-ready. Atomic. OutputError when there is no space or no right to write; StoreError when the file does not read back.
    """
    shape = arrays[0].shape if arrays[0].ndim == len(chunk) else (len(arrays), *arrays[0].shape)
    document = {"schema": SCHEMA, **metadata, "dtype": arrays[0].dtype.name, "shape": list(shape), "chunk": list(chunk)}
    pieces = _pieces(arrays, shape, chunk, document)
    sealed: list[Sealed] = []

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(pieces)
        sealed.append(read_seal(temporary))
        sealed[0].check_voxels(arrays)

    write_atomically(path, write)
    return replace(sealed[0], path=path)


def _pieces(arrays: Sequence[NDArray[Any]], shape: tuple[int, ...], chunk: tuple[int, ...], document: dict[str, Any]) -> list[bytes]:
    import blosc2

    # Measured on CT: LZ4HC costs four times the time to write for 2 % of the size; Zstandard and the shuffling of bits save a
    # quarter of the size and decode two to six times slower.
    settings = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    if len(shape) == arrays[0].ndim:
        stored = blosc2.asarray(np.ascontiguousarray(arrays[0]), chunks=chunk, blocks=chunk, cparams=settings)
    else:
        stored = blosc2.empty(shape, dtype=arrays[0].dtype, chunks=chunk, blocks=chunk, cparams=settings)
        for number, array in enumerate(arrays):
            stored[number] = array
    stored.schunk.vlmeta["seerseg"] = document
    frame = stored.to_cframe()
    table = np.zeros(stored.schunk.nchunks, ENTRY)
    pool: dict[bytes, int] = {}
    position, pooled = 0, len(frame)
    for number in range(len(table)):
        data = stored.schunk.get_chunk(number)
        at = frame.find(data, position) if len(data) > blosc2.MAX_OVERHEAD else -1
        if at < 0:
            at = pool.setdefault(data, pooled)
            pooled += len(data) if at == pooled else 0
        else:
            position = at + len(data)
        rows = _rows(len(data))
        buffer = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        buffer[: len(data)] = data
        table[number] = (at, len(data), _check(rows, buffer, len(data)))
    text, entries = json.dumps(document, allow_nan=False).encode(), table.tobytes()
    body_crc = zlib.crc32(b"".join(pool), zlib.crc32(frame))
    numbers = (len(text), len(entries), pooled + len(text) + len(entries) + FOOTER.size, body_crc)
    return [frame, *pool, text, entries, FOOTER.pack(MAGIC, *numbers, _digest(text + entries, *numbers))]


def _rows(length: int) -> NDArray[np.uint64]:
    """Room for `length` bytes in whole rows, and one row more."""
    return np.zeros((-(-length // ROW_BYTES) + 1, ROW_BYTES // 8), "<u8")


def _check(rows: NDArray[np.uint64], buffer: memoryview, length: int) -> int:
    """Checksum of the first `length` bytes of `rows`, which `buffer` shows as bytes: CRC-32 over the sums of rows and columns.

    Any change within three words changes a sum; others pass once in 2^32. A plain CRC-32 takes as long as the decoding, this a
    third. Overwrites the rest of the row that is begun.
    """
    count = -(-length // ROW_BYTES)
    buffer[length : count * ROW_BYTES] = ZEROS[length - count * ROW_BYTES + ROW_BYTES :]
    words = rows[:count]
    return zlib.crc32(np.add.reduce(words, axis=1), zlib.crc32(np.add.reduce(words, axis=0)))


def _span(at: int, step: int, stride: int, low: int, high: int) -> tuple[int, slice, slice]:
    begin, end = max(low, at * step), min(high, (at + 1) * step)
    return at * stride, slice(begin - low, end - low), slice(begin - at * step, end - at * step)


def _digest(seal: bytes, *numbers: int) -> bytes:
    return hashlib.blake2b(struct.pack("<4Q", *numbers) + seal, digest_size=16).digest()


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise StoreError(f"There is no preprocessed file {path}. Run seerseg_preprocess for its dataset.") from None
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror}. Make it readable, or run seerseg_preprocess again.") from error


def _identity(file: IO[bytes]) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
