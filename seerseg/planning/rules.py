"""The rules: from a fingerprint to every value of the mathematics, from a machine to how they are computed.

`mathematics` never sees the machine. `computing` may only choose how a given effective batch is cut up, in which precision
weights are held, and how many workers read: never a batch, a group, a budget or a view.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seerseg.planning.fingerprint import ChannelSummary, Fingerprint
from seerseg.planning.hardware import Hardware
from seerseg.views import PLANES, SEER_VIEWS, Plane

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "soft_tissue": (40.0, 400.0),
    "lung": (-600.0, 1500.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "liver": (60.0, 160.0),
    "wide": (0.0, 2000.0),
}
_PURPOSES = {
    "lung": r"lung|pulmon|airway|bronch|trachea|emphysema|covid|pneumo",
    "bone": r"bone|vertebra|spine|rib|sternum|clavic|scapula|humer|femur|hip\b|pelvi|sacrum|skull|cranium|fractur|mandib|tooth|teeth",
    "brain": r"brain|cerebr|cerebell|hippocamp|thalam|haemorrh|hemorrh|stroke|gliom",
    "liver": r"liver|hepat",
}
STYLES = (
    "clinical_request",
    "abbr_or_short",
    "messy_or_misspelled",
    "verbose_request",
    "report_style",
    "formal_task",
    "ambiguous_abbreviation",
)  # SEER's, without that for what lies outside the scan
PIXELS_PER_TOKEN = 32  # patch 16 times merge 2 of Qwen3-VL
ANISOTROPY = 1.5
_TRAIN_SHARE = 0.56  # seven of the ten parts of the eighty per cent that are not test subjects


REQUEST_STYLES = (
    "label_prompt", "clinical_request", "abbr_or_short", "messy_or_misspelled", "verbose_request", "report_style", "formal_task",
    "ambiguous_abbreviation", "implicit", "relational", "negated", "mixed_case", "keyboard_slips", "speech_to_text", "chat", "order_form",
)  # fmt: skip
"""Styles of a paraphrase set, in order; `seerseg_data.requests` writes them."""


SKILL_SHARES = {"sft.skills_share": 0.5, "sft.skills_right": 0.6, "sft.skills_wrong": 0.1}
"""How skills of a bank are dealt out to training samples (`seerseg.training.lessons`)."""


@dataclass(frozen=True)
class Planned:
    """One value: what applies, what the rule chose (they differ where a person edited plans.json), the rule and its inputs."""

    value: Any
    rule: str
    inputs: dict[str, Any]
    planned: Any

    @property
    def edited(self) -> bool:
        """A person chose another value than the rule."""
        return bool(self.value != self.planned)


@dataclass
class _Sheet:
    """Collects values; an edit takes the place of what the rule chose, also for the rules that follow."""

    edits: Mapping[str, Any]
    values: dict[str, Planned] = field(default_factory=dict)

    def put(self, name: str, planned: Any, rule: str, **inputs: Any) -> Any:
        value = self.edits.get(name, planned)
        self.values[name] = Planned(value, rule, inputs, planned)
        return value


def mathematics(fingerprint: Fingerprint, edits: Mapping[str, Any]) -> dict[str, Planned]:
    """Every value that results depend on, in the order in which they follow from one another."""
    sheet = _Sheet(edits)
    for number, channel in enumerate(fingerprint.channels):
        _channel(sheet, number, channel, tuple(fingerprint.targets))
    _views(sheet, fingerprint)
    _tokens(sheet, fingerprint)
    layout = store_layout(sheet.values["views.plane"].value)
    rule = "the array axis that runs through the viewed slices (0 z, 1 y, 2 x)"
    sheet.put("store.axis", layout["axis"], rule, plane=sheet.values["views.plane"].value)
    sheet.put("store.slab", layout["slab"], "slices per chunk: one slice costs one slab, a patch few chunks")
    sheet.put("store.chunk_bytes", layout["chunk_bytes"], "a chunk decoded stays in the L2 cache")
    _training(sheet, fingerprint)
    tolerances, inputs = nsd_tolerances_mm(fingerprint)
    rule = "4 % of the diameter of a ball of the median volume, at least 1 mm and one in-plane voxel, at most 5 mm, in steps of 0.5"
    sheet.put("evaluation.nsd_tolerance_mm", tolerances, rule, **inputs)
    return sheet.values


def store_layout(plane: Plane) -> dict[str, int]:
    """The arguments of `seerseg.store.StoreLayout` for scans viewed in this plane."""
    return {"axis": PLANES.index(plane), "slab": 2, "chunk_bytes": 1 << 17}


def _channel(sheet: _Sheet, number: int, channel: ChannelSummary, targets: Sequence[str]) -> None:
    prefix = f"channel.{number}"
    modality = sheet.put(f"{prefix}.modality", channel.modality, "from the channel's name in dataset.json", named=channel.name)
    low, high = (channel.levels[level].median for level in ("min", "max"))
    faulty = sum(channel.hu_faults.values())
    cases = sum(channel.dtypes.values())
    rule = "yes for CT, unless more than 5 % of the cases have values that cannot be Hounsfield units"
    inputs = {"implausible": f"{faulty} of {cases} cases", "median_lowest": low, "median_highest": high}
    hounsfield = sheet.put(f"{prefix}.hounsfield", modality == "CT" and faulty <= 0.05 * cases, rule, **inputs)
    windows: dict[str, Any] = {name: list(window) for name, window in CT_WINDOWS.items()} if hounsfield else {"default": "volume"}
    rule = "fixed (centre, width) by purpose for CT in Hounsfield units, else the volume's own 0.5 to 99.5 percentile"
    windows = sheet.put(f"{prefix}.windows", windows, rule, hounsfield=hounsfield)
    purposes = sorted({purpose_of(target) for target in targets})
    purpose = "default" if not hounsfield else purposes[0] if len(purposes) == 1 else "wide"
    rule = "in Hounsfield units the window of the targets' one purpose, wide where they have several; else percentiles"
    inputs = {"purposes": purposes} if hounsfield else {"hounsfield": False}
    sheet.put(f"{prefix}.window", windows.get(purpose, windows.get("default", "volume")), rule, **inputs)


def purpose_of(target: str) -> str:
    """Which CT window shows a target, by the words of its name."""
    name = target.replace("_", " ")
    return next((purpose for purpose, words in _PURPOSES.items() if re.search(rf"\b(?:{words})", name, re.IGNORECASE)), "soft_tissue")


def viewing_plane(spacing_zyx: Sequence[float]) -> Plane:
    """The plane across the coarsest axis where that is at least 1.5 times coarser than both others, else axial."""
    coarsest = max(range(3), key=lambda axis: spacing_zyx[axis])
    others = max(spacing_zyx[axis] for axis in range(3) if axis != coarsest)
    return PLANES[coarsest] if spacing_zyx[coarsest] >= ANISOTROPY * others else PLANES[0]


def _views(sheet: _Sheet, fingerprint: Fingerprint) -> None:
    spacing = [s.median for s in fingerprint.spacing_zyx]
    sheet.put("views.channel", 0, "the first channel is shown", channels=len(fingerprint.channels))
    rule = f"axial, unless another axis is {ANISOTROPY:g} times coarser than both others: then the plane of finest resolution"
    plane = sheet.put("views.plane", viewing_plane(spacing), rule, median_spacing_zyx_mm=spacing)
    axis = PLANES.index(plane)
    lo = sheet.put("views.lo", SEER_VIEWS.lo, "as SEER: the first tenth of the axis is left out")
    hi = sheet.put("views.hi", SEER_VIEWS.hi, "as SEER: the last tenth of the axis is left out")
    fewest = int(fingerprint.shape_zyx[axis].min)
    there = round(hi * (fewest - 1)) - round(lo * (fewest - 1)) + 1
    rule = f"SEER's {SEER_VIEWS.count} evenly spaced slices, never more than the smallest case has in range"
    sheet.put("views.count", max(1, min(SEER_VIEWS.count, there)), rule, slices_in_range=there, smallest_case=fewest)
    plane_axes = [a for a in range(3) if a != axis]
    finest = min(spacing[a] for a in plane_axes)
    extent = max(fingerprint.shape_zyx[a].p95 * spacing[a] / finest for a in plane_axes)
    size = min(SEER_VIEWS.size_px, max(224, PIXELS_PER_TOKEN * math.ceil(4 * extent / PIXELS_PER_TOKEN)))
    rule = f"SEER's {SEER_VIEWS.size_px}; less for small crops: four pixels per voxel of the longer side, at least 224, a multiple of 32"
    sheet.put("views.size_px", size, rule, longer_side_p95_voxels=round(extent, 1))
    shown = sheet.values.get(f"channel.{sheet.values['views.channel'].value}.window")
    sheet.put("views.window", shown.value if shown else "volume", "the window of the channel that is shown")
    sheet.put("views.gamma", 1.0, "no further curve after windowing")


def _tokens(sheet: _Sheet, fingerprint: Fingerprint) -> None:
    size, count = sheet.values["views.size_px"].value, sheet.values["views.count"].value
    rule = "one token per square of 32 px (patch 16, merged 2 by 2, as Qwen3-VL has it)"
    per_slice = sheet.put("tokens.per_slice", math.ceil(size / PIXELS_PER_TOKEN) ** 2, rule, size_px=size)
    images = sheet.put("tokens.images", per_slice * count, "tokens per slice times slices", slices=count)
    chars = fingerprint.requests.chars.max if fingerprint.requests.chars else 192.0
    names = sum(len(name) + 2 for name in fingerprint.targets)
    rule = "256 for the instruction; longest request and all target names at 3 characters a token (misspelt words cost more)"
    prompt = sheet.put(
        "tokens.prompt", 256 + math.ceil(chars / 3) + math.ceil(names / 3), rule, longest_request_chars=int(chars), name_chars=names
    )
    skills = sheet.put("tokens.skills", 256, "SEER's three skills of about 80 tokens")
    completion = sheet.put("tokens.completion", 256, "as SEER")
    total = images + prompt + skills + completion
    rule = "images + prompt + skills + completion, rounded up to a multiple of 64"
    sheet.put("tokens.budget", 64 * math.ceil(total / 64), rule, sum=total)


def _training(sheet: _Sheet, fingerprint: Fingerprint) -> None:
    requests = fingerprint.requests
    known = requests.count - requests.unknown_truth
    pairs = round(_TRAIN_SHARE * (known or fingerprint.labelled * len(fingerprint.targets)))
    origin = "requests with a known target" if known else "label prompts, as there are no requests"
    rank = 16 if pairs < 1000 else 32 if pairs <= 10_000 else 64
    rank = sheet.put("lora.rank", rank, "16 below 1000 training pairs, 32 up to 10000, then 64", pairs=pairs, of=origin)
    sheet.put("lora.alpha", 2 * rank, "twice the rank", rank=rank)
    sheet.put("lora.vision", "frozen" if pairs < 5000 else "trained", "the vision tower is frozen below 5000 training pairs", pairs=pairs)
    sheet.put(
        "sft.batch", 8 if pairs < 1000 else 16, "8 below 1000 training pairs, else 16: at least a hundred updates an epoch", pairs=pairs
    )
    styles = [style for style in requests.styles if style != "label_prompt"]
    count = 4 if requests.set_size is None else max(1, min(4, int(requests.set_size.median)))
    rule = "4 wordings of one target are judged together; fewer where paraphrase sets are smaller"
    typical = requests.set_size.median if requests.set_size else None
    count = sheet.put("paraphrases.count", count, rule, median_set=typical)
    chosen = (styles + [s for s in STYLES if s not in styles])[:count]
    rule = "the commonest styles of the requests, then SEER's; fixed, so that every set is alike"
    sheet.put("paraphrases.styles", chosen, rule, styles_found=len(styles))
    samples = sheet.put(
        "grpo.samples", 2 if count > 1 else 8, "replies per wording: 2, or 8 where there is but one wording", wordings=count
    )
    group = sheet.put("grpo.group", count * samples, "wordings times replies: one advantage group", wordings=count, replies=samples)
    sets = sheet.put("grpo.sets_per_update", 8, "paraphrase sets per update, kept by accumulation")
    sheet.put("grpo.batch", group * sets, "replies per update", group=group, sets=sets)
    sheet.put("grpo.lambda", 0.5, "weight of the variance; above 0.5 lowering a good Dice could pay")
    _optimisation(sheet, pairs)
    _language(sheet)
    learners = max(1, round(_TRAIN_SHARE * fingerprint.cases))
    cap = min(64, max(8, round(math.sqrt(learners))))
    sheet.put("bank.max_skills", cap, "root of the number of training cases, from 8 to 64", training_cases=learners)


def _language(sheet: _Sheet) -> None:
    """What seerseg_make_requests and seerseg_make_traces write, fixed so that "worst" means the same everywhere."""
    sheet.put("requests.per_target", len(REQUEST_STYLES), "one wording of each style, so that all paraphrase sets are alike")
    sheet.put("requests.styles", list(REQUEST_STYLES), "the label prompt, SEER's styles for targets that are there, and eight further ones")
    sheet.put(
        "traces.detail", "short", "a few words of evidence, which small reasoners can learn; full for those of 2B parameters and more"
    )


def _optimisation(sheet: _Sheet, pairs: int) -> None:
    """Rates, lengths and cadences; three rates a stage, as the plan does not know which reasoner will be trained."""
    sheet.put("training.seed", 12345, "one seed for order, initialisation and sampling; fold and stage are told apart by their data")
    sheet.put("training.weight_decay", 0.0, "none: adapters start at zero and a fine-tuned model should stay near its base")
    sheet.put("training.max_grad_norm", 1.0, "gradients are clipped to this norm")
    sheet.put("lora.from_parameters", 500_000_000, "reasoners of at least so many parameters get adapters, smaller ones are trained whole")
    sheet.put("lora.targets", "all-linear", "every linear layer of the language model; those of the vision tower where lora.vision says so")
    epochs = sheet.put("sft.epochs", 3 if pairs < 1000 else 2 if pairs <= 10_000 else 1, "3 passes below 1000 training pairs, 2 up to "
                       "10000, then 1", pairs=pairs)  # fmt: skip
    sheet.put("sft.warmup", 0.05, "share of the updates over which the rate rises; then it falls as a cosine")
    sheet.put("sft.evaluations", max(4, 3 * epochs), "validations over the whole run, evenly spread: 3 an epoch, at least 4", epochs=epochs)
    reasons = (
        "share of the samples that are shown skills, where a bank is given: a request may find none, so both are learnt",
        "of those, the share with a skill that leads to the answer; a round of evolution keeps what is right more often than not",
        "of those, the share with one that fits the words and leads elsewhere, to be ignored; the rest are shown what does not fit",
    )
    for (name, share), reason in zip(SKILL_SHARES.items(), reasons, strict=True):
        sheet.put(name, share, reason)
    sheet.put("grpo.epochs", 4 if pairs < 1000 else 2 if pairs <= 10_000 else 1, "4 passes over the paraphrase sets below 1000 training "
              "pairs, 2 up to 10000, then 1", pairs=pairs)  # fmt: skip
    sheet.put("grpo.warmup", 0.05, "as for SFT; then the rate stays")
    sheet.put("grpo.evaluations", 10, "validations over the whole run, evenly spread")
    sheet.put("grpo.beta", 0.01, "weight of the divergence from the model that GRPO began with")
    sheet.put("grpo.temperature", 1.0, "replies are drawn as the model gives them: the gradient is of that policy")
    rates = {"lora": (1e-4, 1e-5), "full": (1e-5, 1e-6), "small": (3e-4, 1e-4)}
    meaning = {"lora": "adapters", "full": "whole models of 100 million parameters and more", "small": "whole models of fewer parameters"}
    for kind, (sft, grpo) in rates.items():
        sheet.put(f"sft.learning_rate_{kind}", sft, f"peak rate of {meaning[kind]}")
        sheet.put(f"grpo.learning_rate_{kind}", grpo, f"peak rate of {meaning[kind]}")
    sheet.put("validation.rows", 64, "validation samples whose loss is taken, evenly chosen: enough to rank checkpoints")
    sheet.put("validation.sets", 8, "validation paraphrase sets that are answered and drawn by the frozen segmenter")
    sheet.put("checkpoint.minutes", 15.0, "at most so much work is lost when a machine dies")


def nsd_tolerances_mm(fingerprint: Fingerprint) -> tuple[dict[str, float], dict[str, Any]]:
    """Tolerance in mm per target, and the inputs that the rule used."""
    spacing = [s.median for s in fingerprint.spacing_zyx]
    axis = PLANES.index(viewing_plane(spacing))
    voxel = max(spacing[a] for a in range(3) if a != axis)
    tolerances = {}
    for name, target in fingerprint.targets.items():
        diameter = (6 * target.volume_ml.median * 1000 / math.pi) ** (1 / 3) if target.volume_ml else 0.0
        wished = max(1.0, voxel, 0.04 * diameter)
        tolerances[name] = max(min(5.0, math.floor(2 * wished + 0.5) / 2), round(min(voxel, 5.0), 2))
    return tolerances, {
        "in_plane_voxel_mm": voxel,
        "median_ml": {n: t.volume_ml.median if t.volume_ml else None for n, t in fingerprint.targets.items()},
    }


PRESETS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("141G", 130, {"quantize": "none", "checkpointing": False, "sft": 8, "grpo": 16}),
    ("80G", 74, {"quantize": "none", "checkpointing": False, "sft": 4, "grpo": 8}),
    ("48G", 44, {"quantize": "none", "checkpointing": True, "sft": 2, "grpo": 4}),
    ("24G", 21, {"quantize": "4bit", "checkpointing": True, "sft": 1, "grpo": 2}),
    ("16G", 0, {"quantize": "4bit", "checkpointing": True, "sft": 1, "grpo": 1}),
    ("cpu", -1, {"quantize": "none", "checkpointing": False, "sft": 1, "grpo": 8}),
)


def computing(batches: Mapping[str, int], scale: Mapping[str, float], hardware: Hardware, edits: Mapping[str, Any]) -> dict[str, Planned]:
    """How the machine does it. batches: effective batch of "sft" and "grpo"; scale: cases, channels, p95 of voxels."""
    sheet = _Sheet(edits)
    workers, rule, inputs = plan_workers(hardware, int(scale["cases"]), float(scale["voxels_p95"]), int(scale["channels"]))
    sheet.put("workers.read", workers, rule, **inputs)
    queue = max(64 << 20, int(0.1 * hardware.ram_bytes))
    sheet.put("queue.bytes", queue, "a tenth of the memory may wait between stages", ram_gb=round(hardware.ram_bytes / 1e9, 1))
    gigabytes = min((gpu.memory_bytes for gpu in hardware.gpus), default=-1) / 2**30 if hardware.gpus else -1.0
    fitting = next(name for name, least, _ in PRESETS if gigabytes >= least)
    rule = "by the memory of the smallest GPU; changes precision, checkpointing and accumulation only"
    name = sheet.put("device.preset", fitting, rule, gpus=[gpu.name for gpu in hardware.gpus], gpu_gib=round(max(gigabytes, 0), 1))
    preset = next((settings for known, _, settings in PRESETS if known == name), PRESETS[-1][2])
    capability = min((gpu.compute_capability for gpu in hardware.gpus), default=(0, 0))
    precision = "float32" if name == "cpu" else "bfloat16" if capability >= (8, 0) else "float16"
    rule = "bfloat16 from compute capability 8.0, below float16 with loss scaling, float32 without a GPU"
    sheet.put("device.precision", precision, rule, compute_capability=".".join(map(str, capability)))
    sheet.put("device.quantize", preset["quantize"], "frozen base weights in 4 bit where a GPU has less than 44 GiB", preset=name)
    sheet.put(
        "device.checkpointing", preset["checkpointing"], "activations are computed again where a GPU has less than 74 GiB", preset=name
    )
    together = math.gcd(batches["sft"], batches["grpo"])
    gpus = max(n for n in range(1, max(1, len(hardware.gpus)) + 1) if together % n == 0)
    gpus = sheet.put("device.gpus", gpus, "as many as divide both effective batches", found=len(hardware.gpus))
    for stage, batch in batches.items():
        share = max(1, batch // gpus)
        largest = max(n for n in range(1, min(preset[stage], share) + 1) if share % n == 0)
        micro = sheet.put(f"{stage}.micro_batch", largest, "what fits at once, dividing the batch", preset=name, batch=batch, gpus=gpus)
        steps = max(1, batch // (gpus * micro))
        sheet.put(f"{stage}.accumulation", steps, "effective batch / (GPUs x micro batch): the batch never changes", batch=batch)
    return sheet.values


def plan_workers(hardware: Hardware, cases: int, voxels_p95: float, channels: int) -> tuple[int, str, dict[str, Any]]:
    """Processes that decode cases side by side: (number, rule, inputs)."""
    per_worker = 150e6 + 12 * voxels_p95 * channels
    by_memory = max(1, int(0.5 * hardware.ram_bytes / per_worker))
    by_work = max(1, math.ceil(cases * voxels_p95 * channels / 5e6))
    rule = "the least of: CPUs, half the memory at 12 bytes a voxel, one per 5 million voxels of work, 8"
    inputs = {"cpus": hardware.cpus, "from": hardware.cpus_from, "by_memory": by_memory, "by_work": by_work}
    return min(hardware.cpus, by_memory, by_work, 8), rule, inputs
