"""plans.json: every planned value with its rule and inputs, readable and editable.

A person edits a "value"; "planned" beside it keeps what the rule chose. Planning again keeps edits, and lets the values that
depend on them follow. The part "mathematics" decides results; the part "computing" is how one machine does it, and is made
anew for another machine by `Plans.on`.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seerseg.errors import PlanError, did_you_mean
from seerseg.paths import read_json, write_json
from seerseg.planning.fingerprint import Fingerprint, HeaderScan
from seerseg.planning.hardware import Gpu, Hardware
from seerseg.planning.rules import PRESETS, SKILL_SHARES, Planned, computing, mathematics, store_layout, viewing_plane
from seerseg.views import PLANES, ViewSpec

PLANS_SCHEMA = 1
DEFAULT_PLANS = "plans"
_STAGES = ("sft", "grpo")
_SHOWN = 8
_LAYOUT = ("axis", "slab", "chunk_bytes")


@dataclass(frozen=True, eq=False)
class Plans:
    """What planning chose for one dataset. scale: "cases", "channels", "voxels_p95" of the dataset; machine: where
    `computing` was planned."""

    name: str
    dataset: str
    mathematics: dict[str, Planned]
    computing: dict[str, Planned]
    scale: dict[str, float]
    machine: Hardware

    @property
    def values(self) -> dict[str, Planned]:
        """Both parts."""
        return {**self.mathematics, **self.computing}

    def value(self, name: str) -> Any:
        """One value; PlanError with the nearest names when there is none of this name."""
        values = self.values
        if name not in values and name in SKILL_SHARES:
            return SKILL_SHARES[name]  # plans that were made before there were such values stay as they are
        if name not in values:
            raise PlanError(f"The plans {self.name!r} of {self.dataset} hold no value {name!r}.{did_you_mean(name, values)}")
        return values[name].value

    @property
    def identity(self) -> str:
        """Hex digest of the mathematics: equal plans, edits included, give equal results on any machine."""
        values = {name: planned.value for name, planned in self.mathematics.items()}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()

    def view_spec(self) -> ViewSpec:
        """The views that the reasoner sees."""
        names = ("plane", "count", "size_px", "lo", "hi", "window", "gamma")
        return ViewSpec.from_json({name: self.value(f"views.{name}") for name in names})

    @property
    def store_layout(self) -> dict[str, int]:
        """The arguments of `seerseg.store.StoreLayout`."""
        return {name: int(self.value(f"store.{name}")) for name in _LAYOUT}

    def on(self, machine: Hardware) -> Plans:
        """The same mathematics computed on another machine; edits of the part computing stay."""
        edits = {name: planned.value for name, planned in self.computing.items() if planned.edited}
        batches = {stage: int(self.value(f"{stage}.batch")) for stage in _STAGES}
        return Plans(self.name, self.dataset, self.mathematics, computing(batches, self.scale, machine, edits), self.scale, machine)

    def edited(self, edits: Mapping[str, Any]) -> Plans:
        """These plans with other values, as a person would edit the file; what follows from them is not yet followed, see
        `make_plans(previous=...)`. PlanError for an unknown name or a value that is not allowed."""
        parts = {"mathematics": dict(self.mathematics), "computing": dict(self.computing)}
        for name, value in edits.items():
            self.value(name)
            allowed, meaning = _CHECKS[_general(name)]
            if not allowed(value):
                raise PlanError(f"{name} cannot be {json.dumps(value)[:80]}: it must be {meaning}.")
            part = next((p for p in parts.values() if name in p), parts["mathematics"])
            known = part.get(name) or Planned(value, "", {}, self.value(name))
            part[name] = replace(known, value=value)
        return replace(self, mathematics=parts["mathematics"], computing=parts["computing"])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready (`plans.json`)."""
        return {
            "schema": PLANS_SCHEMA,
            "name": self.name,
            "dataset": self.dataset,
            "scale": self.scale,
            "machine": self.machine.to_json(),
            "mathematics": {name: _planned_to_json(planned) for name, planned in self.mathematics.items()},
            "computing": {name: _planned_to_json(planned) for name, planned in self.computing.items()},
        }

    def explain(self, width: int = 100) -> str:
        """A table for a terminal of `width` columns: name, value, and why: the rule and, in brackets, its inputs."""
        values = self.values
        first = max(len(name) for name in values) + 2
        second = min(26, max(12, (width - first) // 3))
        third = max(24, width - first - second)
        lines = [f"Plans {self.name!r} of {self.dataset}"]
        for title, part in (("Mathematics (what results depend on)", self.mathematics), ("Computing (this machine only)", self.computing)):
            lines += ["", title, "-" * width]
            group = ""
            for name, planned in part.items():
                lines += [""] if group and name.split(".")[0] != group else []
                group = name.split(".")[0]
                shown = _show(planned.value) + (f" (edited, the rule says {_show(planned.planned)})" if planned.edited else "")
                inputs = "; ".join(f"{key.replace('_', ' ')} {_show(value)}" for key, value in planned.inputs.items())
                why = textwrap.wrap(planned.rule, third - 1) + (textwrap.wrap(f"[{inputs}]", third - 1) if inputs else [])
                what = textwrap.wrap(shown, second - 2) or [""]
                for row in range(max(len(why), len(what))):
                    cells = [part_[row] if row < len(part_) else "" for part_ in ([name], what, why)]
                    lines.append(f"{cells[0]:<{first}}{cells[1]:<{second}}{cells[2]}".rstrip())
        return "\n".join(lines)


def make_plans(fingerprint: Fingerprint, hardware: Hardware, name: str = DEFAULT_PLANS, previous: Plans | None = None) -> Plans:
    """Plans by the rules; what a person edited in `previous` stays as it is, and the rules that follow take it up."""
    edits = {key: planned.value for key, planned in previous.values.items() if planned.edited} if previous else {}
    values = mathematics(fingerprint, edits)
    scale = {"cases": float(fingerprint.cases), "channels": float(len(fingerprint.channels)), "voxels_p95": fingerprint.voxels.p95}
    batches = {stage: int(values[f"{stage}.batch"].value) for stage in _STAGES}
    made = Plans(name, fingerprint.dataset, values, computing(batches, scale, hardware, edits), scale, hardware)
    _check_together(made, f"The plans {name!r}")
    return made


def layout_of(scan: HeaderScan, previous: Plans | None = None) -> dict[str, int]:
    """The store layout that plans will hold, known from headers alone, so that cases are stored while they are measured."""
    edits = {name: planned.value for name, planned in previous.values.items() if planned.edited} if previous else {}
    plane = edits.get("views.plane", viewing_plane(scan.spacing_zyx))
    return {name: int(edits.get(f"store.{name}", value)) for name, value in store_layout(plane).items()}


def save_plans(plans: Plans, folder: Path) -> Path:
    """Write `folder`/<name>.json and return its path."""
    path = Path(folder) / f"{plans.name}.json"
    write_json(path, plans.to_json())
    return path


def load_plans(path: Path, *, complete: bool = True) -> Plans:
    """Read a plans file; PlanError with one sentence when it is missing, damaged, or an edit is not allowed.

    complete=False: it is read for its edits only, so values may be missing or contradict those that are to follow from them.
    """
    value = read_json(path, PlanError, PLANS_SCHEMA)
    known = ("schema", "name", "dataset", "scale", "machine", "mathematics", "computing")
    for key in value:
        if key not in known:
            raise PlanError(f"{path} holds the unknown key {key!r}.{did_you_mean(key, known)} Take it out.")
    try:
        machine = dict(value["machine"])
        machine["gpus"] = tuple(Gpu(**{**g, "compute_capability": tuple(g["compute_capability"])}) for g in machine["gpus"])
        parts = {part: _read_part(value[part], f"{path}, {part},") for part in ("mathematics", "computing")}
        scale = {key: float(value["scale"][key]) for key in ("cases", "channels", "voxels_p95")}
        if not all(1 <= number < 1e15 for number in scale.values()):
            raise ValueError(f"scale {scale}")
        plans = Plans(str(value["name"]), str(value["dataset"]), parts["mathematics"], parts["computing"], scale, Hardware(**machine))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PlanError(f"{path} is damaged ({error!r}). Run seerseg_plan again.") from None
    if complete:
        _check_complete(plans, path)
        _check_together(plans, str(path))
    return plans


def _planned_to_json(planned: Planned) -> dict[str, Any]:
    return {"value": planned.value, "planned": planned.planned, "rule": planned.rule, "inputs": planned.inputs}


def _read_part(part: Mapping[str, Any], where: str) -> dict[str, Planned]:
    read = {}
    for name, entry in part.items():
        check = _check_for(name)
        if check is None:
            raise PlanError(f"{where} holds the unknown value {name!r}.{did_you_mean(name, _CHECKS)} Take it out or mend its name.")
        if not isinstance(entry, dict) or "value" not in entry:
            raise PlanError(f"{where} gives {name!r} without a 'value'. Mend it, or run seerseg_plan again.")
        allowed, meaning = check
        if not allowed(entry["value"]):
            raise PlanError(f"{where} gives {name!r} the value {json.dumps(entry['value'])[:80]}, which must be {meaning}.")
        read[name] = Planned(
            entry["value"], str(entry.get("rule", "")), dict(entry.get("inputs", {})), entry.get("planned", entry["value"])
        )
    return read


def _is_int(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low, f"a whole number from {low}"


def _is_float(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high, f"a number from {low:g} to {high:g}"


def _one_of(*words: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: any(type(v) is type(word) and v == word for word in words), "one of " + ", ".join(map(str, words))


def _is_window(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return value in ("slice", "volume") or (numbers and value[1] > 0)


def _all_in(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and bool(value) and all(check(item) for item in value.values())


_WINDOW = '"slice", "volume" or [centre, width]'
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "channel.N.modality": (lambda v: v is None or (isinstance(v, str) and v != ""), "a modality such as CT, or null"),
    "channel.N.hounsfield": _one_of(True, False),
    "channel.N.windows": (lambda v: _all_in(v, _is_window), f"names with {_WINDOW}"),
    "channel.N.window": (_is_window, _WINDOW),
    "views.channel": _is_int(0),
    "views.plane": _one_of(*PLANES),
    "views.lo": _is_float(0, 1),
    "views.hi": _is_float(0, 1),
    "views.count": _is_int(1),
    "views.size_px": _is_int(32),
    "views.window": (_is_window, _WINDOW),
    "views.gamma": _is_float(0.05, 20),
    **{f"tokens.{name}": _is_int(1) for name in ("per_slice", "images", "prompt", "skills", "completion", "budget")},
    "store.axis": _one_of(0, 1, 2),
    "store.slab": _is_int(1),
    "store.chunk_bytes": _is_int(1024),
    "lora.rank": _is_int(1),
    "lora.alpha": _is_int(1),
    "lora.vision": _one_of("frozen", "trained"),
    "lora.from_parameters": _is_int(0),
    "lora.targets": (lambda v: isinstance(v, str) and bool(v), "all-linear, or names of layers divided by commas"),
    "sft.batch": _is_int(1),
    "training.seed": _is_int(0),
    "training.weight_decay": _is_float(0, 1),
    "training.max_grad_norm": _is_float(0.001, 1000),
    **{
        f"{stage}.{name}": _is_float(0, 1)
        for stage in _STAGES
        for name in ("learning_rate_lora", "learning_rate_full", "learning_rate_small")
    },
    **{f"{stage}.warmup": _is_float(0, 1) for stage in _STAGES},
    **{f"{stage}.epochs": _is_float(0.001, 10_000) for stage in _STAGES},
    **{f"{stage}.evaluations": _is_int(0) for stage in _STAGES},
    **{name: _is_float(0, 1) for name in SKILL_SHARES},
    "grpo.beta": _is_float(0, 10),
    "grpo.temperature": _is_float(0.01, 10),
    "validation.rows": _is_int(0),
    "validation.sets": _is_int(0),
    "checkpoint.minutes": _is_float(0, 100_000),
    "requests.per_target": _is_int(1),
    "requests.styles": (lambda v: isinstance(v, list) and bool(v) and all(isinstance(s, str) for s in v), "a list of styles"),
    "traces.detail": _one_of("short", "full"),
    "paraphrases.count": _is_int(1),
    "paraphrases.styles": (lambda v: isinstance(v, list) and all(isinstance(s, str) for s in v), "a list of styles"),
    **{f"grpo.{name}": _is_int(1) for name in ("samples", "group", "sets_per_update", "batch")},
    "grpo.lambda": _is_float(0, 0.5),
    "bank.max_skills": _is_int(0),
    "evaluation.nsd_tolerance_mm": (lambda v: v == {} or _all_in(v, _is_float(0.01, 100)[0]), "target names with millimetres above 0"),
    "workers.read": _is_int(1),
    "queue.bytes": _is_int(1),
    "device.preset": _one_of(*(name for name, _, _ in PRESETS)),
    "device.precision": _one_of("float32", "bfloat16", "float16"),
    "device.quantize": _one_of("none", "4bit"),
    "device.checkpointing": _one_of(True, False),
    "device.gpus": _is_int(1),
    **{f"{stage}.{name}": _is_int(1) for stage in _STAGES for name in ("micro_batch", "accumulation")},
}


def _check_for(name: str) -> tuple[Callable[[Any], bool], str] | None:
    return _CHECKS.get(_general(name))


def _general(name: str) -> str:
    return re.sub(r"^channel\.\d+\.", "channel.N.", name)


def _check_complete(plans: Plans, path: Path) -> None:
    wanted = [name for name in _CHECKS if not name.startswith("channel.") and name not in SKILL_SHARES]
    wanted += [
        name.replace(".N.", f".{c}.") for name in _CHECKS if name.startswith("channel.") for c in range(int(plans.scale["channels"]))
    ]
    missing = [name for name in wanted if name not in plans.values]
    if missing:
        raise PlanError(f"{path} lacks {missing[0]!r}. Run seerseg_plan again; it keeps what you edited.")


def _check_together(plans: Plans, where: str) -> None:
    """PlanError when values that follow from one another contradict each other."""
    value = plans.value
    together = [("grpo.group", value("paraphrases.count") * value("grpo.samples"), "paraphrases.count times grpo.samples")]
    together.append(("grpo.batch", value("grpo.group") * value("grpo.sets_per_update"), "grpo.group times grpo.sets_per_update"))
    for stage in _STAGES:
        product = value("device.gpus") * value(f"{stage}.micro_batch") * value(f"{stage}.accumulation")
        together.append((f"{stage}.batch", product, f"device.gpus times {stage}.micro_batch times {stage}.accumulation"))
    for name, product, meaning in together:
        if value(name) != product:
            raise PlanError(
                f"{where}: {name} is {value(name)}, but {meaning} is {product}. "
                "Edit both, or edit one and run seerseg_plan, which lets the others follow."
            )
    if value("views.lo") > value("views.hi"):
        raise PlanError(f"{where}: views.lo is {value('views.lo')}, above views.hi {value('views.hi')}. Exchange them.")
    if value("views.channel") >= plans.scale["channels"]:
        raise PlanError(f"{where}: views.channel is {value('views.channel')}, but the dataset has {plans.scale['channels']:g} channel(s).")


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        shown = [f"{key}: {_show(item)}" for key, item in list(value.items())[:_SHOWN]]
        return ", ".join(shown) + (f", ... ({len(value)} in all, see the file)" if len(value) > _SHOWN else "") or "none"
    if isinstance(value, list | tuple):
        return ("/".join if len(value) == 2 and all(isinstance(v, int | float) for v in value) else ", ".join)(map(_show, value)) or "none"
    return str(value)
