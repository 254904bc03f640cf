"""`nnunet`: any trained nnU-Net v2 model folder as a frozen segmenter, through nnU-Net's own predictor.

    FOLDER/plans.json dataset.json fold_N/checkpoint_final.pth [label_descriptions.json]

`nnunet:FOLDER?name=value&name=value` takes: folds (0,1 or all), checkpoint (file name), tta (mirroring: on or off), step (of
the tiles, above 0 to 1), orientation ("stored", or what the training images lie in, as RAS or LPS). Its classes are the closed vocabulary.

What the network sees is what nnU-Net's reader would hand it. Its readers give the voxels as they lie in the file, the "Reorient" ones in
RAS+; so, where the reader is one of the former, a canonical volume is turned back to how its file lay (one without a file stays RAS+).
torch and nnunetv2 are imported when a folder is loaded.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seerseg.dataset.raw import label_values, modality_of
from seerseg.errors import DatasetError, MissingExtraError, ModelError, SegmenterError, UsageError, WeightsError
from seerseg.paths import read_json
from seerseg.segmenters.base import ModelCard
from seerseg.segmenters.checkpoints import OWN_PACKAGES, finite, network_weights, open_checkpoint
from seerseg.segmenters.closed import ClassNames, ClosedSegmenter, LabelMap, split_source, switch, window_step
from seerseg.vocabulary import LabelDescription
from seerseg.volume import Volume
from seerseg.volume.orientation import to_canonical, to_stored

CHECKPOINT = "checkpoint_final.pth"
INSTALL = 'pip install "seerseg[nnunet]" && pip install --no-deps nnunetv2 dynamic-network-architectures acvl-utils batchgenerators'
_REVISION = 1  # part of the identity: raise it whenever the same weights would draw other masks
_OUT_OF_FILE = "RAS"
_AXES = {"R": (0, 1.0), "L": (0, -1.0), "A": (1, 1.0), "P": (1, -1.0), "S": (2, 1.0), "I": (2, -1.0)}


@dataclass(frozen=True)
class NnunetOptions:
    """How a folder is run. folds None: all that have the checkpoint; tta None: on, but off on a CPU; orientation None: by the reader."""

    folds: tuple[str, ...] | None = None
    checkpoint: str = CHECKPOINT
    tta: bool | None = None
    step: float = 0.5
    orientation: str | None = None


@dataclass(frozen=True, eq=False)
class _Folder:
    """A model folder as read, without its weights."""

    path: Path
    plans: dict[str, Any]
    dataset: dict[str, Any]
    labels: dict[str, tuple[int, ...]]
    channels: tuple[str, ...]
    descriptions: dict[str, LabelDescription]
    checkpoints: dict[str, Path]


@dataclass(frozen=True, eq=False)
class _Weights:
    """What is kept of the checkpoints: one state dict per fold, and what the first says of the run."""

    parameters: list[dict[str, Any]]
    configuration: str
    trainer: str
    mirroring: tuple[int, ...] | None


def load(*, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True) -> NnunetSegmenter:
    """The segmenter of a trained folder; nothing is ever downloaded. UsageError for options, ModelError for a folder that is none,
    WeightsError for checkpoints, MissingExtraError where nnunetv2 is not installed."""
    if source is None:
        raise UsageError("The segmenter nnunet needs a trained nnU-Net folder: write nnunet:FOLDER.")
    if dtype not in (None, "auto", "float32"):
        raise UsageError(f"The segmenter nnunet keeps its weights in float32, not in {dtype}; leave the dtype out.")
    place, given = split_source(str(source), _READERS, "the segmenter nnunet")
    return NnunetSegmenter.load(Path(place).expanduser(), NnunetOptions(**given), device=device)


class NnunetSegmenter(ClosedSegmenter):
    """An nnU-Net's classes by name. Deterministic on one device; the label map of the last volume is kept."""

    def __init__(self, folder: _Folder, weights: _Weights, options: NnunetOptions, *, device: str) -> None:
        self.folder, self.options = folder.path, options
        self.channels = folder.channels
        self._predictor: Any = _build(folder, weights, options, device)
        self._reader = str(folder.plans.get("image_reader_writer", "SimpleITKIO"))
        self._values = folder.labels
        modalities = tuple(dict.fromkeys(m for m in map(modality_of, folder.channels) if m is not None))
        card = ModelCard(
            name="nnunet",
            identity=_identity(folder, weights, options, self._predictor.use_mirroring),
            code_licence="Apache-2.0",
            weights_licence="that of the folder's owner",
            source=str(folder.path),
            notes=f"{weights.trainer} {weights.configuration}, folds {', '.join(folder.checkpoints)}; takes {', '.join(folder.channels)}.",
        )
        classes = ClassNames.of(folder.labels, descriptions=folder.descriptions)
        super().__init__(classes, card, modalities=modalities, channels=len(folder.channels))

    @classmethod
    def load(cls, path: Path, options: NnunetOptions | None = None, *, device: str = "cpu") -> NnunetSegmenter:
        """From a folder with plans.json, dataset.json and fold_*/; see `load`."""
        chosen = options or NnunetOptions()
        folder = _read_folder(path, chosen)
        _require_nnunet()
        return cls(folder, _read_checkpoints(folder), chosen, device=device)

    def unfit(self, volumes: Sequence[Volume]) -> str | None:
        """Why the number of channels does not do."""
        if len(volumes) == len(self.channels):
            return None
        return (
            f"The nnU-Net in {self.folder} was trained on {len(self.channels)} channels ({', '.join(self.channels)}) and was given "
            f"{len(volumes)}; give them all, in this order, on one grid."
        )

    def storage(self, volume: Volume) -> str:
        """The orientation in which the network sees it."""
        return json.dumps(self._orientation(volume).tolist())

    def draw(self, volumes: Sequence[Volume], group: tuple[str, ...]) -> LabelMap:
        """All classes, in one inference."""
        first = volumes[0]
        for volume in volumes[1:]:
            if not volume.grid.close_to(first.grid):
                raise SegmenterError(f"The channels of {first.name or 'the case'} lie on different grids; resample them to one.")
        orientation = self._orientation(first)
        stack = np.stack([to_stored(finite(volume.array), orientation).transpose(2, 1, 0) for volume in volumes])
        spacing_xyz = first.grid.spacing_zyx[::-1]
        spacing = [float(spacing_xyz[int(axis)]) for axis in orientation[:, 0]][::-1]
        if first.source is not None and first.source.ndim == 2:
            spacing[0] = 999.0 * max(spacing[1:])  # what nnU-Net takes for the thickness of a picture
        labels = self._drawn(stack, spacing) if stack.any() else np.zeros(stack.shape[1:], dtype=np.uint8)
        canonical = to_canonical(labels.transpose(2, 1, 0), orientation)
        return LabelMap(np.ascontiguousarray(canonical), self._values)

    def unload(self) -> None:
        """Give weights, label map and accelerator memory back; asking it afterwards is a SegmenterError."""
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian

        with self._lock:
            device, self._predictor = self._predictor and self._predictor.device, None
            self.forget()
            compute_gaussian.cache_clear()
            gc.collect()
            if device is not None and device.type == "cuda":
                import torch

                torch.cuda.empty_cache()

    def _orientation(self, volume: Volume) -> NDArray[np.float64]:
        """(3, 2): canonical axis and sign of each stored axis (x, y, z) that the network sees."""
        wanted = self.options.orientation or (_OUT_OF_FILE if "Reorient" in self._reader else "stored")
        if wanted == "stored" and volume.source is not None:
            return np.asarray(volume.source.orientation, dtype=np.float64)
        return np.array([_AXES[letter] for letter in (_OUT_OF_FILE if wanted == "stored" else wanted)], dtype=np.float64)

    def _drawn(self, stack: NDArray[np.float32], spacing_zyx_mm: list[float]) -> NDArray[Any]:
        """As `_predict`. What is not zero may be so thin (a single slice) that nothing would be left of it at the network's spacing, where
        nnU-Net fails; its outer slices are then repeated until one is."""
        if self._predictor is None:
            raise SegmenterError(f"The nnU-Net in {self.folder} was unloaded; load it again.")
        forward, target = self._predictor.plans_manager.transpose_forward, self._predictor.configuration_manager.spacing
        fine = {int(axis): float(mm) for axis, mm in zip(forward[3 - len(target) :], target, strict=True)}
        needed = [math.floor(0.5 * fine[axis] / mm) + 1 if axis in fine else 1 for axis, mm in enumerate(spacing_zyx_mm)]
        filled = (stack != 0).any(axis=0)
        spans = [np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
        box = tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)
        extent = [part.stop - part.start for part in box]
        if all(n >= least for n, least in zip(extent, needed, strict=True)):
            return self._predict(stack, spacing_zyx_mm)
        lacking = [(0, max(0, least - n)) for n, least in zip(extent, needed, strict=True)]
        thick = self._predict(np.pad(stack[:, *box], [(0, 0), *lacking], mode="edge"), spacing_zyx_mm)
        labels = np.zeros(stack.shape[1:], dtype=thick.dtype)
        labels[box] = thick[tuple(slice(n) for n in extent)]
        return labels

    def _predict(self, stack: NDArray[np.float32], spacing_zyx_mm: list[float]) -> NDArray[Any]:
        """Label map (Z, Y, X) of an array (C, Z, Y, X) in nnU-Net's axes: the steps of its `predict_single_npy_array`, which would take
        eight threads to resample whatever the machine has."""
        import torch
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert

        predictor = self._predictor
        plans, configuration = predictor.plans_manager, predictor.configuration_manager
        threads = torch.get_num_threads()
        try:
            preprocessor = configuration.preprocessor_class(verbose=False)
            properties: dict[str, Any] = {"spacing": spacing_zyx_mm}
            data, _, properties = preprocessor.run_case_npy(stack, None, properties, plans, configuration, predictor.dataset_json)
            logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
            if not torch.isfinite(logits).all():
                raise SegmenterError(f"The nnU-Net in {self.folder} gave values that are not finite for this scan.")
            return np.asarray(convert(logits, plans, configuration, predictor.label_manager, properties, num_threads_torch=threads))
        except (MemoryError, torch.OutOfMemoryError) as fault:
            raise SegmenterError(
                f"The memory does not hold this scan of {stack.shape[1:]} voxels for the nnU-Net in {self.folder} "
                f"({len(self._values)} classes); use --device cpu, a machine with more memory, or crop the scan."
            ) from fault
        except RuntimeError as fault:
            if "inf" not in str(fault):
                raise
            raise SegmenterError(f"The nnU-Net in {self.folder} gave values that are not finite for this scan.") from fault
        finally:
            torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------- options and folder


def _folds(value: str) -> tuple[str, ...]:
    folds = tuple(part.strip() for part in value.split(","))
    if not all(fold == "all" or fold.isdigit() for fold in folds):
        raise ValueError("write fold numbers with commas between them, or all")
    return folds


def _checkpoint(value: str) -> str:
    if not value.endswith(".pth") or Path(value).name != value:
        raise ValueError("write the name of a .pth file, such as checkpoint_best.pth")
    return value


def _oriented(value: str) -> str:
    code = value.upper()
    if code == "STORED":
        return "stored"
    if len(code) != 3 or {_AXES.get(letter, (None, 0))[0] for letter in code} != {0, 1, 2}:
        raise ValueError("write stored, or three letters such as RAS or LPS")
    return code


_READERS = {"folds": _folds, "checkpoint": _checkpoint, "tta": switch, "step": window_step, "orientation": _oriented}


def _read_folder(path: Path, options: NnunetOptions) -> _Folder:
    if not path.is_dir():
        raise ModelError(f"The nnU-Net folder {path} does not exist.")
    if not (path / "plans.json").is_file():
        raise ModelError(_no_model(path))
    plans, dataset = read_json(path / "plans.json", ModelError), read_json(path / "dataset.json", ModelError)
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise ModelError(f"{path / 'plans.json'} holds no configurations, so it is not nnU-Net v2's. Give a trained nnU-Net v2 folder.")
    try:
        if not isinstance(dataset, dict):
            raise DatasetError(f"{path / 'dataset.json'} must hold a JSON object, as nnU-Net's does.")
        labels, _ = label_values(dataset, path / "dataset.json")
    except DatasetError as fault:
        raise ModelError(str(fault)) from fault
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not isinstance(channels, dict) or not channels:
        raise ModelError(f'{path / "dataset.json"} lacks the key \'channel_names\' (for example {{"0": "CT"}}). Add it.')
    return _Folder(
        path=path,
        plans=plans,
        dataset=dataset,
        labels=labels,
        channels=tuple(str(name) for name in channels.values()),
        descriptions=_descriptions(path / "label_descriptions.json", labels),
        checkpoints=_checkpoints(path, options),
    )


def _no_model(path: Path) -> str:
    if path.name.startswith("fold_") and (path.parent / "plans.json").is_file():
        return f"{path} is one fold of an nnU-Net; give {path.parent}, with ?folds={path.name.removeprefix('fold_')} for this fold alone."
    inner = sorted(str(found.parent) for found in path.glob("*/plans.json"))
    if inner:
        return f"{path} is no trained nnU-Net folder but holds {len(inner)}; name one of them: {', '.join(inner[:6])}."
    return f"{path} holds no plans.json, so it is no trained nnU-Net v2 folder. Give the one with plans.json, dataset.json and fold_0."


def _checkpoints(path: Path, options: NnunetOptions) -> dict[str, Path]:
    there = {f.parent.name.removeprefix("fold_"): f for f in sorted(path.glob(f"fold_*/{options.checkpoint}"))}
    wanted = options.folds or tuple(f for f in there if f.isdigit()) or tuple(there)
    lacking = [fold for fold in wanted if fold not in there]
    if lacking or not wanted:
        names = sorted({f.name for f in path.glob("fold_*/*.pth")}) or ["none"]
        which = f"fold_{lacking[0]}/{options.checkpoint}" if lacking else f"fold_*/{options.checkpoint}"
        raise WeightsError(f"The nnU-Net in {path} has no {which} (there: {', '.join(names)}). Copy it, or choose with ?checkpoint=NAME.")
    return {fold: there[fold] for fold in wanted}


def _descriptions(path: Path, labels: Mapping[str, Any]) -> dict[str, LabelDescription]:
    """label_descriptions.json beside the model, as beside a dataset; {} without it. A bare text stands for {"canonical": text}."""
    if not path.is_file():
        return {}
    listed = read_json(path, ModelError)
    if isinstance(listed, dict) and "labels" in listed and "labels" not in labels:
        listed = listed["labels"]
    if not isinstance(listed, dict):
        raise ModelError(f"{path} must map label names to descriptions. Mend or remove it.")
    made: dict[str, LabelDescription] = {}
    for label, entry in listed.items():
        if label == "schema":
            continue
        told = {"canonical": entry} if isinstance(entry, str) else entry
        canonical = told.get("canonical", label) if isinstance(told, dict) else None
        synonyms = told.get("synonyms", []) if isinstance(told, dict) else None
        if label not in labels or not isinstance(canonical, str) or not canonical.strip() or not isinstance(synonyms, list):
            raise ModelError(
                f"{path}: the description of {label!r} cannot be used (labels of dataset.json: {', '.join(labels)}). "
                'Write {"canonical": "left lung", "synonyms": [...]}.'
            )
        side = told.get("laterality") if told.get("laterality") in ("left", "right", "both") else None
        made[label] = LabelDescription(canonical.strip(), tuple(str(s).strip() for s in synonyms), told.get("region"), side)
    return made


# ------------------------------------------------------------------------------------------------------------- weights


def _read_checkpoints(folder: _Folder) -> _Weights:
    parameters: list[dict[str, Any]] = []
    said: list[tuple[str, str, tuple[int, ...] | None]] = []
    for path in folder.checkpoints.values():
        held = open_checkpoint(path, "nnU-Net v2's")
        arguments, mirroring = held.get("init_args"), held.get("inference_allowed_mirroring_axes")
        configuration = arguments.get("configuration") if isinstance(arguments, dict) else None
        if not isinstance(configuration, str) or configuration not in folder.plans["configurations"]:
            raise WeightsError(
                f"The checkpoint {path} is of the configuration {configuration!r}, which plans.json beside it does not have "
                f"({', '.join(folder.plans['configurations'])}); it belongs to another model."
            )
        parameters.append(network_weights(held, path, "use another (?checkpoint=NAME) or train again"))
        said.append((configuration, str(held.get("trainer_name")), None if mirroring is None else tuple(int(a) for a in mirroring)))
    if len({configuration for configuration, _, _ in said}) > 1:
        raise WeightsError(f"The folds in {folder.path} are of different configurations; choose some of them with ?folds=0,1.")
    return _Weights(parameters, *said[0])


def _identity(folder: _Folder, weights: _Weights, options: NnunetOptions, mirrored: bool) -> str:
    from importlib.metadata import version

    digest = hashlib.blake2b(digest_size=12)
    said = {name: [d.canonical, *d.synonyms] for name, d in folder.descriptions.items()}
    settings = {**asdict(options), "folds": None, "tta": mirrored, "mirroring": weights.mirroring, "configuration": weights.configuration}
    facts = [_REVISION, version("nnunetv2"), settings, folder.plans, folder.labels, folder.dataset.get("regions_class_order"), said]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for parameters in weights.parameters:
        for name in sorted(parameters):
            digest.update(name.encode())
            digest.update(parameters[name].contiguous().view(-1).numpy().data)
    return f"nnunet-{digest.hexdigest()}"


# ------------------------------------------------------------------------------------------------------------- nnU-Net's own classes


def _require_nnunet() -> None:
    try:
        import nnunetv2.inference.predict_from_raw_data
        import nnunetv2.utilities.get_network_from_plans  # noqa: F401
    except ImportError as fault:
        raise MissingExtraError(
            f"The segmenter nnunet needs the package nnunetv2 ({str(fault).rstrip('.')}). Install it with: {INSTALL}"
        ) from fault


def _build(folder: _Folder, weights: _Weights, options: NnunetOptions, device: str) -> Any:
    """nnU-Net's predictor with the folder's network and weights, strictly loaded."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        place = torch.device(device)
    except RuntimeError as fault:
        raise UsageError(f"There is no device {device!r}; write cpu, cuda, cuda:1 or mps.") from fault
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"The device {device} is not there; use --device cpu.")
    benchmark = torch.backends.cudnn.benchmark
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plans = PlansManager(folder.plans)
            configuration = plans.get_configuration(weights.configuration)
            if configuration.previous_stage_name is not None:
                raise ModelError(
                    f"The nnU-Net in {folder.path} is the second stage of a cascade ({weights.configuration}); give the folder of "
                    "3d_fullres or 3d_lowres instead."
                )
            network = _network(folder, weights, plans, configuration)
            _fit(network, folder, weights)
            predictor = nnUNetPredictor(
                tile_step_size=options.step,
                use_mirroring=options.tta if options.tta is not None else place.type != "cpu",
                perform_everything_on_device=place.type == "cuda",
                device=place,
                allow_tqdm=False,
            )
            predictor.manual_initialization(
                network, plans, configuration, weights.parameters, folder.dataset, weights.trainer, weights.mirroring
            )
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ImportError) as fault:
            reason = " ".join(str(fault).split())[:300].rstrip(".")
            raise ModelError(
                f"plans.json and dataset.json in {folder.path} do not describe a network that nnU-Net can make "
                f"({type(fault).__name__}: {reason})."
            ) from fault
        finally:
            torch.backends.cudnn.benchmark = benchmark  # the predictor sets it; results would then depend on what was timed fastest
    return predictor


def _network(folder: _Folder, weights: _Weights, plans: Any, configuration: Any) -> Any:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    architecture = configuration.network_arch_init_kwargs
    needed = configuration.network_arch_init_kwargs_req_import
    named = [configuration.network_arch_class_name, *(architecture[key] for key in needed if architecture[key] is not None)]
    foreign = [name for name in named if not str(name).startswith(OWN_PACKAGES)]
    if foreign:
        raise ModelError(
            f"plans.json in {folder.path} builds its network from {foreign[0]}; only torch.nn and dynamic_network_architectures are used, "
            "so that a model folder cannot name code to run."
        )
    return get_network_from_plans(
        configuration.network_arch_class_name,
        architecture,
        needed,
        determine_num_input_channels(plans, configuration, folder.dataset),
        plans.get_label_manager(folder.dataset).num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )


def _fit(network: Any, folder: _Folder, weights: _Weights) -> None:
    """Every fold's weights fit the network, name by name and shape by shape; WeightsError says which does not."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for (fold, path), parameters in zip(folder.checkpoints.items(), weights.parameters, strict=True):
        found = {name: tuple(value.shape) for name, value in parameters.items()}
        if found != expected:
            wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            raise WeightsError(
                f"The weights of fold {fold} ({path}, trainer {weights.trainer}) do not fit the network that plans.json describes: "
                f"{len(wrong)} entries are missing, unexpected or of another shape, first {wrong[0]}. Copy plans.json, dataset.json and "
                "checkpoint from one training; a trainer that builds a network of its own cannot be used."
            )
    network.load_state_dict(weights.parameters[0], strict=True)


_OUTPUT = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Any:
    """nnU-Net prints while it is built."""
    with _OUTPUT, contextlib.redirect_stdout(io.StringIO()):
        yield
