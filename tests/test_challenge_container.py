"""What a container is built from: all there, pinned, quoted, readable; and its entry points in a closed root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from seerseg.challenge import recipes
from seerseg.challenge.container import ContainerPlan, pinned_packages, write_container
from seerseg.cli.challenge import challenge
from seerseg.errors import ModelError, UsageError
from seerseg.model import ModelSpec, write_spec

ROOT = Path(__file__).resolve().parents[1]


def texts(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def test_containers_of_the_repository_are_what_the_command_writes(tmp_path: Path) -> None:
    """Made by: seerseg_challenge dockerize --recipe_only --overwrite -o containers."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("packages are listed for the image's Python 3.11; other versions need others")
    write_container(tmp_path / "made", ContainerPlan(), recipe_only=True)
    assert texts(ROOT / "containers") == texts(tmp_path / "made")


def test_every_source_of_the_recipes_is_there(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_container(made, ContainerPlan())
    for context, recipe in ((made, "."), (ROOT, "containers")):
        for convention in ("npz", "grand_challenge"):
            copied = re.findall(r"^COPY (.+) \S+$", recipes.dockerfile(), re.MULTILINE)
            assert len(copied) == 5
            files = re.search(r"%files\n(.*?)\n\n", recipes.apptainer(), re.DOTALL)
            assert files is not None
            listed = [
                line.split()[0] if "predict_" not in line else line.strip().rpartition(" ")[0]
                for line in files[1].replace("{{ ", "{").replace(" }}", "}").splitlines()
            ]
            for words in [*copied, *listed]:
                for word in words.split():
                    place = re.sub(r"\$?\{RECIPE\}", recipe, re.sub(r"\$?\{CONVENTION\}", convention, word))
                    assert (context / place).exists(), place
    assert (made / "seerseg" / "weights" / "nano_segmenter" / "model.safetensors").is_file()
    assert not list(made.rglob("__pycache__"))
    assert all(p.stat().st_mode & 0o004 for p in made.rglob("*"))


def test_packages_are_pinned_to_the_constraints() -> None:
    constraints = {line.lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    pins = pinned_packages()
    assert set(pins) <= constraints
    names = {pin.partition("==")[0] for pin in pins}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[<>=]", line)[0].lower() for line in wanted} <= names
    assert not names & {"pytest", "mypy", "ruff", "torchvision", "seerseg"}


def test_recipes_fetch_nothing_and_are_not_root() -> None:
    for text in (recipes.dockerfile(), recipes.apptainer()):
        assert "HF_HUB_OFFLINE=1" in text
        assert "torchvision" not in text
        assert re.search(r"python:3\.11-slim-\w+", text)
    assert re.search(r"^USER 1000:1000$", recipes.dockerfile(), re.MULTILINE)
    assert "ENTRYPOINT [" not in recipes.dockerfile()


def fake_python(folder: Path) -> dict[str, str]:
    """An environment whose `python` writes its arguments down."""
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"\n')
    (folder / "python").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_entry_points_carry_the_options(tmp_path: Path) -> None:
    words = [
        "--prompt",
        '3=the patient\'s "left" lung; rm -rf $HOME',
        "--output_path",
        "images/x",
        "--ct_window",
        "-160",
        "1500",
        "--protocol",
        "seer",
    ]
    made = CliRunner().invoke(
        challenge, ["dockerize", "-o", str(tmp_path / "made"), "--recipe_only", *words, "--packages", "nnunetv2==2.6.2", "a==1"]
    )
    assert made.exit_code == 0, made.output
    environment = fake_python(tmp_path / "bin")
    for convention, own in (
        ("npz", ["--protocol", "seer", "--ct_window", "-160", "1500"]),
        ("grand_challenge", ["--protocol", "seer", "--output_path", "images/x", "--prompt", words[1]]),
    ):
        script = tmp_path / "made" / f"predict_{convention}.sh"
        done = subprocess.run(["sh", str(script), "-device", "cpu"], env=environment, capture_output=True, text=True, check=True)
        start = ["-m", "seerseg.cli.challenge", "predict", "--convention", convention, "--never_fail"]
        assert json.loads(done.stdout) == [*start, *own, "-device", "cpu"]
    assert (tmp_path / "made" / "packages.txt").read_text().splitlines()[1:] == ["nnunetv2==2.6.2", "a==1"]


def test_a_model_and_its_parts_are_carried_along(tmp_path: Path) -> None:
    model, bank, net = tmp_path / "model", tmp_path / "bank", tmp_path / "net"
    for folder in (model, bank, net):
        folder.mkdir()
        (folder / "file.json").write_text("{}")
    write_spec(model, ModelSpec())
    parts = {"segmenter": f"nnunet:{net}", "bank": str(bank), "reasoner": "lexicon"}
    write_container(tmp_path / "made", ContainerPlan(model=model, parts=parts), recipe_only=True)
    script = (tmp_path / "made" / "predict_npz.sh").read_text()
    assert "--segmenter nnunet:/opt/parts/segmenter --bank /opt/parts/bank --reasoner lexicon" in script
    assert (tmp_path / "made" / "model" / "manifest.json").is_file()
    assert (tmp_path / "made" / "parts" / "segmenter" / "file.json").is_file()
    with pytest.raises(UsageError, match="fetches nothing"):
        write_container(tmp_path / "other", ContainerPlan(parts={"reasoner": "Qwen/Qwen3-VL-4B-Instruct"}))
    write_spec(model, ModelSpec(reasoner="Qwen/Qwen3-VL-4B-Instruct"))
    with pytest.raises(UsageError, match="its folder does not hold"):
        write_container(tmp_path / "other", ContainerPlan(model=model))
    with pytest.raises(ModelError):
        write_container(tmp_path / "other", ContainerPlan(model=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--packages"):
        write_container(tmp_path / "other", ContainerPlan(packages=["--index-url=x"]))
    assert not (tmp_path / "other").exists()


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    write_container(folder, ContainerPlan(), recipe_only=True)
    with pytest.raises(UsageError, match="--overwrite"):
        write_container(folder, ContainerPlan(), recipe_only=True)
    write_container(folder, ContainerPlan(), recipe_only=True, overwrite=True)
    (folder / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(UsageError, match="left alone"):
        write_container(folder, ContainerPlan(), recipe_only=True, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        write_container(folder / "Dockerfile", ContainerPlan())


def test_the_check_sees_what_is_wrong(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "check_container.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "CT_a.npz").write_bytes(b"")
    for log, code, said in (("", "1", "exit code 1"), ("Traceback", "0", "a traceback"), ("", "0", "files []")):
        (tmp_path / "npz.log").write_text(log)
        words = [sys.executable, str(script), "check", str(tmp_path), "npz", code]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr


@pytest.mark.slow
def test_entry_points_in_a_closed_root() -> None:
    """No network, no root, no environment, read-only: scripts/check_container.sh."""
    environment = {**os.environ, "SEERSEG_PYTHON": sys.executable}
    words = [shutil.which("bash") or "bash", "scripts/check_container.sh", "--quick"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == 6
