"""U-MRG-14K: implicit questions on 2D medical images with masks and reasoning (MedReasoner, AAAI 2026).

Parquet files as the `datasets` library stores them, splits train and test by file name. Of a row are used (as eval/eval.py and
verl/utils/dataset/rl_dataset.py of github.com/PRIS-CV/MedReasoner read it): prompt[0].content, the question; images[0] and
masks[0], picture files, the mask 0 and 255; extra_info with id, category and supercategory; reward_model.ground_truth, JSON with
point_2d, two reference points [x, y] in pixels of the stored picture, as eval/statistic.py gives points to SAM and compares with
the mask. One row becomes one case, its category the label, its question the request, which carries the points as voxels; the box
is that of the mask.

Subjects: no person is named. Rows that show one and the same picture share a subject, so that it never lies on both sides of a split.

Not verified: the set's licence, that every row has one image and one mask (others fail, with a sentence), and that every row's
points lie in its picture (others are left out, and that is noted: evaluation then finds points in the mask).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.errors import DatasetError, ImageError, MissingExtraError
from seerseg.paths import safe_name
from seerseg_data.converters.base import CaseContent, Converter, Facts, SourceCase, ask, missing_layout

_COLUMNS = ("prompt", "images", "masks", "reward_model", "extra_info")


class UMRG(Converter):
    """Pictures with one label each; 108 categories in the published set."""

    name = "umrg"
    title = "U-MRG-14K"
    dataset_name = "UMRG14K"
    licence = "as the hub page states; the pictures keep the licences of their own sources"
    home = "https://huggingface.co/collections/zzzyzh/u-mrg"
    layout = """
    SOURCE/                                         the dataset repository
        data/train-00000-of-00005.parquet           prompt, images, masks, reward_model, extra_info
        data/test-00000-of-00001.parquet
    """
    channels = ("picture",)
    ending = ".png"

    def facts(self, source: Path) -> Facts:
        """Categories in alphabetical order."""
        categories = {_text(row, "category") for path in _files(self, source) for _, row in _rows(path, ("extra_info",))}
        return Facts(self.channels, {name: value for value, name in enumerate(sorted(categories - {""}), start=1)})

    def cases(self, source: Path) -> Iterable[SourceCase]:
        """One per row; everything is read once, for what the rows hold is what the cases are known by."""
        values = self.facts(source).labels
        for path in _files(self, source):
            for number, row in _rows(path, _COLUMNS):
                picture, mask = _picture(row, "images"), _picture(row, "masks")
                content = hashlib.blake2b(digest_size=16)
                for part in (picture, mask, _question(row).encode(), _text(row, "category").encode(), _said(row).encode()):
                    content.update(len(part).to_bytes(8, "little") + part)
                identifier = safe_name(_text(row, "id") or f"{path.stem}-{number}", 100)
                yield SourceCase(
                    id=f"umrg_{identifier}",
                    images=(path,),
                    labels=(path,),
                    part="Ts" if path.name.startswith("test") else "Tr",
                    subject="picture_" + hashlib.blake2b(picture, digest_size=8).hexdigest() if picture else None,
                    note=(number, values.get(_text(row, "category"), 0)),
                    content=content.hexdigest(),
                )

    def read(self, case: SourceCase) -> CaseContent:
        """One row of the file."""
        number, value = case.note
        row = next(row for n, row in _rows(case.images[0], _COLUMNS, only=number) if n == number)
        picture, mask, question, category = _picture(row, "images"), _picture(row, "masks"), _question(row), _text(row, "category")
        if not picture or not mask or not question.strip() or not value:
            needed = (("image", picture), ("mask", mask), ("question", question.strip()), ("category", value))
            lacks = [name for name, has in needed if not has]
            raise DatasetError(f"Case {case.id}, row {number} of {case.images[0].name}, has no {lacks[0]}. Get the file again.")
        label = (_mask(mask, case.id) > 0).astype(np.uint8) * value
        if not label.any():
            raise DatasetError(f"Case {case.id}, row {number} of {case.images[0].name}: its mask is empty. Take the row away.")
        points = _points(_said(row), *label.shape)
        notes = () if points else ("No two reference points in pixels of this picture; evaluation takes deep points of the mask.",)
        request = replace(ask(self, case.id, "question", question, [category], "implicit"), points=points)
        return CaseContent((picture,), label[None, ::-1, ::-1], (request,), notes)


def _files(converter: Converter, source: Path) -> list[Path]:
    found = sorted(p for p in source.rglob("*.parquet") if not p.name.startswith("."))
    if not found:
        raise missing_layout(converter, source)
    return found


def _rows(path: Path, columns: tuple[str, ...], only: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a parquet file, one row group in memory at a time; with `only`, rows of the group that holds it."""
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise MissingExtraError("U-MRG-14K comes as parquet files, which need pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if only is None or first <= only < first + count:
                    rows = file.read_row_group(group, columns=list(columns)).to_pylist()
                    yield from enumerate(rows, start=first)
                first += count
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{path} cannot be read as parquet ({reason}). Get the file again.") from error


def _text(row: dict[str, Any], key: str) -> str:
    info = row.get("extra_info")
    value = info.get(key) if isinstance(info, dict) else None
    return str(value).strip() if value is not None else ""


def _question(row: dict[str, Any]) -> str:
    prompt = row.get("prompt")
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return str(first.get("content") or "").replace("<image>", "").strip() if isinstance(first, dict) else ""


def _said(row: dict[str, Any]) -> str:
    """The published reference, JSON; "" when there is none."""
    model = row.get("reward_model")
    said = model.get("ground_truth") if isinstance(model, dict) else None
    return said if isinstance(said, str) else ""


def _points(said: str, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """Two voxels (0, y, x) of the canonical grid, on which rows and columns of a picture run backwards; () when they are not two pixels
    [x, y] of the picture."""
    try:
        reference = json.loads(said)
        pixels = [(round(x), round(y)) for x, y in reference["point_2d"]]
    except (ValueError, TypeError, KeyError, OverflowError):
        return ()
    if len(pixels) != 2 or not all(0 <= x < width and 0 <= y < height for x, y in pixels):
        return ()
    return tuple((0, height - 1 - y, width - 1 - x) for x, y in pixels)


def _picture(row: dict[str, Any], key: str) -> bytes:
    listed = row.get(key)
    first = listed[0] if isinstance(listed, list) and listed else None
    data = first.get("bytes") if isinstance(first, dict) else first
    return data if isinstance(data, bytes) else b""


def _mask(data: bytes, case: str) -> NDArray[Any]:
    """The mask as shown (rows from the top), any colour or grey above 0 being the target."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ImageError(f"Case {case}: its mask cannot be read ({error}). Get the file again.") from error
