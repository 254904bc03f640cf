"""One job of the Grand-Challenge platform: a folder with one scan and its JSON in, one label map out.

    /input/inputs.json                       list of {"interface": {"slug", "relative_path", ...}, "value", "image", ...}
    /input/images/<name>/<any>.mha           an image's folder is its interface's relative_path
    /input/<name>.json                       any other value
    /output/<relative path>/output.mha       the answer, on the scan's own grid, number for number

The platform tells a container nothing about its outputs, so the relative path of the output is an option. Newer jobs call an interface a
socket; both words are read. Without inputs.json the images and JSON files are looked for where they always lie.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from seerseg.challenge.answers import Answerer, ScanAnswer, reason_of, sum_up
from seerseg.challenge.npz import PromptSet, parse_prompts
from seerseg.errors import ImageError, OutputError, RequestError, UsageError, did_you_mean
from seerseg.volume import is_image, read_grid, read_volume, source_of, write_empty_metaimage, write_metaimage
from seerseg.volume.grid import Grid
from seerseg.volume.orientation import to_stored

INPUTS = "inputs.json"
OUTPUT_NAME = "output.mha"
_TEXT_KEYS = ("text", "prompt", "prompts", "request", "requests", "question")
_JSON_LIMIT = 1 << 22
_MOST_VOXELS = 1 << 31


@dataclass(frozen=True)
class Interface:
    """One input of a job: its slug and where it lies under /input."""

    slug: str
    path: PurePosixPath
    value: Any = None


@dataclass(frozen=True)
class JobOptions:
    """How a job is read and where its answer goes.

    output_path: relative to the output folder; texts: value -> text asked of every scan, instead of what the job holds; image, prompt: the
    slugs of the scan and of the text, needed where several fit.
    """

    output_path: str = "images/segmentation"
    texts: Mapping[int, str] | None = None
    image: str | None = None
    prompt: str | None = None
    modality: str | None = None

    @property
    def place(self) -> PurePosixPath:
        """output_path, checked: UsageError when it leaves the output folder."""
        path = PurePosixPath(self.output_path)
        if path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
            raise UsageError(f"--output_path {self.output_path!r} must be a path under the output folder, as images/lung-segmentation.")
        return path


def answer_job(source: Path, output: Path, answerer: Answerer, options: JobOptions) -> ScanAnswer:
    """Answer the job in `source`. What is wrong with it becomes the reason of an empty answer; UsageError for the options alone,
    OutputError when no answer can be written, ModelError when the model cannot be loaded (with never_fail that is a reason too)."""
    began = time.monotonic()
    into = output / options.place / OUTPUT_NAME
    answerer.load()
    image: Path | None = None
    try:
        interfaces = read_interfaces(source)
        image = find_image(source, interfaces, options.image)
        if answerer.never_fail:
            write_nothing(image, into)
        prompts = (
            PromptSet({v: (t,) for v, t in options.texts.items()}) if options.texts else find_prompts(source, interfaces, options.prompt)
        )
        volume = read_volume(image, modality=options.modality)
        array, classes, notes = answerer.label_map(volume, prompts)
        assert volume.source is not None
        write_metaimage(to_stored(array, volume.source.orientation), volume.source, into, like=image)
    except OutputError:
        raise
    except Exception as error:  # a crash would cost the answer
        shape = write_nothing(image or any_image(source), into)
        reason, fault = reason_of(error, image.name if image else str(source))
        seconds = round(time.monotonic() - began, 3)
        return ScanAnswer(image.name if image else source.name, "failed", reason, shape, seconds=seconds, fault=fault)
    status, reason = sum_up(classes)
    return ScanAnswer(image.name, status, reason, array.shape, classes, False, notes, round(time.monotonic() - began, 3))


def read_interfaces(source: Path) -> list[Interface]:
    """The inputs that inputs.json lists; without it, what lies in the folder. ImageError when the folder is none or the file damaged."""
    if not source.is_dir():
        raise ImageError(f"There is no input folder {source}. The platform mounts /input; give another with -i.")
    path = source / INPUTS
    if not path.is_file():
        folders = [p for p in sorted((source / "images").iterdir()) if p.is_dir()] if (source / "images").is_dir() else []
        found = [Interface(p.name, PurePosixPath("images") / p.name) for p in folders]
        return found + [Interface(p.stem, PurePosixPath(p.name)) for p in sorted(source.glob("*.json"))]
    listed = _json(path)
    if not isinstance(listed, list):
        raise ImageError(f"{path} is no list of inputs. It was made for another platform, or is damaged.")
    interfaces = []
    for entry in listed:
        told = entry.get("interface") or entry.get("socket") if isinstance(entry, Mapping) else None
        if not isinstance(told, Mapping) or not isinstance(told.get("slug"), str):
            raise ImageError(f"{path} holds an input without an interface's slug. It was made for another platform, or is damaged.")
        slug = told["slug"]
        where = PurePosixPath(str(told.get("relative_path") or f"images/{slug}"))
        if where.is_absolute() or ".." in where.parts:
            raise ImageError(f"{path}: the input {slug!r} lies at {where}, which is outside of the input folder.")
        interfaces.append(Interface(slug, where, entry.get("value")))
    return interfaces


def find_image(source: Path, interfaces: Sequence[Interface], slug: str | None) -> Path:
    """The scan: the one image among the inputs, or that of the slug. ImageError when there is none or several."""
    found: dict[str, list[Path]] = {}
    for interface in interfaces:
        place = source / interface.path
        files = sorted(p for p in place.iterdir() if is_image(p)) if place.is_dir() else [place] if is_image(place) else []
        if files:
            found[interface.slug] = files
    if slug is not None:
        if slug not in found:
            known = f" Inputs with an image: {', '.join(found) or 'none'}."
            raise ImageError(f"The job in {source} has no image at the input {slug!r}.{did_you_mean(slug, found)}{known}")
        found = {slug: found[slug]}
    files = [file for paths in found.values() for file in paths]
    if not files:
        raise ImageError(f"The job in {source} holds no image: none lies where {INPUTS} says, or under images/.")
    if len(files) > 1:
        listed = ", ".join(sorted(found)) if len(found) > 1 else f"{len(files)} files at {next(iter(found))}"
        raise ImageError(f"The job in {source} holds several images ({listed}). Say which is the scan with --image_slug.")
    return files[0]


def find_prompts(source: Path, interfaces: Sequence[Interface], slug: str | None) -> PromptSet:
    """What is asked: the one text among the inputs, or that of the slug. RequestError when there is none or several."""
    found: dict[str, PromptSet] = {}
    for interface in interfaces:
        path = source / interface.path
        value = interface.value
        if path.suffix == ".json" and path.is_file():
            value = _json(path)
        prompts = prompts_in(value)
        if prompts is not None and (slug is None or interface.slug == slug):
            found[interface.slug] = prompts
    if slug is not None and not found:
        raise RequestError(f"The job in {source} has no text at the input {slug!r}. Inputs: {', '.join(i.slug for i in interfaces)}.")
    if not found:
        raise RequestError(f"The job in {source} asks nothing: no JSON input holds a text. Give a fixed one with --prompt.")
    if len(found) > 1:
        raise RequestError(f"Several inputs hold text ({', '.join(sorted(found))}). Say which one asks with --prompt_slug.")
    return next(iter(found.values()))


def prompts_in(value: Any) -> PromptSet | None:
    """A text (value 1), a list of texts (1, 2, ...), a dict of whole numbers to texts, or a dict with one of these at "text", "prompt",
    "request" or "question"; None for anything else."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        said = all(isinstance(text, str) and text.strip() for text in value)
        return PromptSet({i: (text,) for i, text in enumerate(value, 1)}) if value and said else None
    if not isinstance(value, Mapping):
        return None
    for key in _TEXT_KEYS:
        if key in value:
            return prompts_in(value[key])
    return parse_prompts(value)


def any_image(source: Path) -> Path | None:
    """The first image under the input folder, for the grid of an empty answer."""
    files = sorted(p for p in source.rglob("*") if p.is_file() and is_image(p)) if source.is_dir() else []
    return files[0] if files else None


def write_nothing(image: Path | None, into: Path) -> tuple[int, ...]:
    """Write an empty answer on the scan's grid where its header can be read, else of a single voxel; gives the shape (Z, Y, X)."""
    if image is not None:
        shape = write_empty_metaimage(image, into)
        if shape is not None:
            return shape[::-1]
    source = source_of(Grid((1, 1, 1), np.eye(4)))
    with suppress(ImageError, OSError, ValueError):
        told = read_grid(image)[1] if image is not None else source
        source = told if int(np.prod(told.shape_xyz, dtype=object)) <= _MOST_VOXELS else source
    write_metaimage(np.zeros(source.shape_xyz, dtype=np.uint8), source, into)
    return source.shape_xyz[::-1]


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise RequestError(f"{path} has {path.stat().st_size} bytes; the texts of a job are small. It was not read.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"{path} is no JSON that can be read ({error}). Get the job again.") from error
