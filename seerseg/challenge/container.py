"""A folder from which a challenge's container is built: recipes, pinned packages, the code, a model and its parts."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seerseg.challenge import recipes
from seerseg.errors import ModelError, UsageError
from seerseg.paths import write_text

PACKAGE = Path(__file__).resolve().parents[1]
CONSTRAINTS = PACKAGE.parent / "constraints.txt"
CONVENTIONS = ("npz", "grand_challenge")
PARTS = "/opt/parts"
_TOOLS = ("pip", "setuptools", "wheel")  # the base image's own


@dataclass(frozen=True)
class ContainerPlan:
    """What goes into a container.

    arguments: of `seerseg_challenge predict`, for both entry points; job_arguments, npz_arguments: for one of them alone; parts: role
    ("segmenter", "reasoner", "bank") -> name, name:folder or folder, whose folder is carried along; packages: pip requirements that are
    installed without their dependencies.
    """

    model: Path | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    job_arguments: Sequence[str] = ()
    npz_arguments: Sequence[str] = ()
    packages: Sequence[str] = ()


def write_container(folder: Path, plan: ContainerPlan, *, recipe_only: bool = False, overwrite: bool = False) -> list[Path]:
    """Fill a folder; returns what was written at its top. recipe_only: without the code, for a checkout.

    UsageError: the folder holds something (unless overwrite, and it was made by this function), or a part would have to be fetched;
    ModelError: the model folder is none.
    """
    _make_room(folder, overwrite=overwrite)
    for package in plan.packages:
        if not re.match(r"[A-Za-z0-9]", package):
            raise UsageError(f"--packages takes pip requirements as name==1.2.3, not {package!r}.")
    if plan.model is not None:
        check_complete(plan.model)
    carried = {role: _carried(role, value) for role, value in plan.parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "Dockerfile", recipes.dockerfile())
    write_text(folder / "seerseg.def", recipes.apptainer())
    write_text(folder / "requirements.txt", "\n".join(pinned_packages()) + "\n")
    write_text(folder / "packages.txt", recipes.PACKAGES + "".join(f"{package}\n" for package in plan.packages))
    named = [word for role, (name, _) in carried.items() for word in (f"--{role}", name)]
    for convention, own in zip(CONVENTIONS, (plan.npz_arguments, plan.job_arguments), strict=True):
        arguments = shlex.join([*named, *plan.arguments, *own])
        write_text(folder / f"predict_{convention}.sh", recipes.entry_point(convention, arguments))
    write_text(folder / "parts" / "README.md", recipes.PARTS_README)
    for role, (_, source) in carried.items():
        if source is not None:
            shutil.copytree(source, folder / "parts" / role)
    if plan.model is not None:
        shutil.copytree(plan.model, folder / "model")
    else:
        write_text(folder / "model" / "README.md", recipes.MODEL_README)
    if not recipe_only:
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for path in (folder, *folder.rglob("*")):  # read in the image by another user than the one who made it
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    return sorted(folder.iterdir())


def _make_room(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Choose a folder with -o.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    made = folder / "Dockerfile"
    if not overwrite:
        raise UsageError(f"{folder} holds something already. Choose an empty folder, or add --overwrite to make a container's folder anew.")
    if not made.is_file() or not made.read_text(encoding="utf-8", errors="replace").startswith(recipes.MARK):
        raise UsageError(f"{folder} was not made by seerseg_challenge dockerize, so it is left alone. Choose another folder.")
    shutil.rmtree(folder)


def check_complete(model: Path) -> None:
    """UsageError when the model needs something that its folder does not hold: a container fetches nothing."""
    from seerseg.model import read_spec
    from seerseg.reasoners import parts_of

    spec = read_spec(model)
    for role, part in (*(("reasoner", one) for one in parts_of(spec.reasoner)), ("segmenter", spec.segmenter)):
        name, _, source = part.partition(":")
        where = Path(source or name)
        if "/" in (source or name) and not where.is_relative_to(model):
            raise UsageError(
                f"The {role} of {model} is {part!r}, which its folder does not hold, and a container fetches nothing. "
                f"Export the model with its base models, or name a folder that is carried along with --{role}."
            )


def _carried(role: str, value: str) -> tuple[str, Path | None]:
    """How a part is named inside the image, and the folder that has to be there."""
    name, colon, source = value.partition(":")
    folder = Path(source if colon else value).expanduser()
    if folder.is_dir():
        return (f"{name}:{PARTS}/{role}" if colon else f"{PARTS}/{role}"), folder
    if "/" in (source or name):
        raise UsageError(f"--{role} {value!r} is no folder here, and a container fetches nothing. Download it first and give its folder.")
    return value, None


def pinned_packages() -> list[str]:
    """Every package that seerseg needs to run, with theirs, as name==version: the versions of constraints.txt in a checkout, else those
    that are installed. ModelError when the installation does not say."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    fixed = {}
    if CONSTRAINTS.is_file():
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        fixed = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
        fixed = {canonicalize_name(name): version.strip() for name, version in fixed.items()}
    found: dict[str, str] = {}
    waiting: list[tuple[str, frozenset[str]]] = [("seerseg", frozenset())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            raise ModelError(f"The package {name} is not installed, so its version cannot be pinned. Install seerseg with pip.") from None
        if name not in ("seerseg", *_TOOLS):
            found[name] = fixed.get(name, package.version).partition("+")[0]
        for line in package.requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
                if key not in seen:
                    seen.add(key)
                    waiting.append(key)
    return [f"{name}=={version}" for name, version in sorted(found.items())]
