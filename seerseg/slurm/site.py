"""What a cluster is like, said once in a small file: partition, account, memory, time, container.

TOML or JSON, named by the environment variable `seerseg_site` or by --site. A table named after a command ([train]) holds what is
other for that command; --slurm_set NAME=VALUE is other for one submission.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seerseg.errors import UsageError, did_you_mean

SITE_VARIABLE = "seerseg_site"
COMMANDS = ("plan_and_preprocess", "preprocess", "make_traces", "train", "evolve", "predict", "evaluate")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_UNITS_S = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}


@dataclass(frozen=True)
class Site:
    """One job's demands. An empty text or 0 leaves a line out, so that the cluster's own default holds.

    time: as Slurm writes it ("2:00:00", "1-12:00:00"); memory, gpus: per node; cpus: per process; gpu_option: how GPUs are asked for,
    {gpus} being their number; nodes, processes: of one training (0 processes: one for each GPU); launcher: what starts them, "srun" or a
    line such as "torchrun --nproc_per_node {processes}"; at_once: parts that run side by side at most; warning_s: how long before the
    limit to stop in order; restarts: starts in a row that may bring nothing; container: an image, started by container_run; setup: shell
    lines before anything else; sbatch: further options of sbatch; jobs: where the folders of scripts, logs and markers are made.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    memory: str = ""
    cpus: int = 0
    gpus: int = 0
    gpu_option: str = "--gres=gpu:{gpus}"
    nodes: int = 1
    processes: int = 0
    launcher: str = "srun"
    at_once: int = 0
    warning_s: int = 180
    restarts: int = 2
    container: str = ""
    container_run: str = ""
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    jobs: str = "seerseg_jobs"

    @property
    def time_s(self) -> int | None:
        """The time limit in seconds, None where none is said."""
        return time_s(self.time) if self.time else None


def load_site(path: str | Path | None, command: str, sets: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Site:
    """The site file (of the path, else of the variable, else none) for one command of COMMANDS, with NAME=VALUE texts over it.

    UsageError with one sentence for a file that is missing, no TOML or JSON, or holds a key or value that cannot be.
    """
    named = str(path) if path is not None else (os.environ if environ is None else environ).get(SITE_VARIABLE, "").strip()
    said: dict[str, Any] = {}
    source = "--slurm_set"
    if named:
        file = Path(named).expanduser()
        source = str(file)
        whole = _read(file)
        for key, value in whole.items():
            if isinstance(value, dict):
                if key not in COMMANDS:
                    raise UsageError(f"{file} has a table [{key}].{did_you_mean(key, COMMANDS)} Tables are: {', '.join(COMMANDS)}.")
                _check(value, f"{file}, [{key}]")
            else:
                _check({key: value}, source)
                said[key] = value
        said |= whole.get(command, {})
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--slurm_set {text!r} is no NAME=VALUE, as in --slurm_set time=4:00:00.")
        said[name.strip()] = _typed(name.strip(), value.strip())
        _check({name.strip(): said[name.strip()]}, "--slurm_set")
    merged: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    site = Site(**merged)
    if site.time_s is not None and site.warning_s >= site.time_s:
        raise UsageError(
            f"The warning of {site.warning_s} s leaves nothing of the time limit {site.time} ({source}). Raise time, or lower warning_s."
        )
    return site


def time_s(text: str) -> int:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        return int(days) * 86400 + sum(n * unit for n, unit in zip(parts, (3600, 60, 1), strict=False))
    return sum(n * unit for n, unit in zip(parts, _UNITS_S[len(parts)], strict=True))


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Cannot read the site file {file}: {error.strerror}. Name another with --site or {SITE_VARIABLE}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"The site file {file} is not UTF-8 text.") from None
    try:
        whole = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The site file {file} is no {'JSON' if file.suffix == '.json' else 'TOML'}: {error}.") from None
    if not isinstance(whole, dict):
        raise UsageError(f"The site file {file} must hold keys and values.")
    return whole


def _one_line(value: str) -> str:
    return "" if value.isprintable() else "must be one line of plain text"


def _time(value: str) -> str:
    if not value or (_TIME.fullmatch(value) and time_s(value) > 0):
        return ""
    return 'must be a time as Slurm writes it, such as "2:00:00" or "1-12:00:00"'


def _memory(value: str) -> str:
    return "" if not value or re.fullmatch(r"[1-9]\d*[KMGT]?", value) else 'must be a number with K, M, G or T, such as "32G"'


def _gpu_option(value: str) -> str:
    known = value.startswith("--") and "{gpus}" in value
    return "" if known else 'must be an option of sbatch with {gpus} in it, such as "--gres=gpu:{gpus}"'


_RULES: dict[str, Callable[[str], str]] = {"time": _time, "memory": _memory, "gpu_option": _gpu_option}
_LEAST = {"nodes": 1}


def _check(said: Mapping[str, Any], where: str) -> None:
    """UsageError for a key that is none or a value that cannot be."""
    kinds = {field.name: field.type for field in fields(Site)}
    for key, value in said.items():
        if key not in kinds:
            raise UsageError(f"{where}: {key!r} is nothing that a site can say.{did_you_mean(key, kinds)} Known: {', '.join(kinds)}.")
        kind, wrong = kinds[key], ""
        if kind == "int":
            least = _LEAST.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                wrong = f"must be a whole number from {least} up"
        elif kind == "str":
            wrong = (_one_line(value) or _RULES.get(key, _one_line)(value)) if isinstance(value, str) else "must be text in quotation marks"
        elif not isinstance(value, list) or not all(isinstance(line, str) and not _one_line(line) for line in value):
            wrong = "must be a list of lines"
        elif key == "sbatch" and not all(line.startswith("-") for line in value):
            wrong = 'must be a list of options, such as ["--constraint=a100"]'
        if wrong:
            raise UsageError(f"{where}: {key} {wrong}, not {value!r}.")


def _typed(name: str, text: str) -> Any:
    """The value of a text for a field: a number, a list of one line, or the text itself."""
    kind = next((field.type for field in fields(Site) if field.name == name), "str")
    if kind == "int" and re.fullmatch(r"\d+", text):
        return int(text)
    return text if kind in ("int", "str") else [text]
