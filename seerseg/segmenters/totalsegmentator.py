"""`totalsegmentator`: TotalSegmentator's tasks behind the seam, through its Python API (written against version 2.18).

`totalsegmentator`, `totalsegmentator:TASK` or `totalsegmentator:TASK?name=value`, with fast (3 mm), fastest (6 mm), robust (surer
cropping) and subset, each on or off. Without a task it is `total`, for CT; for MR name `total_mr`. The classes are its own map, under our
names.

In `total` and `total_mr` each request is a run with its `roi_subset`, which crops around it, so that a mask does not depend on what else
was asked for; where many structures of one scan are wanted, `subset=off` draws all of them in one, longer, run.

It is told to send no usage statistics. Tasks that need a licence of their own are refused unless it is accepted; the package then asks
for its number. Offline, weights that are not in its folder
(TOTALSEG_WEIGHTS_PATH, else TOTALSEG_HOME_DIR or ~/.totalsegmentator) are a WeightsError, never downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seerseg.errors import MissingExtraError, ModelError, SegmenterError, UsageError, WeightsError, did_you_mean
from seerseg.segmenters.base import ModelCard, check_licence
from seerseg.segmenters.closed import ClassNames, ClosedSegmenter, LabelMap, split_source, switch
from seerseg.volume import Volume
from seerseg.volume.resampling import resample

DEFAULT_TASK = "total"
LICENCE = "a licence of their own (not commercial, by number: see the package's README and totalseg_set_license)"
INSTALL = (
    'pip install "seerseg[totalsegmentator]" && pip install --no-deps TotalSegmentator nnunetv2 dynamic-network-architectures acvl-utils '
    "batchgenerators batchgeneratorsv2"
)
SUBSET_TASKS = ("total", "total_mr")
"""Tasks that draw no more than what is asked for (`roi_subset`), in a crop around it that a rough model finds."""
_REVISION = 1
_LUNG = "lung_{}_lobe_{}"
_UNIONS: dict[str, tuple[str, ...]] = {
    "left lung": tuple(_LUNG.format(part, "left") for part in ("upper", "lower")),
    "right lung": tuple(_LUNG.format(part, "right") for part in ("upper", "middle", "lower")),
    "left ribs": tuple(f"rib_left_{n}" for n in range(1, 13)),
    "right ribs": tuple(f"rib_right_{n}" for n in range(1, 13)),
    "ribs": tuple(f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)),
    "cervical spine": tuple(f"vertebrae_C{n}" for n in range(1, 8)),
    "thoracic spine": tuple(f"vertebrae_T{n}" for n in range(1, 13)),
    "lumbar spine": tuple(f"vertebrae_L{n}" for n in range(1, 6)),
}
"""Structures that TotalSegmentator has in parts."""


@dataclass(frozen=True)
class TotalSegmentatorOptions:
    """fast: 3 mm models; fastest: 6 mm; robust: crop with the 3 mm model instead of the 6 mm one; subset: a run for each request
    instead of one run for all classes."""

    fast: bool = False
    fastest: bool = False
    robust: bool = False
    subset: bool = True


@dataclass(frozen=True, eq=False)
class TotalSegmentatorApi:
    """What is used of the package. run: `python_api.totalsegmentator`; classes: task -> {value: class} (`map_to_binary.class_map`);
    licensed: tasks that need a licence (`commercial_models`); silence: turns usage statistics off; weights: model id -> folder of its
    weights; models: (task, options) -> ids of all models that it runs; version: of the package."""

    run: Callable[..., Any]
    classes: Mapping[str, Mapping[int, str]]
    licensed: frozenset[str]
    silence: Callable[[], None]
    weights: Callable[[int], Path]
    models: Callable[[str, TotalSegmentatorOptions], Sequence[int]]
    version: str

    @classmethod
    def installed(cls) -> TotalSegmentatorApi:
        """Of the installed package; MissingExtraError where there is none."""
        try:
            python_api, maps, config, libs, tasks = (
                importlib.import_module(f"totalsegmentator.{name}")
                for name in ("python_api", "map_to_binary", "config", "libs", "map_tasks_config")
            )
        except ImportError as fault:
            raise MissingExtraError(
                f"The segmenter totalsegmentator needs the package TotalSegmentator ({str(fault).rstrip('.')}). Install it with: {INSTALL}"
            ) from fault

        def silence() -> None:
            config.setup_totalseg()
            config.set_config_key("send_usage_stats", False)
            config.set_config_key("statistics_disclaimer_shown", True)

        def weights(model: int) -> Path:
            info = libs.TASK_ID_WEIGHTS_CONFIGS[model]
            return Path(config.get_weights_dir()) / (info.get("rel_path") or "") / info["foldername"]

        def models(task: str, options: TotalSegmentatorOptions) -> Sequence[int]:
            return _models(tasks.TASK_CONFIGS, task, options)

        from importlib.metadata import version

        return cls(
            run=python_api.totalsegmentator,
            classes=maps.class_map,
            licensed=frozenset(maps.commercial_models),
            silence=silence,
            weights=weights,
            models=models,
            version=version("TotalSegmentator"),
        )


def load(
    *, source: str | Path | None = None, device: str = "cpu", dtype: str | None = None, offline: bool = True, accept_license: bool = False
) -> TotalSegmentator:
    """The segmenter of a task. MissingExtraError without the package; UsageError for an unknown task, option or dtype; ModelError for a
    task whose licence is not accepted; WeightsError when offline and the weights are not here."""
    if dtype not in (None, "auto", "float32"):
        raise UsageError(f"TotalSegmentator chooses its own number format, so it cannot be run in {dtype}; leave the dtype out.")
    switches = dict.fromkeys(("fast", "fastest", "robust", "subset"), switch)
    task, given = split_source(str(source or DEFAULT_TASK), switches, "the segmenter totalsegmentator")
    options = TotalSegmentatorOptions(**given)
    api = TotalSegmentatorApi.installed()
    return TotalSegmentator(api, task or DEFAULT_TASK, options, device=device, offline=offline, accept_license=accept_license)


class TotalSegmentator(ClosedSegmenter):
    """One task of TotalSegmentator. `api`: the installed package's, or a stand-in of the same signatures."""

    def __init__(
        self,
        api: TotalSegmentatorApi,
        task: str = DEFAULT_TASK,
        options: TotalSegmentatorOptions | None = None,
        *,
        device: str = "cpu",
        offline: bool = True,
        accept_license: bool = False,
    ) -> None:
        chosen = options or TotalSegmentatorOptions()
        _check_task(api, task, chosen, accepted=accept_license)
        if offline:
            _check_weights(api, task, chosen)
        self._api, self.task, self.options = api, task, chosen
        self._device = _their_device(device)
        self._subset = task in SUBSET_TASKS and chosen.subset
        self._values = {name: (int(value),) for value, name in api.classes[task].items()}
        there = {name: parts for name, parts in _UNIONS.items() if set(parts) <= set(self._values)}
        modality = "MR" if task.endswith("_mr") or task == "brain_aneurysm" else "CT"
        facts = repr((_REVISION, api.version, task, chosen, sorted(self._values.items()), sorted(there)))
        card = ModelCard(
            name="totalsegmentator",
            identity=f"totalsegmentator-{hashlib.blake2b(facts.encode(), digest_size=12).hexdigest()}",
            code_licence="Apache-2.0",
            weights_licence=LICENCE if task in api.licensed else "Apache-2.0",
            source=f"TotalSegmentator {api.version}, task {task}",
            notes="Research use; usage statistics are turned off.",
        )
        super().__init__(ClassNames.of(self._values, unions=there), card, modalities=(modality,))

    def unfit(self, volumes: Sequence[Volume]) -> str | None:
        """One channel, and no single slice."""
        if len(volumes) != 1:
            return f"TotalSegmentator takes one channel and was given {len(volumes)}."
        if min(volumes[0].grid.shape_zyx) < 2:
            return "TotalSegmentator needs a volume, not a single slice."
        return None

    def group(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """The parts themselves, where the task has subsets; else all classes."""
        return tuple(sorted(parts, key=lambda name: self._values[name])) if self._subset else tuple(self._values)

    def draw(self, volumes: Sequence[Volume], group: tuple[str, ...]) -> LabelMap:
        """One run of the package."""
        import nibabel

        volume = volumes[0]
        subset = list(group) if self._subset else None
        array = np.nan_to_num(volume.array.astype(np.float32), nan=-1024.0, posinf=3e4, neginf=-1024.0)
        image = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), volume.grid.affine)
        arguments: dict[str, Any] = {
            "output": None,
            "ml": True,
            "task": self.task,
            "roi_subset_robust" if self.options.robust else "roi_subset": subset,
            "fast": self.options.fast,
            "fastest": self.options.fastest,
            "statistics": False,
            "radiomics": False,
            "preview": False,
            "quiet": True,
            "skip_saving": True,
            "nr_thr_saving": 1,
            "device": self._device,
        }
        return LabelMap(self._on_grid(self._run(image, arguments), volume), {name: self._values[name] for name in group})

    def _run(self, image: Any, arguments: dict[str, Any]) -> Any:
        """The package's answer, a nibabel image; its exits and faults as sentences."""
        with _silenced():
            self._api.silence()
            try:
                return self._api.run(image, **arguments)
            except SystemExit as fault:
                raise ModelError(
                    f"TotalSegmentator ended itself at the task {self.task} (exit code {fault.code}): a licence or weights are lacking; "
                    "run its own command once to see why."
                ) from fault
            except ImportError as fault:  # it imports most of what it needs when it is run
                raise MissingExtraError(
                    f"TotalSegmentator lacks what it needs to run ({str(fault).rstrip('.')}). Install it with: {INSTALL}"
                ) from fault
            except (MemoryError, RuntimeError) as fault:
                raise SegmenterError(
                    f"TotalSegmentator failed on this scan ({' '.join(str(fault).split())[:200].rstrip('.')}); where memory is short, try "
                    "?fast=on, fewer structures or --device cpu."
                ) from fault

    def _on_grid(self, made: Any, volume: Volume) -> np.ndarray[Any, Any]:
        """Label values (Z, Y, X) on the volume's own grid: as they are where grids agree, else moved by world position."""
        from seerseg.volume import Grid
        from seerseg.volume.orientation import canonical_grid, orientation_of, to_canonical

        stored = np.asanyarray(made.dataobj)
        if stored.ndim != 3:
            raise SegmenterError(f"TotalSegmentator answered with an image of shape {stored.shape}, not with a label map.")
        affine = np.asarray(made.affine, dtype=np.float64)
        turned = orientation_of(affine)
        grid: Grid = canonical_grid(tuple(stored.shape), affine, turned)
        labels = np.ascontiguousarray(to_canonical(stored, turned)).astype(np.uint16)
        if grid.shape_zyx == volume.grid.shape_zyx and grid.close_to(volume.grid):
            return labels
        return resample(labels, grid, volume.grid, order=0)


def _check_task(api: TotalSegmentatorApi, task: str, options: TotalSegmentatorOptions, *, accepted: bool) -> None:
    if task in api.licensed:
        check_licence(f"The weights of TotalSegmentator's task {task}", LICENCE, accepted=accepted)
    if task not in api.classes:
        listed = ", ".join(name for name in api.classes if name not in api.licensed)
        raise UsageError(f"TotalSegmentator has no task {task!r}.{did_you_mean(task, api.classes)} Its open tasks are: {listed}.")
    if options.fast and options.fastest:
        raise UsageError("TotalSegmentator runs fast (3 mm) or fastest (6 mm), not both; leave one out.")
    if options.robust and (task not in SUBSET_TASKS or not options.subset):
        raise UsageError(f"TotalSegmentator crops only the subsets of the tasks {' and '.join(SUBSET_TASKS)}; leave robust out.")


def _models(tasks: Mapping[str, Any], task: str, options: TotalSegmentatorOptions) -> list[int]:
    """Ids of the models that a task runs, those that find its crop among them, by the package's table of tasks (2.18)."""
    chosen = tasks[task]
    modes = chosen.get("sub_modes", {"default": chosen})
    mode = modes.get("fast" if options.fast else "fastest" if options.fastest else "default") or modes["default"]
    ids = list(mode["task_id"]) if isinstance(mode["task_id"], list) else [mode["task_id"]]
    crop = chosen.get("crop") or ()
    if task == "vertebrae_pp_refined":
        ids.append(305)
    if chosen.get("crop_model"):
        return [*ids, *_models(tasks, chosen["crop_model"], TotalSegmentatorOptions(subset=False))]
    if "body_trunc" in crop or "body_extremities" in crop:
        ids.append(300)
    elif crop or chosen.get("cascade") or (task in SUBSET_TASKS and options.subset):
        ids.append(852 if task.endswith("_mr") else 297 if options.robust or chosen.get("robust_crop") else 298)
    return ids


def _check_weights(api: TotalSegmentatorApi, task: str, options: TotalSegmentatorOptions) -> None:
    needed = list(api.models(task, options))
    lacking = [folder for folder in map(api.weights, needed) if not folder.is_dir()]
    if lacking:
        raise WeightsError(
            f"TotalSegmentator's weights for the task {task} are not here ({len(lacking)} of {len(needed)} folders, first {lacking[0]}) "
            "and nothing is downloaded offline; run totalseg_download_weights on a machine with internet and copy the folder."
        )


def _their_device(device: str) -> str:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise UsageError(f"There is no device {device!r}; write cpu, cuda, cuda:1 or mps.")
    return kind if kind != "cuda" else f"gpu:{number}" if number else "gpu"


_OUTPUT = threading.Lock()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """It prints, also when told to be quiet."""
    with _OUTPUT, contextlib.redirect_stdout(io.StringIO()):
        yield
