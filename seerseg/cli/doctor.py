"""seerseg_doctor: what is here, what is missing, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click

from seerseg.cli.options import command, folder_options, json_option, option, print_json

State = Literal["ok", "note", "problem"]
CORE = (
    "torch",
    "monai",
    "nibabel",
    "SimpleITK",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-image",
    "blosc2",
    "click",
)
EXTRAS = {
    "train": ("trl", "accelerate", "datasets"),
    "report": ("matplotlib",),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. remedy: what to do about it, "" when nothing is needed."""

    topic: str
    name: str
    state: State
    value: str
    remedy: str = ""


@command(
    "seerseg_doctor",
    epilog="Examples: seerseg_doctor | seerseg_doctor --model models/mine | seerseg_doctor -d 4 -f 0. "
    "Exit code 1 when something is a problem, 0 otherwise.",
)
@option("-m", "--model", "--model_folder", "model_folder", metavar="DIR", help="Look at this model alone: what it needs, and what to copy.")
@option("-d", "--dataset", metavar="ID", help="Look at the trained model of this dataset, with -f.")
@option("-f", "--fold", type=int, metavar="FOLD", help="Fold of the trained model. Default with -d: 0.")
@option("-p", "--plans", metavar="NAME", help="Plans of the trained model, where there are several.")
@folder_options("results")
@json_option
@click.pass_context
def doctor(context: click.Context, /, **given: Any) -> None:
    """Look at folders, versions, torchvision, GPU, memory, workers and weights, or at one model, and say what to do; never the network."""
    if given["model_folder"] or given["dataset"]:
        findings = list(one_model(given))
    else:
        findings = [*folders(), *versions(), *torchvision(), *hardware(), *models()]
    if given["as_json"]:
        print_json({"schema": 1, "findings": [asdict(f) for f in findings]})
    else:
        show(findings)
    if any(f.state == "problem" for f in findings):
        context.exit(1)


def one_model(given: dict[str, Any]) -> Iterator[Finding]:
    """What one trained model needs on this machine."""
    from seerseg.cli.export import model_folder
    from seerseg.exchange import look

    folder = model_folder(given)
    yield from torchvision()
    for part in look(folder):
        yield Finding(f"Model {folder.name}", part.name, part.state, part.value, part.remedy)


def show(findings: list[Finding]) -> None:
    """The findings as lines under their topics, remedies beneath."""
    marks = {"ok": click.style("ok  ", fg="green"), "note": click.style("note", fg="yellow"), "problem": click.style("FAIL", fg="red")}
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            click.echo(click.style(f"\n{topic}", bold=True))
        click.echo(f"  {marks[finding.state]}  {finding.name:26} {finding.value}")
        if finding.remedy:
            click.echo(f"        -> {finding.remedy}")
    problems = sum(f.state == "problem" for f in findings)
    click.echo(f"\n{problems} problem{'s' if problems != 1 else ''}." if problems else "\nNo problems.")


def folders() -> Iterator[Finding]:
    """The three folder variables."""
    import os
    from pathlib import Path

    from seerseg.paths import PREPROCESSED_VARIABLE, RAW_VARIABLE, RESULTS_VARIABLE

    for variable in (RAW_VARIABLE, PREPROCESSED_VARIABLE, RESULTS_VARIABLE):
        value = os.environ.get(variable, "")
        needed = "Training needs it; prediction with the defaults or a model folder does not."
        if not value:
            yield Finding("Folders", variable, "note", "not set", f"{needed} export {variable}=/data/{variable}")
            continue
        path = Path(value).expanduser()
        if not path.is_dir():
            yield Finding("Folders", variable, "problem", f"{path} does not exist", f"mkdir -p {path}")
        elif not os.access(path, os.W_OK):
            read_only = variable == RAW_VARIABLE
            yield Finding(
                "Folders", variable, "ok" if read_only else "problem", f"{path} (read-only)", "" if read_only else f"Make {path} writable."
            )
        else:
            count = sum(1 for p in path.iterdir() if p.is_dir() and p.name.startswith("Dataset"))
            yield Finding("Folders", variable, "ok", f"{path} ({count} dataset{'s' if count != 1 else ''})")


def versions() -> Iterator[Finding]:
    """Python, the core packages, the extras."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from seerseg import __version__

    yield Finding("Versions", "seerseg", "ok", f"{__version__} on Python {platform.python_version()}, {platform.system()}")
    for name in CORE:
        try:
            yield Finding("Versions", name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding("Versions", name, "problem", "not installed", f"pip install {name}")
    for extra, names in EXTRAS.items():
        missing = []
        for name in names:
            try:
                version(name)
            except PackageNotFoundError:
                missing.append(name)
        if missing:
            yield Finding(
                "Versions", f"extra [{extra}]", "note", f"without {', '.join(missing)}", f"If you want it: pip install 'seerseg[{extra}]'"
            )
        else:
            yield Finding("Versions", f"extra [{extra}]", "ok", ", ".join(f"{n} {version(n)}" for n in names))


def torchvision() -> Iterator[Finding]:
    """A torchvision that cannot load breaks transformers at import."""
    from seerseg.reasoners.torchvision_state import torchvision_state

    state = torchvision_state()
    if state == "broken":
        remedy = "It does not fit this torch and breaks transformers: pip uninstall torchvision (SeerSeg needs none)."
        yield Finding("Versions", "torchvision", "problem", "installed but broken", remedy)
    else:
        yield Finding("Versions", "torchvision", "ok", "not installed, none needed" if state == "absent" else "installed and sound")


def hardware() -> Iterator[Finding]:
    """Accelerator, memory, workers, threads."""
    import torch

    from seerseg.planning import hardware as look

    seen = look()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            dtype = "bfloat16" if properties.major >= 8 else "float16"
            yield Finding("Hardware", f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {dtype}")
    elif torch.backends.mps.is_available():
        yield Finding("Hardware", "mps", "ok", "available")
    elif seen.gpus:
        remedy = "This torch is a CPU build. Install the build for your CUDA version, as PyTorch's own install page says."
        yield Finding("Hardware", "GPU", "problem", "there is one, but torch cannot use it", remedy)
    else:
        yield Finding("Hardware", "GPU", "note", "none: everything runs on the CPU, slower")
    yield Finding("Hardware", "CPU cores for this process", "ok", f"{seen.cpus} ({torch.get_num_threads()} torch threads)")
    gigabytes = seen.ram_bytes / 2**30
    few = gigabytes < 6
    yield Finding("Hardware", "memory", "note" if few else "ok", f"{gigabytes:.1f} GiB", "Use few workers (-np 1)." if few else "")


def models() -> Iterator[Finding]:
    """Segmenters and reasoners that can be named, and whether the shipped weights are whole."""
    from seerseg.errors import SeerSegError
    from seerseg.model import DEFAULT_REASONER, DEFAULT_SEGMENTER
    from seerseg.reasoners import available_reasoners, load_reasoner
    from seerseg.segmenters import available_segmenters, load_segmenter

    yield Finding("Models", "segmenters", "ok", ", ".join(available_segmenters()))
    yield Finding("Models", "reasoners", "ok", ", ".join(available_reasoners()))
    for kind, name, load in (("segmenter", DEFAULT_SEGMENTER, load_segmenter), ("reasoner", DEFAULT_REASONER, load_reasoner)):
        try:
            made = load(name)
            for member in getattr(made, "members", ()):
                _ = getattr(member, "made", None)  # what would be loaded when it is first asked
            card = made.card
            yield Finding("Models", f"default {kind}", "ok", f"{card.name}, {card.identity[:16]}")
        except SeerSegError as error:
            yield Finding("Models", f"default {kind}", "problem", str(error), "Reinstall seerseg.")
    yield hub_cache()


def hub_cache() -> Finding:
    """Which models of the hub's local cache can be used without a network."""
    import os
    from pathlib import Path

    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*")) if cache.is_dir() else []
    if found:
        return Finding("Models", "hub cache", "ok", ", ".join(found))
    remedy = "To use a hub model without a network, copy its folder here and name the folder, or fill the cache on another machine."
    return Finding("Models", "hub cache", "note", f"no models in {cache}", remedy)


if __name__ == "__main__":
    doctor()
