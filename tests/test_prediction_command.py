"""seerseg_predict as a process: killed, stopped, out of space, misused; light to start."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from prediction_cases import command, environment, make_folder, make_scan, run_command, snapshot, write_script

from seerseg.cli.predict import predict

PROMPTS = ("--prompt", "liver", "--prompt", "trunk", "--prompt", "left kidney")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scans, and in `undisturbed` what a run that nothing disturbs writes."""
    root = tmp_path_factory.mktemp("many")
    make_folder(root, 24, shape_xyz=(48, 44, 40))
    made = run_command(root / "images", root / "undisturbed", root / "script.json", *PROMPTS)
    assert made.returncode == 0, made.stderr
    return root


def start(root: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(root / "images", output, root / "script.json", *PROMPTS, *more),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip


def wait_for_progress(process: subprocess.Popen[str], ledger: Path, limit_s: float = 30.0) -> None:
    """Until the ledger grows, or the process ends."""
    before = ledger.stat().st_size if ledger.exists() else 0
    end = time.monotonic() + limit_s
    while process.poll() is None and (not ledger.exists() or ledger.stat().st_size == before):
        assert time.monotonic() < end, "no progress"
        time.sleep(0.002)


def kill_and_resume(root: Path, output: Path, kills: int, seed: int) -> int:
    """Kill with -9 at random moments, then let it finish; returns how many kills hit a running process."""
    rng = random.Random(seed)
    hit = 0
    for _ in range(kills):
        process = start(root, output)
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0.0, 1.0))
        else:
            wait_for_progress(process, output / "ledger.jsonl")
            time.sleep(rng.uniform(0.0, 0.03))
        process.kill()
        process.communicate()
        hit += process.returncode == -signal.SIGKILL
        for path in output.glob("[!.]*.nii.gz"):
            assert (root / "undisturbed" / path.name).read_bytes() == path.read_bytes(), f"{path.name} is not whole after a kill"
    last = run_command(root / "images", output, root / "script.json", *PROMPTS)
    assert last.returncode == 0, last.stderr
    assert snapshot(output) == snapshot(root / "undisturbed")
    return hit


def test_killed_at_many_moments_it_ends_as_if_undisturbed(many: Path, tmp_path: Path) -> None:
    assert kill_and_resume(many, tmp_path / "out", 20, seed=1) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_killed_at_many_more_moments(many: Path, tmp_path: Path, seed: int) -> None:
    assert kill_and_resume(many, tmp_path / "out", 20, seed=seed) >= 15


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_drains_and_exits_75(many: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    process = start(many, output)
    wait_for_progress(process, output / "ledger.jsonl")
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"Stopped by {name}" in said
    assert "Traceback" not in said
    assert not list(output.glob(".tmp-*"))
    again = run_command(many / "images", output, many / "script.json", *PROMPTS)
    assert again.returncode == 0
    assert "were done before" in again.stdout
    assert snapshot(output) == snapshot(many / "undisturbed")


# ----------------------------------------------------------------------------------------------------------------- where to write


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(many: Path, mounted: Path) -> None:
    full = run_command(many / "images", mounted / "out", many / "script.json", *PROMPTS)
    assert full.returncode == 1
    assert "space" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((mounted / "out").glob(".tmp-*"))
    for path in (mounted / "out").glob("*.nii.gz"):
        assert path.read_bytes() == (many / "undisturbed" / path.name).read_bytes()
    subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
    rest = run_command(many / "images", mounted / "out", many / "script.json", *PROMPTS)
    assert rest.returncode == 0, rest.stderr
    assert "were done before" in rest.stdout
    assert snapshot(mounted / "out") == snapshot(many / "undisturbed")


def test_a_limit_on_file_sizes_is_a_sentence(many: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))

    made = run_command(many / "images", tmp_path / "out", many / "script.json", *PROMPTS, preexec_fn=limit)
    assert made.returncode == 1
    assert "Cannot write" in made.stderr
    assert "Traceback" not in made.stderr


def test_a_read_only_output_is_a_sentence(many: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() == 0:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, check=False)
        if tried.returncode:
            pytest.skip("a read-only file system cannot be mounted here")
    else:
        folder.chmod(0o555)
    try:
        made = [run_command(many / "images", out, many / "script.json", *PROMPTS) for out in (folder, folder / "below")]
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    for one in made:
        assert one.returncode == 1
        assert "Read-only" in one.stderr or "Permission" in one.stderr
        assert "Traceback" not in one.stderr


# ------------------------------------------------------------------------------------------------------------ exit codes, messages


@pytest.fixture
def few(tmp_path: Path) -> Path:
    make_folder(tmp_path, 2)
    return tmp_path


def test_exit_codes_and_sentences(few: Path) -> None:
    (few / "empty").mkdir()
    (few / "file").touch()
    script = few / "script.json"
    expected = {
        4: [("empty", "out", *PROMPTS)],
        2: [
            ("images", "out"),
            ("imagez", "out", *PROMPTS),
            ("images", "images", *PROMPTS),
            ("images", "out", *PROMPTS, "--part_id", "3", "--num_parts", "3"),
            ("images", "out", *PROMPTS, "--promt", "x"),
            ("images", "out", *PROMPTS, "-f", "0"),
            ("images", "out", *PROMPTS, "-d", "4", "-f", "0"),
            ("images", "out", *PROMPTS, "-d", "4", "-m", "x"),
            ("images", "out", *PROMPTS, "-device", "cuda:77"),
            ("images", "out", *PROMPTS, "--protocol", "seeer"),
        ],
        1: [("images", "file", *PROMPTS), ("images", "out", *PROMPTS, "-m", "nowhere"), ("images", "out", "--requests", "none.jsonl")],
    }
    for code, lines in expected.items():
        for source, output, *more in lines:
            made = CliRunner().invoke(predict, command(few / source, few / output, script, *more)[3:])
            assert made.exit_code == code, (more, made.output)
            assert isinstance(made.exception, SystemExit), made.exception
            assert made.output.strip(), more
    assert not (few / "out").exists() or not list((few / "out").glob("*.nii.gz"))


def test_some_failed_is_3_and_the_rest_is_written(few: Path) -> None:
    path = few / "images" / "case0_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    made = run_command(few / "images", few / "out", few / "script.json", "--prompt", "liver", "--prompt", "y" * 10_000)
    assert made.returncode == 3
    assert "case0_0000.nii.gz" in made.stderr
    assert (few / "out" / "case1.nii.gz").exists()
    assert not (few / "out" / "case0.nii.gz").exists()
    assert "10000 characters" in (few / "out" / "case1.json").read_text()


def test_json_on_stdout_alone(few: Path) -> None:
    made = run_command(few / "images", few / "out", few / "script.json", *PROMPTS, "--json")
    told = json.loads(made.stdout)
    assert (told["exit_code"], told["counts"]["done"], len(told["cases"])) == (0, 2, 2)
    assert {r["status"] for case in told["cases"] for r in case["requests"]} == {"ok"}
    assert "liver" in made.stderr


def test_one_file_a_jobs_file_and_nnunets_spelling(few: Path, tmp_path: Path) -> None:
    script = few / "script.json"
    one = run_command(few / "images" / "case1_0000.nii.gz", few / "one", script, "--prompt", "liver", "-npp", "2", "-nps", "2")
    assert one.returncode == 0, one.stderr
    assert sorted(p.name for p in (few / "one").iterdir()) == ["case1.json", "case1.nii.gz", "ledger.jsonl"]
    jobs = few / "jobs.json"
    jobs.write_text(json.dumps([{"image": "images/case0_0000.nii.gz", "requests": ["spleen"]}, {"image": "images/none.nii.gz"}]))
    made = run_command(jobs, few / "jobs", script, "-npp", "0", "--continue_prediction", "-num_parts", "1", "--part-id", "0")
    assert made.returncode == 3
    assert "none.nii.gz" in made.stderr
    assert sorted(p.name for p in (few / "jobs").iterdir()) == ["case0.json", "case0.nii.gz", "ledger.jsonl"]


def test_nrrd_in_nifti_out(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    scan = make_scan(tmp_path / "images" / "a.nii.gz", codes="LPS")
    image = sitk.ReadImage(str(scan))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    write_script(tmp_path)
    made = run_command(tmp_path / "a.nrrd", tmp_path / "out", tmp_path / "script.json", "--prompt", "liver")
    assert made.returncode == 0, made.stderr
    mask = nib.load(tmp_path / "out" / "a.nii.gz")
    truth = nib.load(tmp_path / "labels" / "a.labels.nii.gz")
    assert np.allclose(mask.affine, truth.affine, atol=1e-4)
    assert np.array_equal(np.asanyarray(mask.dataobj), np.asanyarray(truth.dataobj) == 1)


# ------------------------------------------------------------------------------------------------------------------ light to start


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom seerseg.cli.predict import predict\n"
        "try:\n    predict(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'scipy', 'nibabel', 'SimpleITK', 'monai', 'skimage', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "--prompt" in made.stdout


def cpu_seconds(*code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", *code], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_less_than_three_imports_of_click() -> None:
    click = min(cpu_seconds("import click") for _ in range(3))
    shown = min(cpu_seconds("from seerseg.cli.predict import predict; predict()", "--help") for _ in range(3))
    assert shown < 3 * click
