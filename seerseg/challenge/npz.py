"""The .npz files of the CVPR 2025 challenge on text-guided 3D segmentation: read without running anything in them, and written.

A scan's file holds imgs (D, H, W), grey values 0 to 255, spacing, and text_prompts, a 0-d object array of a dict {"1": sentence, ...,
"instance_label": 0 or 1}; where text_prompts is missing, `<name>.json` beside the file may hold the same dict. An answer's file has the
same name and holds segs (D, H, W): the keys of the prompts as values, or numbered instances where instance_label is 1.

What an .npz does not say, and what is taken for it:

- Axes. The arrays were read by SimpleITK from scans that mostly lie with x to the patient's left, y to the back and z up, so D is taken to
  run upwards, H to the back, W to the left: index 0 of W is the patient's right. Laterality is recorded as "assumed". Views are made from
  the canonical array (all three axes turned to right, front, up), so the patient's right is shown on the left as in every other scan.
- spacing is SimpleITK's GetSpacing(), so it goes (W, H, D), as the winners' code reads it too.
- Units. CT was windowed and rescaled to 0..255, which the file does not say: by CT_WINDOW, as the preprocessing that the challenge's
  organisers publish does (pre_CT_MR.py of MedSAM), unless another window is given. Undone, they are Hounsfield units again, cut at the
  window's ends. Without a window they stay 0..255 and the modality unknown, which segmenters made for Hounsfield units cannot use.

The pickle inside text_prompts is read by an unpickler that knows numpy arrays and plain containers and nothing else.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import ImageError, RequestError
from seerseg.paths import read_json, write_atomically
from seerseg.volume import Volume
from seerseg.volume.orientation import to_stored

MODALITIES = ("CT", "MR", "MRI", "US", "PET", "Microscopy")
INSTANCE_KEY = "instance_label"
CT_WINDOW = (40.0, 400.0)  # centre and width in HU: soft tissue
GREY_LEVELS = 255.0
_SEEN_AS_THEY_ARE = {"MR": "MR", "MRI": "MR", "US": "US", "PET": "PET"}
_PICKLE_LIMIT = 1 << 22
_BLOCK = 1 << 24
_MAX_DEFLATE_RATIO = 1100
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_HEADER_BYTES = 1 << 14
_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError, zlib.error, struct.error)
_MOST_VOXELS = 1 << 31  # of an empty answer to a scan that cannot be read


@dataclass(frozen=True)
class PromptSet:
    """What one file asks. texts: value in the answer -> its wordings (one in a scan's file, several in the training table), by rising
    value; instances: the answer's values number instances of the one thing asked for, instead of naming classes."""

    texts: Mapping[int, tuple[str, ...]]
    instances: bool = False

    @property
    def first(self) -> dict[int, str]:
        """Value -> its first wording."""
        return {value: said[0] for value, said in self.texts.items()}


def modality_of(name: str) -> str:
    """The modality that a file name begins with ("MR" for MRI), or "unknown"."""
    first = name.split("_")[0]
    return {"MRI": "MR"}.get(first, first) if first in MODALITIES else "unknown"


def npz_names(path: Path) -> frozenset[str]:
    """The arrays of an .npz by name, without reading them; none when it is no zip (reading the case will say so)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except _DAMAGE:
        return frozenset()


def read_npz(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz without running anything in it; ImageError with one sentence when one is missing, damaged, hostile, or unpacks to
    more than its header says or the memory holds."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                found[name] = _read_member(path, name, archive)
    except KeyError:
        raise ImageError(f"{path} lacks the array {name!r}. Get the file again.") from None
    except MemoryError as error:
        raise ImageError(f"{path}: {name} does not fit into memory. Use a machine with more, or get the file again.") from error
    except _DAMAGE as error:
        raise ImageError(f"{path} is damaged or no .npz file ({error}). Get the file again.") from error
    return found


def _read_member(path: Path, name: str, archive: zipfile.ZipFile) -> NDArray[Any]:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        head = member.read(_HEADER_BYTES)
        shape, fortran, dtype, start = _header(head)
        if dtype.hasobject:
            if info.file_size > _PICKLE_LIMIT:
                raise ImageError(f"{path}: {name} holds {info.file_size} bytes of pickled objects; prompts are small. It was not read.")
            return np.asarray(_unpickle(path, name, io.BytesIO(head[start:] + member.read(_PICKLE_LIMIT))), dtype=object)
        count = int(np.prod(shape, dtype=object))
        if min(shape, default=0) < 0 or info.file_size - start != count * dtype.itemsize:
            raise ValueError(f"{name} ends early")
        if info.file_size > info.compress_size * _MAX_DEFLATE_RATIO + _HEADER_BYTES:
            raise ValueError(f"{name} promises {info.file_size} bytes from {info.compress_size} packed ones")
        flat = np.empty(count, dtype=dtype)
        into = flat.view(np.uint8).reshape(-1) if flat.size else np.empty(0, np.uint8)
        at = min(len(head) - start, into.size)
        into[:at] = np.frombuffer(head, np.uint8, at, start)
        while at < into.size:
            block = member.read(min(_BLOCK, into.size - at))
            if not block:
                raise ValueError(f"{name} ends early")
            into[at : at + len(block)] = np.frombuffer(block, np.uint8)
            at += len(block)
        member.read(1)  # past the end: the check sum is compared
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, type and length of an .npy header; ValueError when it is none."""
    stream = io.BytesIO(head)
    reader = _HEADER_READERS.get(np.lib.format.read_magic(stream))
    if reader is None:
        raise ValueError("an .npy of an unknown version")
    try:
        shape, fortran, dtype = reader(stream)
    except Exception as error:  # numpy parses it as Python's literals, so that damage may raise anything
        raise ValueError(f"an .npy with a damaged header: {error}") from error
    return shape, fortran, dtype, stream.tell()


def _reconstruct(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """numpy's own way to begin an array; its content follows as a state."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("it wants an array of a kind that numpy does not write")
    return np.ndarray((0,), np.int8)


def _scalar(dtype: Any, data: bytes = b"") -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("it wants a number of a kind that numpy does not write")
    return np.frombuffer(data, dtype=dtype)[0] if dtype.itemsize else dtype.type()


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _ARRAY_MODULES and name in ("_reconstruct", "scalar"):
            return _reconstruct if name == "_reconstruct" else _scalar
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _unpickle(path: Path, name: str, stream: io.BytesIO) -> Any:
    try:
        return _Restricted(stream).load()
    except Exception as error:  # a hostile pickle may raise anything
        raise ImageError(
            f"{path}: {name} is a pickle that holds more than plain text and numbers ({error}), so it was not run. Do not trust this file."
        ) from error


def parse_prompts(value: Any) -> PromptSet | None:
    """A dict {"1": sentence or sentences, ..., "instance_label": 0 or 1} as prompts; None when nothing in it is one.

    Keys that are no whole number from 1 up and values that are no text are left out.
    """
    if not isinstance(value, Mapping):
        return None
    texts: dict[int, tuple[str, ...]] = {}
    for key, said in value.items():
        sentences = [said] if isinstance(said, str) else said
        if not re.fullmatch(r"\d{1,9}", str(key)) or int(key) < 1:
            continue
        if isinstance(sentences, list | tuple) and sentences and all(isinstance(s, str) and s.strip() for s in sentences):
            texts[int(key)] = tuple(str(s) for s in dict.fromkeys(sentences))
    try:
        instances = bool(int(value.get(INSTANCE_KEY, 0)))
    except (TypeError, ValueError):
        instances = False
    return PromptSet(dict(sorted(texts.items())), instances) if texts else None


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a scan's file, or of `<name>.json` beside it. ImageError when text_prompts is damaged or hostile; RequestError with
    one sentence when neither asks anything."""
    aside, names = path.with_suffix(".json"), npz_names(path)
    if "text_prompts" in names or not (names or aside.is_file()):
        given = read_npz(path, ("text_prompts",))["text_prompts"]
        prompts, where = parse_prompts(given.item() if given.shape == () else None), f"text_prompts of {path}"
    elif aside.is_file():
        prompts, where = parse_prompts(read_json(aside, RequestError)), str(aside)
    else:
        raise RequestError(f"{path} holds no text_prompts, and there is no {aside.name} beside it. Nothing is asked of this scan.")
    if prompts is None:
        raise RequestError(f'{where} asks nothing: a dict {{"1": "sentence", ..., "{INSTANCE_KEY}": 0 or 1}} is needed.')
    return prompts


def read_spacing(path: Path) -> tuple[float, float, float]:
    """spacing in mm along (D, H, W), as the arrays lie (the file has it the other way round); ImageError when it is unusable."""
    stored = read_npz(path, ("spacing",))["spacing"]
    try:
        spacing = np.asarray(stored, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        spacing = np.zeros(0)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and spacing.min() > 0):
        raise ImageError(f"{path}: spacing is {spacing.tolist()}; three positive numbers are needed. Get the file again.")
    return float(spacing[2]), float(spacing[1]), float(spacing[0])


def read_scan(path: Path, *, ct_window: tuple[float, float] | None = CT_WINDOW) -> Volume:
    """imgs as a canonical volume whose source remembers how the file lay (see the module's head); ImageError with one sentence.

    The modality is the one that the file name begins with. ct_window: centre and width in HU that CT was cut to; with None the grey values
    of CT stay and its modality is unknown.
    """
    from seerseg.prediction.predictor import volume_from_array

    images = read_npz(path, ("imgs",))["imgs"]
    if images.ndim != 3 or images.dtype.kind not in "iuf" or not images.size:
        raise ImageError(f"{path}: imgs has the shape {images.shape}; a scan of one number per voxel (D, H, W) is needed.")
    depth, height, width = read_spacing(path)
    modality, assumed = _SEEN_AS_THEY_ARE.get(modality_of(path.name)), ""
    if ct_window is not None and modality_of(path.name) == "CT":
        centre, span = ct_window
        if images.dtype == np.uint8:
            levels = np.arange(GREY_LEVELS + 1) * (span / GREY_LEVELS) + (centre - span / 2)
            images = np.rint(levels).astype(np.int16 if abs(levels).max() < 1 << 15 else np.float32)[images]
        else:
            images = images.astype(np.float32) * np.float32(span / GREY_LEVELS) + np.float32(centre - span / 2)
        modality = "CT"
        assumed = f"; grey values are taken for a window of {span:g} HU about {centre:g}"
    try:
        volume = volume_from_array(images, affine=np.diag([-width, -height, depth, 1.0]), modality=modality)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    assert volume.source is not None
    note = f"the file says neither side nor position: W is taken to run to the patient's left, H to the back, D up{assumed}"
    source = replace(volume.source, laterality="assumed", notes=(*volume.source.notes, note))
    return replace(volume, source=source, name=path.stem)


def as_stored(array_zyx: NDArray[Any], volume: Volume) -> NDArray[Any]:
    """A canonical array of this volume's shape in the file's own order (D, H, W); a view."""
    assert volume.source is not None
    return to_stored(array_zyx, volume.source.orientation).T


def read_answer(path: Path, key: str = "segs") -> NDArray[Any]:
    """A label map (D, H, W) of whole numbers from 0 up, in the type it is stored in; ImageError with one sentence."""
    array = read_npz(path, (key,))[key]
    if array.ndim != 3 or array.dtype.kind not in "iufb" or (array.size and not array.min() >= 0):
        raise ImageError(f"{path}: {key} is no label map (D, H, W) of whole numbers from 0 up (shape {array.shape}, {array.dtype}).")
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise ImageError(f"{path}: {key} holds values that are no whole numbers.")
    return array.astype(np.uint8) if array.dtype == np.bool_ else array


def write_answer(segs: NDArray[Any], path: Path) -> None:
    """Write segs (D, H, W) atomically; the same input gives the same bytes. OutputError when it cannot be written."""
    write_atomically(path, lambda temporary: np.savez_compressed(temporary, segs=segs))


def known_shape(path: Path) -> tuple[int, int, int] | None:
    """The shape (D, H, W) of imgs from a file of which the rest may be damaged or cut off; None when not even that can be read."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as member:
            head = member.read(_HEADER_BYTES)
    except (*_DAMAGE, KeyError):
        head = _first_bytes(path)
    try:
        shape = _header(head)[0]
    except ValueError:
        return None
    sizes = [int(n) for n in shape[:3]]
    believable = len(sizes) == 3 and min(sizes) > 0 and int(np.prod(sizes, dtype=object)) <= _MOST_VOXELS
    return (sizes[0], sizes[1], sizes[2]) if believable else None


def _first_bytes(path: Path) -> bytes:
    """The beginning of imgs.npy from its local entry, where the zip's directory at the end is lost."""
    try:
        with path.open("rb") as file:
            data = file.read(1 << 20)
    except OSError:
        return b""
    at = data.find(b"imgs.npy")
    if at < 30 or data[at - 30 : at - 26] != b"PK\x03\x04":
        return b""
    packed = int.from_bytes(data[at - 22 : at - 20], "little")
    start = at + 8 + int.from_bytes(data[at - 2 : at], "little")
    if packed == zipfile.ZIP_STORED:
        return data[start : start + _HEADER_BYTES]
    try:
        return zlib.decompressobj(-15).decompress(data[start:], _HEADER_BYTES) if packed == zipfile.ZIP_DEFLATED else b""
    except zlib.error:
        return b""
