"""NIfTI-1 and NIfTI-2 single files: headers by nibabel, voxels straight from and to the stream."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import GeometryError, ImageError, OutputError
from seerseg.paths import write_atomically
from seerseg.volume.grid import Float, Grid, SourceGeometry
from seerseg.volume.orientation import to_stored
from seerseg.volume.stored import Stored, Voxels, check_stored, slabs, squeeze_shape

GZIP_LEVEL = 2  # on masks as fast as level 1 (300 MB/s) and a tenth smaller; level 6 takes 3.5 times as long, level 9 forty times
_COMMENT = 6
_LABEL_INTENT = 1002
_MAX_DEFLATE_RATIO = 1100
_CHUNK = 1 << 20
_SILENT = logging.Logger("seerseg.volume.nifti", level=logging.CRITICAL + 1)


def open_nifti(path: Path) -> Stored:
    """Read the header; ImageError or GeometryError with a sentence when the file is not a usable NIfTI image."""
    with _stream(path) as file:
        header = _read_header(path, _read(path, file, 540))
    shape = tuple(int(n) for n in header.get_data_shape())
    shape_xyz = squeeze_shape(path, shape) if min(shape, default=0) > 0 else tuple((*shape, 0, 0, 0)[:3])
    affine, laterality, notes = _position(path, header)
    grid, orientation = check_stored(path, shape_xyz, affine)
    dtype = _data_type(path, header)
    slope, inter = header.get_slope_inter()
    source = SourceGeometry(
        shape_xyz=(shape_xyz[0], shape_xyz[1], shape_xyz[2]),
        affine=affine,
        orientation=orientation,
        header=header.as_byteswapped("<").binaryblock,
        laterality=laterality,
        format="nifti",
        ndim=len(shape),
        notes=notes,
    )
    offset = max(int(header["vox_offset"]), int(header["sizeof_hdr"]) + 4)

    def decode() -> Voxels:
        raw = _read_voxels(path, offset, dtype, shape_xyz)
        return Voxels(raw, 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter))

    return Stored(path, grid, source, decode)


def open_channels(path: Path) -> list[Stored]:
    """The 3D images of a 4D NIfTI file, in the order of its fourth axis; one for a 3D file. The voxels are read once, when first
    asked for, and kept as long as one of the images is. Faults as `open_nifti`, and an ImageError for five dimensions."""
    with _stream(path) as file:
        header = _read_header(path, _read(path, file, 540))
    shape = [int(n) for n in header.get_data_shape()]
    if len(shape) < 4 or shape[3:] == [1] * len(shape[3:]):
        return [open_nifti(path)]
    if len(shape) > 4 or min(shape) < 1:
        raise ImageError(f"{path} has the shape {tuple(shape)}; three axes of space and one of channels are needed.")
    affine, laterality, notes = _position(path, header)
    grid, orientation = check_stored(path, tuple(shape[:3]), affine)
    dtype, (slope, inter) = _data_type(path, header), header.get_slope_inter()
    offset = max(int(header["vox_offset"]), int(header["sizeof_hdr"]) + 4)
    header.set_data_shape(shape[:3])
    block = header.as_byteswapped("<").binaryblock
    kept: list[NDArray[Any]] = []

    def decode(index: int) -> Voxels:
        if not kept:
            kept.append(_read_voxels(path, offset, dtype, tuple(shape)))
        return Voxels(kept[0][..., index].copy(order="F"), 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter))

    source = SourceGeometry((shape[0], shape[1], shape[2]), affine, orientation, block, laterality, "nifti", 3, notes)
    return [Stored(path, grid, source, partial(decode, index)) for index in range(shape[3])]


def unplaced_source(shape_zyx: tuple[int, int, int], spacing_zyx_mm: tuple[float, float, float]) -> tuple[Grid, SourceGeometry]:
    """Grid and source for a canonical array whose file says neither position nor side: written as NIfTI it has sform and qform
    code 0 and is read back on this grid with laterality "assumed"."""
    from nibabel.nifti1 import Nifti1Header

    header = Nifti1Header()
    header.set_data_shape(shape_zyx[::-1])
    header.set_zooms(spacing_zyx_mm[::-1])
    header.set_xyzt_units("mm")
    affine = np.asarray(header.get_base_affine(), dtype=np.float64)
    grid, orientation = check_stored(Path("image"), shape_zyx[::-1], affine)
    return grid, SourceGeometry(shape_zyx[::-1], affine, orientation, header.binaryblock, "assumed")


def write_nifti(
    array_zyx: NDArray[Any],
    source: SourceGeometry,
    path: Path,
    *,
    label: bool,
    legend: dict[int, str] | None = None,
) -> None:
    """Write a canonical array as the source lay: shape, affine and, where it was NIfTI, header geometry.

    The path ends in .nii or .nii.gz. The write is atomic and the same input gives the same bytes.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise OutputError(f"Cannot write {path}: masks are written as NIfTI. Choose a name that ends in .nii.gz.")
    stored = to_stored(array_zyx, source.orientation)
    if stored.shape != tuple(source.shape_xyz):
        raise GeometryError(f"Cannot write {path}: the array is {stored.shape} (x, y, z), its source {tuple(source.shape_xyz)}.")
    header = _header_for(source, array_zyx.dtype, label)
    if legend:
        from nibabel.nifti1 import Nifti1Extension

        text = json.dumps({"labels": {str(k): v for k, v in sorted(legend.items())}}, ensure_ascii=False)
        header.extensions.append(Nifti1Extension(_COMMENT, text.encode("utf-8")))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as plain:
            if path.name.endswith(".gz"):
                with gzip.GzipFile("", "wb", GZIP_LEVEL, plain, mtime=0) as packed:
                    _write_stream(cast(BinaryIO, packed), header, stored)
            else:
                _write_stream(plain, header, stored)

    write_atomically(path, write)


def read_legend(path: str | Path) -> dict[int, str]:
    """The label names that `write_nifti` left in the header, {} when there are none."""
    path = Path(path)
    with _stream(path) as file:
        block = _read(path, file, 540)
        header = _read_header(path, block)
        rest = block + _read(path, file, max(0, min(int(header["vox_offset"]), 1 << 24) - len(block)))
    position = int(header["sizeof_hdr"]) + 4
    endian: Any = "little" if header.endianness == "<" else "big"
    while position + 8 <= len(rest) and rest[int(header["sizeof_hdr"])] == 1:
        size, code = (int.from_bytes(rest[position + k : position + k + 4], endian) for k in (0, 4))
        if size < 16:
            break
        try:
            value = json.loads(rest[position + 8 : position + size].rstrip(b"\0")) if code == _COMMENT else None
            return {int(k): str(v) for k, v in value["labels"].items()} if isinstance(value, dict) else {}
        except (ValueError, KeyError, AttributeError):
            position += size
    return {}


def _stream(path: Path) -> BinaryIO:
    """An open binary stream of the (decompressed) file."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _read(path: Path, file: BinaryIO, count: int) -> bytes:
    try:
        return file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{path} is damaged or was cut short ({error}). Copy or export it again.") from error


def _read_header(path: Path, block: bytes) -> Any:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    if not block:
        raise ImageError(f"{path} is empty (zero bytes). Copy or export it again.")
    kind: Any = None
    if len(block) >= 348 and block[344:348] == b"n+1\0":
        kind, size = Nifti1Header, 348
    elif len(block) >= 540 and block[4:8] == b"n+2\0":
        kind, size = Nifti2Header, 540
    elif len(block) >= 348 and block[344:348] == b"ni1\0":
        raise ImageError(f"{path} is half of a NIfTI pair (.hdr and .img). Convert it to one .nii.gz file.")
    if kind is None:
        raise ImageError(f"{path} is not a NIfTI image, or was cut short. Give a .nii or .nii.gz file.")
    try:
        header = kind.from_fileobj(io.BytesIO(block[:size]), check=False)
        header.check_fix(logger=_SILENT, error_level=40)
        header.get_data_shape(), header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError, OverflowError) as error:
        raise ImageError(f"{path} has a damaged NIfTI header ({error}). Export it again.") from error
    return header


def _data_type(path: Path, header: Any) -> np.dtype[Any]:
    from nibabel.spatialimages import HeaderDataError

    try:
        dtype = np.dtype(header.get_data_dtype())
    except HeaderDataError as error:
        raise ImageError(f"{path} has a damaged NIfTI header ({error}). Export it again.") from error
    if dtype.kind not in "iuf":
        kind = "colour (RGB)" if dtype.fields else "complex" if dtype.kind == "c" else str(dtype)
        raise ImageError(f"{path} holds {kind} values, not one number per voxel. Export it as a plain intensity image.")
    return dtype


def _position(path: Path, header: Any) -> tuple[Float, str, tuple[str, ...]]:
    """(affine, laterality, notes): the sform if its code > 0, else the qform if its code > 0, else an assumption."""
    notes: list[str] = []
    if int(header["xyzt_units"]) & 7 in (1, 3):
        notes.append("the header says metres or micrometres; coordinates were read as millimetres")
    qform = _qform(header) if int(header["qform_code"]) > 0 else None
    if int(header["sform_code"]) > 0:
        sform = np.asarray(header.get_sform(), dtype=np.float64)
        if qform is not None and np.isfinite(sform).all():
            shape = [int(n) for n in (*header.get_data_shape(), 1, 1, 1)[:3]]
            corners = np.array([[a, b, c, 1] for a in (0, shape[0]) for b in (0, shape[1]) for c in (0, shape[2])], dtype=np.float64)
            off = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
            if off > 0.1:
                notes.append(f"sform and qform differ by up to {off:.1f} mm; the sform was used")
        return sform, "known", tuple(notes)
    if qform is not None:
        return qform, "known", tuple(notes)
    if int(header["qform_code"]) > 0:
        raise GeometryError(f"{path} has a qform that is no rotation, and no sform, so its place in space is unknown. Mend its header.")
    notes.append("the header gives no orientation (sform and qform codes are 0); left and right are assumed")
    return np.asarray(header.get_base_affine(), dtype=np.float64), "assumed", tuple(notes)


def _qform(header: Any) -> Float | None:
    """The qform's matrix, None when its numbers make none."""
    from nibabel.spatialimages import HeaderDataError

    try:
        qform = np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return None
    return qform if np.isfinite(qform).all() else None


def _read_voxels(path: Path, offset: int, dtype: np.dtype[Any], shape_xyz: tuple[int, ...]) -> NDArray[Any]:
    """All voxels as an (x, y, z) Fortran-order array in memory; ImageError when the file ends early or is damaged."""
    count = int(np.prod([int(n) for n in shape_xyz], dtype=object))
    needed = count * dtype.itemsize
    short = f"{path} was cut short: its header promises {needed} bytes of voxels. Copy or export it again."
    try:
        if needed > path.stat().st_size * _MAX_DEFLATE_RATIO:
            raise ImageError(short)
        with _stream(path) as file:
            packed = isinstance(file, gzip.GzipFile)
            if not packed and offset + needed > path.stat().st_size:
                raise ImageError(short)
            if len(_read(path, file, offset)) < offset:
                raise ImageError(short)
            flat = np.empty(count, dtype=dtype)
            into = flat.view(np.uint8).data
            while into:
                got = file.readinto(into[:_CHUNK])  # type: ignore[attr-defined]  # gzip makes bytes of as much as it is asked for
                if not got:
                    raise ImageError(short)
                into = into[got:]
            if packed:
                while file.read(_CHUNK):  # to the end: only there gzip compares its checksum
                    pass
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{path} is damaged or was cut short ({error}). Copy or export it again.") from error
    except MemoryError as error:
        raise ImageError(f"{path} does not fit into memory: its voxels need {needed / 1e9:.1f} GB.") from error
    return flat.reshape(shape_xyz, order="F")


def _header_for(source: SourceGeometry, dtype: np.dtype[Any], label: bool) -> Any:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    if source.header is not None:
        kind: Any = Nifti1Header if len(source.header) == 348 else Nifti2Header
        header = kind.from_fileobj(io.BytesIO(source.header), check=False)
        for name in ("descrip", "aux_file", "intent_name", *(("db_name",) if kind is Nifti1Header else ())):
            header[name] = b""  # free text of the scan may name the patient
        header["intent_code"] = header["intent_p1"] = header["intent_p2"] = header["intent_p3"] = 0
    else:
        header = (Nifti1Header if max(source.shape_xyz) <= np.iinfo(np.int16).max else Nifti2Header)()
        header.set_data_shape(source.shape_xyz[:2] if source.ndim == 2 else source.shape_xyz)
        header.set_xyzt_units("mm")
        header.set_sform(source.affine, code=1)
        axes = source.affine[:3, :3] / np.linalg.norm(source.affine[:3, :3], axis=0)
        if np.allclose(axes.T @ axes, np.eye(3), atol=1e-5):
            header.set_qform(source.affine, code=1)
        else:
            header["pixdim"][1:4] = np.linalg.norm(source.affine[:3, :3], axis=0)
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"SeerSeg"
    if label:
        header["intent_code"] = _LABEL_INTENT
    header["vox_offset"] = 0
    return header


def _write_stream(file: BinaryIO, header: Any, stored_xyz: NDArray[Any]) -> None:
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4 + header.extensions.get_sizeondisk()
    header.write_to(file)
    planes = stored_xyz.T
    for part in slabs(planes):
        file.write(np.ascontiguousarray(planes[part]).data)
