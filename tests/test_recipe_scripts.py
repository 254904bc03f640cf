"""The training scripts: they run, they stay short, nobody imports them; and what their loops have in common."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seerseg.errors import DatasetError
from seerseg_data.recipes import runs

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_nano_segmenter", "train_nano_reasoner", "train_nano_clicks", "train_smol_reasoner")
RECIPES = "runs chest_rule items cuts text_views clicking pictures lessons exams nano_vlm smol_vlm".split()
FOLDER = ROOT / "seerseg_data" / "recipes"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def python_files() -> list[Path]:
    return [p for part in ("seerseg", "seerseg_data", "scripts") for p in sorted((ROOT / part).rglob("*.py"))]


def test_no_training_script_is_imported() -> None:
    assert [(path.name, name) for path in python_files() for name in imported(path) if name.split(".")[0] in SCRIPTS] == []


def test_only_scripts_and_recipes_import_recipes() -> None:
    """They import torch at their top, so a command that imported them would be slow to start."""
    for path in python_files():
        if path.parent not in (FOLDER, ROOT / "scripts"):
            assert not any(name.startswith("seerseg_data.recipes") for name in imported(path)), path


def test_a_recipe_module_imports_only_from_those_before_it() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*RECIPES, "__init__"])
    for position, name in enumerate(RECIPES):
        later = {f"seerseg_data.recipes.{other}" for other in RECIPES[position:]}
        assert not later & imported(FOLDER / f"{name}.py"), name


@pytest.mark.parametrize("path", [*FOLDER.glob("*.py"), *(ROOT / "scripts" / f"{s}.py" for s in SCRIPTS)], ids=lambda p: p.stem)
def test_recipes_can_be_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert max((n.end_lineno or 0) - n.lineno for n in functions) < 90 if functions else True


def test_help_names_the_verbs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_nano_reasoner.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "{prepare,train,export,renew}" in done.stdout


def test_a_fault_of_the_user_is_a_sentence(tmp_path: Path) -> None:
    """Pictures of an older version, through the command line."""
    (tmp_path / "pictures.pkl").touch()
    command = [sys.executable, ROOT / "scripts" / "train_nano_reasoner.py", "train", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "older version" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_nano_segmenter", "train_nano_clicks"])
def test_a_moment_of_training_on_phantoms_can_be_exported(script: str, tmp_path: Path) -> None:
    file = ROOT / "scripts" / f"{script}.py"
    command = [sys.executable, file, "train", "--cache", tmp_path, "--out", tmp_path / "out", "--phantoms", "1", "--minutes", "0.05"]
    more = ["--text_steps", "1", "--workers", "0"] if script == "train_nano_segmenter" else []
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    assert "validation" in done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [line.split(" ", 1)[1] for line in log.splitlines()] == done.stdout.splitlines()
    subprocess.run([sys.executable, file, "export", "--out", tmp_path / "out", "--to", tmp_path / "weights"], check=True)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["config.json", "model.safetensors"]


class TestRuns:
    def test_a_journal_goes_to_both_places_and_is_continued(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for line in ("one", "two"):
            journal = runs.journal(tmp_path / "out")
            journal.info(line)
            for handler in journal.handlers:
                handler.close()
        assert capsys.readouterr().out == "one\ntwo\n"
        kept = (tmp_path / "out" / "log.txt").read_text().splitlines()
        assert [line[8:] for line in kept] == [" one", " two"]
        assert all(line[2] == line[5] == ":" for line in kept)

    def test_checkpoints_are_read_without_running_code(self, tmp_path: Path) -> None:
        network = torch.nn.Linear(2, 1)
        runs.save(tmp_path / "last.pt", {"network": runs.snapshot(network), "step": 3})
        kept = torch.load(tmp_path / "last.pt", weights_only=True)
        assert kept["step"] == 3
        assert torch.equal(kept["network"]["weight"], network.weight)
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]

    def test_an_average_follows_and_training_does_not_change_a_snapshot(self) -> None:
        network = torch.nn.BatchNorm1d(1)  # has a buffer of whole numbers
        average = runs.snapshot(network)
        with torch.no_grad():
            network.weight.fill_(5.0)
            network.num_batches_tracked.fill_(7)
        assert average["weight"].item() == 1.0
        runs.blend(average, network.state_dict(), 0.25)
        assert average["weight"].item() == 2.0
        assert average["num_batches_tracked"].item() == 7

    def test_cosine(self) -> None:
        assert runs.cosine(0.0, floor=0.1) == 1.0
        assert runs.cosine(0.5, floor=0.1) == pytest.approx(0.55)
        assert runs.cosine(1.0, floor=0.1) == runs.cosine(7.0, floor=0.1) == pytest.approx(0.1)

    def test_faults_end_a_script_with_their_sentence(self) -> None:
        def verb(_: argparse.Namespace) -> None:
            raise DatasetError("There are no scans in X. Give another folder.")

        with pytest.raises(SystemExit, match="There are no scans in X"):
            runs.run(verb, argparse.Namespace())

    def test_options(self) -> None:
        parser = argparse.ArgumentParser()
        runs.scan_arguments(parser, phantoms=24)
        runs.loop_arguments(parser, minutes=40, validate_minutes=8, start="weights")
        given = parser.parse_args(["--cache", "c", "--minutes", "3"])
        assert (given.phantoms, given.seed, given.data, given.start) == (24, 0, None, None)
        assert (given.minutes, given.validate_minutes, given.lr) == (3, 8, 1.5e-3)
