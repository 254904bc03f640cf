"""One model, loaded once, that turns images and requests into masks: in memory, without processes, files or printing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from seerseg.consensus import ConsensusSettings, Readings
from seerseg.dataset import check_text
from seerseg.episode import Episode, finish
from seerseg.errors import ImageError, UsageError
from seerseg.evolution.online import OnlineBank
from seerseg.model import Model, open_model
from seerseg.prediction.outputs import Legend
from seerseg.prompts import Prompt
from seerseg.protocols.seer import normalise_name
from seerseg.reasoners.base import Reasoner
from seerseg.segmenters.base import Segmentation, Segmenter, Wrapping
from seerseg.segmenters.cache import CachedSegmenter
from seerseg.skills.base import Retriever
from seerseg.views import render
from seerseg.volume import Mask, SourceGeometry, Volume, read_case
from seerseg.volume.orientation import to_stored
from seerseg.volume.stored import Stored, Voxels, canonical_intensities, check_stored


@dataclass(frozen=True, eq=False)
class Prediction:
    """What came of one request.

    status: as of `Episode`; target: the name that was answered, None when absent; array: bool, as the given image lies
    ((Z, Y, X) for an array or a Volume, the stored (x, y, z) for a file or a nibabel image); mask: the same on the
    canonical grid. Both are None when nothing could be drawn (status "unsupported" or "fault"; `message` says why).
    """

    text: str
    status: str
    target: str | None
    message: str
    array: NDArray[np.bool_] | None
    mask: Mask | None
    episode: Episode

    @property
    def volume_ml(self) -> float | None:
        """Volume in millilitres, None where there is no mask."""
        return None if self.mask is None else self.mask.volume_ml


class Predictor:
    """A SeerSeg that is ready to be asked. Parts are loaded when first needed and kept; calls from several threads take turns.

    segmenter, reasoner: a name, a folder or an object with the methods of the seam; model_folder: a trained model, of which those
    two and `protocol` replace parts. With nothing given the shipped defaults: nano draws, and a cascade of the rules and nano reads.
    device "auto" is the first GPU, if there is one.
    accept_license: the licence of the segmenter's weights was read and allows this use; it stands in every record of the run.
    second_reading: ask once more where mask and answer disagree (a protocol that checks them, such as seerseg), keep what fits better.
    """

    def __init__(
        self,
        segmenter: str | Segmenter | None = None,
        reasoner: str | Reasoner | None = None,
        *,
        protocol: str | None = None,
        model_folder: str | Path | None = None,
        device: str = "auto",
        dtype: str | None = None,
        offline: bool = True,
        accept_license: bool = False,
        seed: int = 0,
        bank: str | Path | Retriever | None = None,
        consensus: ConsensusSettings | None = None,
        second_reading: bool = False,
    ) -> None:
        self.seed = seed
        self.second_reading = second_reading
        self.consensus = consensus or ConsensusSettings()
        self.model: Model = open_model(
            Path(model_folder).expanduser() if model_folder is not None else None,
            reasoner=reasoner,
            segmenter=segmenter,
            protocol=protocol,
            device=device,
            dtype=dtype,
            offline=offline,
            accept_license=accept_license,
            bank=bank,
        )
        self._lock = threading.RLock()

    def load(self) -> None:
        """Load everything now, but for a model that a cascade may never need; another ModelError comes here at the latest."""
        with self._lock:
            _ = self.model.protocol, self.model.reasoner, self.segmenter, self.model.targets

    @cached_property
    def segmenter(self) -> Segmenter:
        """The model's segmenter, asked once where several requests of a case come to the same prompt.

        Not behind the model's cache: no prompt comes twice for a volume, and hashing it and packing its masks would cost.
        """
        made = self.model.segmenter
        return OncePerPrompt(made.wrapped if isinstance(made, CachedSegmenter) else made)

    @cached_property
    def legend(self) -> Legend:
        """Label values: the dataset's, where the model belongs to one, else by the names that may be answered."""
        values = {normalise_name(name): v[0] for name, v in (self.model.spec.label_values or {}).items() if len(v) == 1}
        return Legend(values, self.model.targets.names)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything of the model that shapes a mask, for resume and records."""
        plain = {**self.model.describe(), "seed": self.seed}
        if self.second_reading:
            plain["second_reading"] = True
        if self.model.accept_license and self.model.segmenter.card.weights_licence:
            plain["licence_accepted"] = self.model.segmenter.card.weights_licence
        return plain if self.consensus.plain else {**plain, "consensus": asdict(self.consensus)}

    @overload
    def predict(
        self,
        image: Any,
        text: str,
        *,
        affine: NDArray[Any] | None = None,
        spacing_zyx_mm: Sequence[float] | None = None,
        modality: str | None = None,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        image: Any,
        text: list[str] | tuple[str, ...],
        *,
        affine: NDArray[Any] | None = None,
        spacing_zyx_mm: Sequence[float] | None = None,
        modality: str | None = None,
    ) -> list[Prediction]: ...
    def predict(
        self,
        image: Any,
        text: str | list[str] | tuple[str, ...],
        *,
        affine: NDArray[Any] | None = None,
        spacing_zyx_mm: Sequence[float] | None = None,
        modality: str | None = None,
    ) -> Prediction | list[Prediction]:
        """One Prediction for a text, a list for a list of texts; requests of one call share the image encoding.

        image: a path (file or DICOM folder), a list of the paths of a case's channels (the first is shown), a Volume, a nibabel image, or
        an array (Z, Y, X) or (Y, X). For an array `affine` (4, 4) maps
        voxel (x, y, z) to mm RAS, x being the array's last axis; `spacing_zyx_mm` instead takes the axes as pointing
        to superior, anterior and right, which it then says of no patient's side for sure.
        Raises ImageError, GeometryError, RequestError, ModelError, SegmenterError.
        """
        texts = [check_text(t) for t in ([text] if isinstance(text, str) else text)]
        volume, order = open_image(image, affine=affine, spacing_zyx_mm=spacing_zyx_mm, modality=modality)
        with self._lock:
            readings = self.open_readings(volume, texts)
            self.reason(readings)
            episodes = self.finish(readings, volume)
        made = [_prediction(episode, volume, order) for episode in episodes]
        return made[0] if isinstance(text, str) else made

    def open_readings(self, volume: Volume, texts: Sequence[str]) -> Readings:
        """First stage: render the views, unless the reasoner may do without, and open one dialogue per text, or several for a consensus."""
        model, card = self.model, self.model.reasoner.card
        views = render(volume, model.view_spec, later=card.looks_late or not card.sees_images)
        return Readings.open(views, texts, settings=self.consensus, protocol=model.protocol, bank=model.bank, targets=model.targets)

    def reason(self, readings: Readings) -> None:
        """Second stage: the first reply to each; left to `finish` where a protocol has several turns, so that one thread has them all."""
        if self.model.protocol.max_turns == 1:
            readings.ask(self.model.reasoner, seed=self.seed)

    def finish(self, readings: Readings, volume: Volume) -> list[Episode]:
        """Third stage: draw, and go on to the end; one episode for each text."""
        if self.model.protocol.max_turns > 1:
            readings.ask(self.model.reasoner, seed=self.seed)
        parts: dict[str, Any] = {"reasoner": self.model.reasoner, "segmenter": self.segmenter}
        episodes = finish(readings.dialogues, volume, seed=self.seed, second_reading=self.second_reading, **parts)
        settled = readings.settle(episodes)
        if isinstance(self.model.bank, OnlineBank):
            self.model.bank.learn(volume.name or volume.content_hash, volume.modality, settled)
        return settled


class OncePerPrompt(Wrapping):
    """A segmenter that is asked each distinct prompt of a call once; equal prompts share one mask array."""

    def segment(self, volume: Volume, prompts: Sequence[Prompt]) -> list[Segmentation]:
        """As `Segmenter.segment`."""
        distinct = {prompt.key: prompt for prompt in prompts}
        drawn = dict(zip(distinct, self._segmenter.segment(volume, list(distinct.values())), strict=True))
        return [replace(drawn[prompt.key], prompt=prompt) for prompt in prompts]


def open_image(
    image: Any, *, affine: NDArray[Any] | None = None, spacing_zyx_mm: Sequence[float] | None = None, modality: str | None = None
) -> tuple[Volume, str]:
    """The canonical volume of whatever `Predictor.predict` takes, and how to give masks back: in its stored axes
    as "xyz" or "zyx", or "canonical"."""
    if isinstance(image, Volume):
        return image, "canonical"
    if isinstance(image, str | Path):
        return read_case([Path(image)], modalities=[modality])[0], "xyz"
    if isinstance(image, list | tuple) and image and all(isinstance(one, str | Path) for one in image):
        channels = read_case([Path(one) for one in image], modalities=[modality] * len(image))
        return replace(channels[0], siblings=lambda: channels), "xyz"
    if hasattr(image, "dataobj") and hasattr(image, "affine"):
        stored = np.asanyarray(image.dataobj)
        return volume_from_array(stored.T, affine=np.asarray(image.affine), modality=modality), "xyz"
    return volume_from_array(np.asarray(image), affine=affine, spacing_zyx_mm=spacing_zyx_mm, modality=modality), "zyx"


def volume_from_array(
    array_zyx: NDArray[Any],
    *,
    affine: NDArray[Any] | None = None,
    spacing_zyx_mm: Sequence[float] | None = None,
    modality: str | None = None,
) -> Volume:
    """A canonical volume from an array (Z, Y, X) or (Y, X). See `Predictor.predict`."""
    name = Path("the given array")
    if affine is not None and spacing_zyx_mm is not None:
        raise UsageError("Give the affine or the spacing of the array, not both.")
    if array_zyx.ndim == 2:
        array_zyx = array_zyx[None]
    if array_zyx.ndim != 3:
        raise ImageError(
            f"The array has the shape {array_zyx.shape}; an image is (Z, Y, X) or (Y, X). Give one channel or time point at a time."
        )
    laterality = "known" if affine is not None else "assumed"
    if affine is None:
        spacing = [float(s) for s in (spacing_zyx_mm if spacing_zyx_mm is not None else (1.0, 1.0, 1.0))]
        if len(spacing) != 3 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
            raise UsageError(f"The spacing {spacing_zyx_mm} must be three lengths in mm, in (z, y, x) order.")
        affine = np.diag([*spacing[::-1], 1.0])
    matrix = np.array(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise UsageError(f"The affine must be a 4x4 matrix, not of shape {matrix.shape}.")
    shape_xyz = array_zyx.shape[::-1]
    grid, orientation = check_stored(name, shape_xyz, matrix)
    source = SourceGeometry(shape_xyz, matrix, orientation, laterality=laterality, format="array")
    stored = Stored(name, grid, source, lambda: Voxels(array_zyx.T), modality)
    voxels, notes = canonical_intensities(stored)
    return Volume(voxels, grid, modality, 0, replace(source, notes=notes))


def _prediction(episode: Episode, volume: Volume, order: str) -> Prediction:
    array = None
    if episode.mask is not None:
        array = episode.mask.array
        if order != "canonical" and volume.source is not None:
            stored = to_stored(array, volume.source.orientation)
            array = np.ascontiguousarray(stored if order == "xyz" else stored.T)
    return Prediction(episode.request, episode.status, episode.target, episode.message, array, episode.mask, episode)
