"""Masks of the evolution's scans, kept on disk: a round that goes on in another process, or another bank of the same scans, draws none
twice. What a segmenter draws depends on the scan's content, the channel, the segmenter and the prompt alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seerseg.errors import OutputError
from seerseg.paths import write_atomically
from seerseg.prompts import Prompt
from seerseg.segmenters.base import Segmentation, Segmenter, Wrapping
from seerseg.segmenters.packed import PackedMask
from seerseg.volume import Mask, Volume


class KeptMasks(Wrapping):
    """A segmenter that keeps what it drew, in `folder`, one small file a mask (`PackedMask`). A file that cannot be read is drawn
    again, and a folder that cannot be written to keeps nothing. Refusals are not kept. Sessions go to the segmenter."""

    def __init__(self, segmenter: Segmenter, folder: Path) -> None:
        super().__init__(segmenter)
        self._folder = folder

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """As `Segmenter.segment`; `seconds` of a kept mask is 0."""
        paths = [self._path(volume, prompt) for prompt in prompts]
        made = [_read(path, volume, prompt) for path, prompt in zip(paths, prompts, strict=True)]
        missing = [n for n, found in enumerate(made) if found is None]
        drawn = self._segmenter.segment(volume, [prompts[n] for n in missing]) if missing else []
        for n, result in zip(missing, drawn, strict=True):
            made[n] = result
            if result.mask is not None:
                _keep(paths[n], result, result.mask)
        return [found for found in made if found is not None]

    def _path(self, volume: Volume, prompt: Prompt) -> Path:
        said = f"{volume.content_hash}|{volume.channel}|{self.card.identity}|{prompt.key}"
        return self._folder / f"{hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}.npz"


def _keep(path: Path, result: Segmentation, mask: Mask) -> None:
    about = {"status": result.status, "name": mask.name, "presence": result.presence, "message": result.message, "nearest": result.nearest}
    voxels = PackedMask.of(mask.array)
    data = {
        "grid": np.array(mask.array.shape),
        "lo": np.array(voxels.lo),
        "shape": np.array(voxels.shape),
        "bits": voxels.bits,
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **data)

    with contextlib.suppress(OutputError, OSError):
        write_atomically(path, write)


def _read(path: Path, volume: Volume, prompt: Prompt) -> Segmentation | None:
    shape = volume.grid.shape_zyx
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if tuple(kept["grid"].tolist()) != tuple(shape):
                return None
            voxels = PackedMask(tuple(kept["lo"].tolist()), tuple(kept["shape"].tolist()), kept["bits"])
        mask = Mask(voxels.unpacked(shape), volume.grid, str(about["name"]))
        return Segmentation(prompt, about["status"], mask, about["presence"], about["message"], tuple(about["nearest"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error, BadZipFile):
        return None
