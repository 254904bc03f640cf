"""Arrows run one way, light things stay light, only the command line prints or exits."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "errors paths quiet volume vocabulary dataset views planning store prompts segmenters skills protocols reasoners episode metrics "
    "consensus rewards model training evolution prediction evaluation report exchange challenge slurm cli"
).split()
HEAVY = (
    "torch",
    "transformers",
    "monai",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "matplotlib",
    "SimpleITK",
    "skimage",
    "nibabel",
    "scipy",
    "numpy",
)


def sources(package: str) -> Iterator[Path]:
    return (p for p in sorted((ROOT / package).rglob("*.py")) if "__pycache__" not in p.parts)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(name: str, tree: ast.AST) -> list[str]:
    """Modules below `name` in the order, or the data package, that `tree` imports."""
    found = []
    for module in imported(tree):
        parts = module.split(".")
        if parts[0] == "seerseg_data" and name != "cli":
            found.append(module)
        if parts[0] == "seerseg" and len(parts) > 1 and parts[1] in ORDER and name in ORDER:
            if ORDER.index(parts[1]) > ORDER.index(name):
                found.append(module)
    return found


@pytest.mark.parametrize("path", list(sources("seerseg")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_above(path: Path) -> None:
    name = path.relative_to(ROOT / "seerseg").parts[0].removesuffix(".py")
    assert name == "__init__" or name in ORDER, f"{name} has no place in the order: put it into ORDER and documentation/design.md"
    assert upward(name, ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_order_is_enforced() -> None:
    assert upward("volume", ast.parse("from seerseg.episode import solve")) != []
    assert upward("episode", ast.parse("import seerseg_data.phantoms")) != []
    assert upward("cli", ast.parse("import seerseg_data.phantoms\nfrom seerseg.episode import solve")) == []


def prints_or_exits(tree: ast.AST) -> list[int]:
    bad = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "exit", "quit", "sys.exit", "os._exit", "click.echo"):
                bad.append(node.lineno)
    return bad


@pytest.mark.parametrize("path", [p for p in sources("seerseg") if "cli" not in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    assert prints_or_exits(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_print_guard_sees_a_print() -> None:
    assert prints_or_exits(ast.parse("def f():\n    print('x')\n    import sys; sys.exit(1)")) == [2, 3]


@pytest.mark.parametrize("path", list(sources("seerseg")), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_not_giants(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    longest = max((n.end_lineno - n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)), default=0)
    assert longest <= 90


def commands() -> dict[str, str]:
    import tomllib

    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"])


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_imports_nothing_heavy(name: str) -> None:
    module, _, function = commands()[name].partition(":")
    code = (
        f"import sys\nfrom {module} import {function} as c\n"
        "try:\n    c.main(['--help'], prog_name='x')\nexcept SystemExit as e:\n    assert not e.code\n"
        f"bad = [m for m in {HEAVY!r} if m in sys.modules]\nassert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def cpu_seconds(code: str, repeats: int = 5) -> float:
    import os

    best = float("inf")
    for _ in range(repeats):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best


def test_predict_help_is_fast() -> None:
    bare = cpu_seconds("import click")
    help_page = cpu_seconds("from seerseg.cli.predict import predict\ntry: predict.main(['--help'])\nexcept SystemExit: pass")
    assert help_page < 3 * bare, f"{help_page:.3f} s against {bare:.3f} s"


def test_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, seerseg\nbad = [m for m in {HEAVY!r} if m in sys.modules]\nassert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_machine_path_or_registry_in_the_project() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    if not any(listed):
        pytest.skip("not a git checkout")
    words = ["/" + "work/", "/" + "root/", "pypi" + ".org", "files.python" + "hosted", "deb." + "debian.org"]
    bad = []
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".sh", ".toml", ".txt", ".json", ".jsonl"} and path.is_file():
            text = path.read_text(encoding="utf-8")
            bad += [f"{name}: {word}" for word in words if word in text]
    assert bad == []
