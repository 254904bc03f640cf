"""NRRD and MetaImage: the position from the header's own text, the voxels through SimpleITK; pictures through Pillow.

The text is read because ITK keeps no trace of what a header left unsaid and normalises directions on the way.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, ImageError, OutputError
from seerseg.paths import write_atomically
from seerseg.volume.grid import Float, SourceGeometry
from seerseg.volume.stored import Stored, Voxels, check_stored, squeeze_shape

_HEADER_LIMIT = 1 << 22
_MAX_DEFLATE_RATIO = 1100
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_NRRD_SPACES = {
    "left-posterior-superior": _LPS_TO_RAS,
    "lps": _LPS_TO_RAS,
    "right-anterior-superior": np.eye(3),
    "ras": np.eye(3),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0]),
    "las": np.diag([-1.0, 1.0, 1.0]),
}
_TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "char": 1, "short": 2, "long": 8, "double": 8, "float": 4, "int": 4}
_SPATIAL_KINDS = ("domain", "space", "time", "???", "none")
_PILLOW_FAULTS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, MemoryError, struct.error)
_UNSAID = "the header gives no orientation; left and right are assumed"


@dataclass(frozen=True)
class Segment:
    """One segment of a 3D Slicer segmentation: which layer, which value there, and its name."""

    layer: int
    value: int
    name: str


def open_nrrd(path: Path, *, labels: bool = False) -> Stored:
    """Read the header of a .nrrd, .nhdr or .seg.nrrd file. With `labels` the layers of a segmentation become one map."""
    fields, meta, _ = _nrrd_header(path)
    try:
        sizes = [int(n) for n in fields["sizes"].split()]
        kinds = fields.get("kinds", "").lower().split() or ["domain"] * len(sizes)
        spatial = [i for i, kind in enumerate(kinds) if kind in _SPATIAL_KINDS]
        if len(kinds) != len(sizes) or not spatial:
            raise ValueError(f"{len(sizes)} sizes but kinds {' '.join(kinds)}")
        shape = tuple(sizes[i] for i in spatial)
        components = int(np.prod([n for i, n in enumerate(sizes) if i not in spatial], dtype=object))
        columns, origin, space = _nrrd_position(fields, len(sizes), spatial)
        axes = _NRRD_SPACES.get(space.removesuffix("-time"))
    except (KeyError, ValueError, IndexError) as error:
        raise ImageError(f"{path} has a damaged NRRD header ({_one_line(error)}). Export it again.") from error
    segments = _segments(meta)
    if components > 1 and not (labels and segments):
        raise ImageError(
            f"{path} holds {components} values per voxel. SeerSeg reads one channel per file; "
            "split it (colour is not channels; a segmentation is given as a label map)."
        )
    if labels and components > 1:
        decode = _layered(path, segments)
    else:
        decode = _decoder(path)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = (_LPS_TO_RAS if axes is None else axes) @ columns, (_LPS_TO_RAS if axes is None else axes) @ origin
    return _stored(path, shape, affine, "nrrd", axes is not None, decode)


def open_metaimage(path: Path) -> Stored:
    """Read the header of a .mha or .mhd file (LPS millimetres, as ITK writes them)."""
    fields = _metaimage_header(path)
    try:
        ndim = int(fields["ndims"])
        shape = tuple(int(n) for n in fields["dimsize"].split())
        spacing = _numbers(fields.get("elementspacing", fields.get("elementsize", "")), ndim, 1.0)
        offset = _numbers(next((fields[k] for k in ("offset", "position", "origin") if k in fields), ""), ndim, 0.0)
        text = next((fields[k] for k in ("transformmatrix", "rotation", "orientation") if k in fields), "")
        matrix = np.array([float(n) for n in text.split()]).reshape(ndim, ndim) if text else np.eye(ndim)
        components = int(fields.get("elementnumberofchannels", "1"))
        if len(shape) != ndim or ndim < 1:
            raise ValueError(f"NDims is {ndim}, DimSize has {len(shape)}")
    except (KeyError, ValueError) as error:
        raise ImageError(f"{path} has a damaged MetaImage header ({_one_line(error)}). Export it again.") from error
    if components > 1:
        raise ImageError(f"{path} holds {components} values per voxel. SeerSeg reads one channel per file; split it.")
    used = min(ndim, 3)
    columns, origin = np.eye(3), np.zeros(3)
    columns[:used, :used] = (matrix.T * spacing)[:used, :used]
    origin[:used] = offset[:used]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = _LPS_TO_RAS @ columns, _LPS_TO_RAS @ origin
    return _stored(path, shape, affine, "mha", bool(text), _decoder(path))


def open_picture(path: Path, *, labels: bool = False) -> Stored:
    """A 2D picture as one grey slice: Z = 1, one "mm" per pixel (no length is known), left of the picture = patient's right.

    Colour becomes luminance with a note; with `labels` palette indices are the values and colour is refused.
    """
    with _picture(path) as image:
        mode, shape = str(image.mode), (int(image.size[0]), int(image.size[1]))
    notes = ["a picture has no scale and no orientation: lengths are in pixels, left and right are assumed as displayed"]
    grey = mode in ("1", "L", "I", "F") or mode.startswith("I;16")
    if labels and not grey and mode != "P":
        raise ImageError(f"{path} is a colour picture ({mode}), not a label map. Save the label numbers as a grey or palette PNG.")
    if mode == "LA":
        notes.append("transparency was ignored")
    elif not grey and not labels:
        notes.append("colour was read as luminance")

    def decode() -> Voxels:
        with _picture(path) as image:
            array = np.array(image if grey or (labels and mode == "P") else image.convert("L"))
        return Voxels((array.view(np.uint8) if array.dtype == np.bool_ else array).T[:, :, None])

    return _stored(path, shape, np.diag([-1.0, -1.0, 1.0, 1.0]), "png", True, decode, tuple(notes), "assumed")


def write_metaimage(stored_xyz: NDArray[Any], source: SourceGeometry, path: Path, *, like: Path | None = None) -> None:
    """Write stored voxels (x, y, z) as one compressed .mha of as many dimensions as the source had, atomically.

    The position is that of `like`, number for number as ITK reads it, where that is a MetaImage or NRRD file of this shape; else the
    source's. OutputError when the file cannot be written; GeometryError when ITK takes no such position (columns that are no axes).
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    array = stored_xyz.T
    array = array[0] if source.ndim == 2 and len(array) == 1 else array[(None,) * max(0, source.ndim - 3)]
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=False)
    told = _itk_position(like) if like is not None else None
    try:
        if told is not None and told.GetSize() == image.GetSize():
            image.SetSpacing(told.GetSpacing())
            image.SetOrigin(told.GetOrigin())
            image.SetDirection(told.GetDirection())
        else:
            used = min(source.ndim, 3)
            columns = (_LPS_TO_RAS @ source.affine[:3, :3])[:used, :used]
            spacing = np.linalg.norm(columns, axis=0)
            direction = np.eye(source.ndim)
            direction[:used, :used] = columns / spacing
            image.SetSpacing([*spacing.tolist(), *[1.0] * (source.ndim - used)])
            image.SetOrigin([*(_LPS_TO_RAS @ source.affine[:3, 3])[:used].tolist(), *[0.0] * (source.ndim - used)])
            image.SetDirection(direction.ravel().tolist())
    except RuntimeError as error:
        raise GeometryError(f"Cannot write {path}: MetaImage does not take the position of the scan ({_itk_reason(error)}).") from error

    _write_itk(image, path)


def write_empty_metaimage(like: Path, path: Path, *, most_voxels: int = 1 << 31) -> tuple[int, ...] | None:
    """Write a label map without labels on the grid that the header of `like` tells, even where its voxels are damaged or cut off.

    Returns its shape (x, y, z); None, and nothing written, when ITK cannot read that header or it promises more than most_voxels.
    """
    import SimpleITK as sitk

    told = _itk_position(like)
    if told is None or int(np.prod(told.GetSize(), dtype=object)) > most_voxels:
        return None
    image = sitk.Image(list(told.GetSize()), sitk.sitkUInt8)
    image.SetSpacing(told.GetSpacing())
    image.SetOrigin(told.GetOrigin())
    image.SetDirection(told.GetDirection())
    _write_itk(image, path)
    return tuple(int(n) for n in told.GetSize())


def _write_itk(image: Any, path: Path) -> None:
    import SimpleITK as sitk

    def write(temporary: Path) -> None:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise OutputError(f"Cannot write {path} ({_itk_reason(error)}). Free some space or choose another folder.") from error

    write_atomically(path, write)


def _itk_position(path: Path) -> Any:
    """An ITK reader that has read the header, or None for what is no MetaImage or NRRD or cannot be read."""
    import SimpleITK as sitk

    if not path.name.lower().endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader


def segmentation_names(path: Path) -> dict[int, str]:
    """Label value -> segment name of a 3D Slicer segmentation, as `open_nrrd(labels=True)` numbers them; {} for others."""
    _, meta, _ = _nrrd_header(path)
    segments = _segments(meta)
    return {value: s.name for s, value in zip(segments, _label_values(segments), strict=True)}


def _stored(
    path: Path,
    shape: tuple[int, ...],
    affine: Float,
    form: str,
    known: bool,
    decode: Callable[[], Voxels],
    notes: tuple[str, ...] = (),
    laterality: str = "known",
) -> Stored:
    shape_xyz = squeeze_shape(path, shape) if min(shape, default=0) > 0 else tuple((*shape, 0, 0, 0)[:3])
    grid, orientation = check_stored(path, shape_xyz, affine)
    source = SourceGeometry(
        shape_xyz=(shape_xyz[0], shape_xyz[1], shape_xyz[2]),
        affine=affine,
        orientation=orientation,
        laterality=laterality if known else "assumed",
        format=form,
        ndim=len(shape),
        notes=notes if known else (*notes, _UNSAID),
    )

    def checked() -> Voxels:
        voxels = decode()
        if voxels.raw_xyz.shape != shape_xyz:
            found = "x".join(map(str, voxels.raw_xyz.shape))
            raise ImageError(f"{path} contradicts itself: its header says {'x'.join(map(str, shape))}, its voxels are {found}.")
        return voxels

    return Stored(path, grid, source, checked)


def _read_itk(path: Path) -> Any:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return sitk.ReadImage(str(path), imageIO="NrrdImageIO" if path.name.lower().endswith(("nrrd", "nhdr")) else "MetaImageIO")
    except RuntimeError as error:
        raise ImageError(f"{path} is damaged or was cut short ({_itk_reason(error)}). Copy or export it again.") from error
    except MemoryError as error:
        raise ImageError(f"{path} does not fit into memory.") from error


def _decoder(path: Path) -> Callable[[], Voxels]:
    def decode() -> Voxels:
        import SimpleITK as sitk

        image = _read_itk(path)
        raw = sitk.GetArrayViewFromImage(image).T
        raw = raw[:, :, None] if raw.ndim == 2 else raw
        return Voxels(raw[(..., *[0] * (raw.ndim - 3))], keep=image)

    return decode


def _layered(path: Path, segments: list[Segment]) -> Callable[[], Voxels]:
    def decode() -> Voxels:
        import SimpleITK as sitk

        image = _read_itk(path)
        layers = sitk.GetArrayViewFromImage(image)
        values = _label_values(segments)
        out = np.zeros(layers.shape[:-1], dtype=np.min_scalar_type(max(values, default=0)))
        for segment, value in zip(segments, values, strict=True):
            if not 0 <= segment.layer < layers.shape[-1]:
                raise ImageError(f"{path} names segment {segment.name!r} in layer {segment.layer}, which it does not hold.")
            out[layers[..., segment.layer] == segment.value] = value
        return Voxels(out.T)

    return decode


def _segments(meta: dict[str, str]) -> list[Segment]:
    """Slicer's segments in order. Files of Slicer 4.10 and before give no layer and value: one layer each, value 1."""
    numbers = sorted({int(m.group(1)) for k in meta if (m := re.fullmatch(r"Segment(\d{1,6})_Name", k))})
    found = []
    for n in numbers:
        layer, value = meta.get(f"Segment{n}_Layer", str(n)), meta.get(f"Segment{n}_LabelValue", "1")
        if layer.strip().isdigit() and value.strip().isdigit():
            found.append(Segment(int(layer), int(value), meta[f"Segment{n}_Name"].strip()))
    return found


def _label_values(segments: list[Segment]) -> list[int]:
    """The value of each segment in one common map: its own where all differ, else 1, 2, ... in order."""
    own = [s.value for s in segments]
    return own if len(set(own)) == len(own) else list(range(1, len(own) + 1))


def _read_text(path: Path, end: bytes) -> tuple[bytes, int]:
    """The header's bytes up to `end` (a regular expression), and where the voxels start."""
    try:
        with path.open("rb") as file:
            block = file.read(_HEADER_LIMIT)
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror}.") from error
    if not block:
        raise ImageError(f"{path} is empty (zero bytes). Copy or export it again.")
    found = re.search(end, block)
    return (block, len(block)) if found is None else (block[: found.start()], found.end())


def _nrrd_header(path: Path) -> tuple[dict[str, str], dict[str, str], int]:
    block, start = _read_text(path, rb"\r?\n\r?\n")
    if not block.startswith(b"NRRD"):
        raise ImageError(f"{path} is not an NRRD image. Give a file that its ending describes.")
    fields: dict[str, str] = {}
    meta: dict[str, str] = {}
    for line in block.decode("utf-8", "replace").splitlines()[1:]:
        if line.startswith("#"):
            continue
        key, mark, value = line.partition(":=")
        if mark:
            meta[key.strip()] = value.strip()
            continue
        key, mark, value = line.partition(":")
        if mark:
            fields[key.strip().lower()] = value.strip()
    if not {"data file", "datafile"} & set(fields):
        size = next((n for word, n in _TYPE_BYTES.items() if word in fields.get("type", "").lower()), 1)
        if fields.get("encoding", "").lower() in ("raw", "gzip", "gz"):
            packed = fields["encoding"].lower() != "raw"
            _check_size(path, fields.get("sizes", ""), size, path.stat().st_size - start, packed)
    return fields, meta, start


def _metaimage_header(path: Path) -> dict[str, str]:
    block, start = _read_text(path, rb"(?<=\n)ElementDataFile\s*=[^\n]*\n?")
    if b"NDims" not in block[:4096]:
        raise ImageError(f"{path} is not a MetaImage file. Give a file that its ending describes.")
    pairs = (line.partition("=") for line in block.decode("utf-8", "replace").splitlines()[:200])
    fields = {key.strip().lower(): value.strip() for key, mark, value in pairs if mark}
    if path.name.lower().endswith(".mha"):
        packed = fields.get("compresseddata", "").lower() == "true"
        size = next((n for word, n in _TYPE_BYTES.items() if word in fields.get("elementtype", "").lower() and word != "long"), 1)
        there = path.stat().st_size - start
        _check_size(path, fields.get("dimsize", ""), size, there, packed)
        if packed:
            _check_size(path, fields.get("compresseddatasize", ""), 1, there, False)
    return fields


def _check_size(path: Path, sizes: str, itemsize: int, there: int, packed: bool) -> None:
    """ImageError when the file cannot hold what its header promises; keeps ITK from allocating it first."""
    try:
        needed = itemsize * int(np.prod([int(n) for n in sizes.split()], dtype=object))
    except ValueError:
        return
    if needed > there * (_MAX_DEFLATE_RATIO if packed else 1):
        raise ImageError(f"{path} was cut short: its header promises {needed} bytes of voxels. Copy or export it again.")


def _nrrd_position(fields: dict[str, str], dims: int, spatial: list[int]) -> tuple[Float, NDArray[np.float64], str]:
    """(3, 3) columns in the file's space, origin (3,), and the name of that space ('' when it gives none)."""
    columns, origin = np.eye(3), np.zeros(3)
    used = spatial[:3]
    if "space directions" in fields:
        vectors = re.findall(r"none|\([^)]*\)", fields["space directions"].lower())
        for k, axis in enumerate(used):
            vector = [float(n) for n in vectors[axis].strip("()").split(",")]
            columns[:, k] = (*vector, 0.0, 0.0)[:3]
        if len(used) == 2:
            columns[:, 2] = np.cross(columns[:, 0], columns[:, 1]) / max(1e-12, float(np.linalg.norm(columns[:, 0])))
            length = float(np.linalg.norm(columns[:, 2]))
            columns[:, 2] /= length if length > 0 else 1.0
    else:
        spacings = fields.get("spacings", "").split() or ["1"] * dims
        for k, axis in enumerate(used):
            value = float(spacings[axis])
            columns[k, k] = value if np.isfinite(value) and value != 0 else 1.0
    if "space origin" in fields:
        origin[:] = (*(float(n) for n in fields["space origin"].strip("() ").split(",")), 0.0, 0.0)[:3]
    return columns, origin, fields.get("space", "").lower() if "space directions" in fields else ""


def _numbers(text: str, count: int, default: float) -> NDArray[np.float64]:
    values = [float(n) for n in text.split()] or [default] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} numbers where {count} belong")
    return np.array(values)


@contextmanager
def _picture(path: Path) -> Iterator[Any]:
    """An open Pillow image of one page; what Pillow raises on damage, here and in the body, becomes an ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged tags that change no pixel
            with Image.open(path) as image:
                frames = int(getattr(image, "n_frames", 1))
                if frames > 1:
                    raise ImageError(f"{path} holds {frames} pages. Give one picture per file, or convert the stack to NIfTI.")
                yield image
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not a picture, or was cut short. Give a file that its ending describes.") from error
    except (*_PILLOW_FAULTS, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} is damaged or was cut short ({_one_line(error)}). Copy or export it again.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _itk_reason(error: BaseException) -> str:
    """The last sentence of ITK's long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1].split("ERROR: ")[-1] if lines else "unknown reason")[:160]
