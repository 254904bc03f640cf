"""seerseg_train as it is typed: plan, train, die, go on, predict; and every mistake as one sentence with its exit code."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import fsdp_on_cpu
import numpy as np
import pytest
import training_cases as tc
from click.testing import CliRunner

from seerseg.cli.predict import predict
from seerseg.cli.train import train
from seerseg.training.runs import RunFolder

CHEAP = ("--steps", "2", "--batch", "2", "--max_new_tokens", "4", "--set", "sft.evaluations=1", "--lr", "1e-3")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tc.Toy:
    return tc.make(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tiny(toy: tc.Toy) -> Path:
    return tc.tiny_reasoner(toy.root / "tiny")


def run(toy: tc.Toy, *arguments: str, code: int = 0, command: Any = train) -> str:
    done = CliRunner().invoke(command, [*arguments], env=toy.env, catch_exceptions=False)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return str(done.output)


@pytest.fixture(scope="module")
def trained(toy: tc.Toy, tiny: Path) -> Path:
    """The fold's folder after a run of two steps."""
    said = run(toy, *tc.command(toy, tiny, *CHEAP))
    assert "Done at step 2 of 2" in said
    return tc.run_folder(toy, tiny)


def test_the_plan_is_told_and_nothing_is_done(toy: tc.Toy, tiny: Path) -> None:
    line = tc.command(toy, tiny, "--steps", "7", "--plan_only")
    said = run(toy, *line)
    assert "7 updates of 8 = 1 process(es) x 1 at a time x 8 passes" in said
    assert "15 to learn, 10 to validate on" in said
    assert "per process: it fits" in said
    told = json.loads(run(toy, *line, "--json"))
    assert told["settings"]["steps"] == 7
    assert told["memory"]["total_bytes"] == sum(told["memory"]["parts_bytes"].values())
    assert not Path(told["run"]).exists()
    explained = run(toy, *line, "--explain")
    assert "views.count" in explained
    assert "2 (edited, the" in explained


def test_a_trained_folder_predicts(toy: tc.Toy, tiny: Path, trained: Path, tmp_path: Path) -> None:
    manifest = json.loads((trained / "manifest.json").read_text())
    assert (manifest["reasoner"], manifest["dataset"], manifest["fold"]) == ("sft/model", tc.NAME, 0)
    assert manifest["views"]["count"] == 2
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    scans = ["-i", str(toy.root / "raw" / tc.NAME / "imagesTr" / "case_0_0000.nii.gz"), "--prompt", "the liver", "-device", "cpu"]
    run(toy, *scans, "-o", str(tmp_path / "one"), "-m", str(moved), command=predict, code=3)  # an untaught model answers nothing readable
    run(toy, *scans, "-o", str(tmp_path / "two"), "-d", "7", "-f", "0", "--segmenter", toy.segmenter, command=predict, code=3)
    records = [json.loads((tmp_path / name / "case_0.json").read_text()) for name in ("one", "two")]
    assert records[0]["requests"][0]["replies"] == records[1]["requests"][0]["replies"]
    assert records[0]["requests"][0]["status"] == "fault"


def test_what_is_done_is_not_done_again(toy: tc.Toy, tiny: Path, trained: Path) -> None:
    before = (trained / "sft" / "metrics.jsonl").read_bytes()
    assert "already holds a run, at step 2. Add -c" in run(toy, *tc.command(toy, tiny, *CHEAP), code=2)
    assert "is done: 2 of 2 updates" in run(toy, *tc.command(toy, tiny, *CHEAP, "-c"))
    assert "planned otherwise: learning_rate (0.5, not 0.001)" in run(toy, *tc.command(toy, tiny, *CHEAP, "-c", "--lr", "0.5"), code=1)
    assert "made from other plans" in run(toy, *tc.command(toy, tiny, *CHEAP, "-c", "--set", "views.count=1"), code=1)
    assert "give one of them" in run(toy, *tc.command(toy, tiny, *CHEAP, "-c", "--overwrite"), code=2)
    assert (trained / "sft" / "metrics.jsonl").read_bytes() == before


def test_progress(toy: tc.Toy, tiny: Path, trained: Path) -> None:
    picture = trained / "sft" / "progress.png"
    picture.unlink()
    assert "saved at step 2 of 2, best at step 2" in run(toy, *tc.command(toy, tiny, "--progress"))
    assert picture.stat().st_size > 5000
    told = json.loads(run(toy, *tc.command(toy, tiny, "--progress", "--json")))
    assert (told["saved"], told["steps"]) == (2, 2)
    assert "There is no run in" in run(toy, *tc.command(toy, tiny, "--progress", "--plans", "plans", "--stage", "grpo"), code=4)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("99", "0"), 2, "There is no dataset '99'"),
        (("7", "7"), 2, "There is no fold 7"),
        (("7", "all"), 2, "FOLD must be a number, not 'all'"),
        (("7", "0", "-p", "mine"), 1, "Run seerseg_plan_and_preprocess -d Dataset007_Toy first"),
        (("7", "0", "--protocol", "sear"), 2, "There is no protocol 'sear'. Did you mean seer"),
        (("7", "0", "--reasoner", "lexicon"), 2, "has no weights that could be trained"),
        (("7", "0", "--reasoner", "org/nowhere"), 1, "is not on this machine"),
        (("7", "0", "--traces", "nowhere.jsonl"), 1, "There are no traces at nowhere.jsonl"),
        (("7", "0", "--set", "views.cuont=3"), 1, "Did you mean views.count"),
        (("7", "0", "--set", "views.count"), 2, "is no NAME=VALUE"),
        (("7", "0", "--setps", "3"), 2, "No such option"),
    ],
)
def test_mistakes_are_sentences(toy: tc.Toy, tiny: Path, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    more = () if "--reasoner" in arguments else ("--reasoner", str(tiny))
    said = run(toy, *arguments, *more, "-device", "cpu", "--plan_only", code=code)
    assert sentence in " ".join(said.split())


def test_a_model_of_text_alone(toy: tc.Toy, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = run(toy, "7", "0", "--reasoner", str(tmp_path), "-device", "cpu", "--plan_only", code=1)
    assert "is of type 'llama', which does not take images and text and write text" in said


@pytest.mark.slow
def test_grpo_goes_on_from_what_sft_made(toy: tc.Toy, tiny: Path, trained: Path) -> None:
    line = ("--stage", "grpo", "--steps", "1", "--max_new_tokens", "4", "--paraphrases", "2", "--samples", "2", "--lr", "1e-4")
    said = run(toy, *tc.command(toy, tiny, *line, "--set", "grpo.sets_per_update=1", "--set", "grpo.evaluations=1"))
    assert "Done at step 1 of 1" in said
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["reasoner"] == "grpo/model"
    before, after = tc.weights(trained / "sft" / "model"), tc.weights(trained / "grpo" / "model")
    assert before.keys() == after.keys()


# --- processes of their own


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in tc.metrics(folder / "sft") if "loss" in m]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(toy: tc.Toy, tmp_path: Path) -> None:
    line = ("--steps", "5", "--batch", "2", "--max_new_tokens", "4", "--set", "sft.evaluations=1", "--lr", "1e-3")
    folders = []
    for name in ("undisturbed", "killed"):
        reasoner = tc.tiny_reasoner(tmp_path / name)
        arguments = tc.command(toy, reasoner, *line, "--set", "checkpoint.minutes=0")
        process = tc.start(toy, arguments)
        if name == "killed":
            stage = None
            deadline = time.monotonic() + 900
            while time.monotonic() < deadline and process.poll() is None:
                stage = next((toy.root / "results" / tc.NAME).glob("*killed*/fold_0/sft"), stage)
                if stage is not None and any(c.step >= 2 for c in RunFolder(stage.parent, "sft").whole()):
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            process = tc.start(toy, [*arguments, "-c"])
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        folders.append(tc.run_folder(toy, reasoner))
    assert losses(folders[0]) == losses(folders[1])
    one, two = (tc.weights(RunFolder(f, "sft").latest.path) for f in folders)
    for weight in one:
        np.testing.assert_array_equal(one[weight], two[weight], err_msg=weight)


@pytest.mark.slow
def test_a_signal_ends_a_run_in_order(toy: tc.Toy, tmp_path: Path) -> None:
    reasoner = tc.tiny_reasoner(tmp_path / "asked")
    line = ("--steps", "1000", "--batch", "2", "--max_new_tokens", "4", "--set", "sft.evaluations=0")
    process = tc.start(toy, tc.command(toy, reasoner, *line))
    metrics = None
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        metrics = next((toy.root / "results" / tc.NAME).glob("*asked*/fold_0/sft/metrics.jsonl"), None)
        if metrics is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 75, said
    assert "Stopped by SIGUSR1 at step" in said
    assert "Run the same command with -c" in said
    folder = tc.run_folder(toy, reasoner)
    assert RunFolder(folder, "sft").latest.step == losses(folder)[-1][0]
    assert (folder / "manifest.json").is_file(), "what was learnt so far predicts"


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [(), (fsdp_on_cpu.__file__,)], ids=["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(toy: tc.Toy, tmp_path: Path, sharing: tuple[str, ...]) -> None:
    line = ("--steps", "3", "--batch", "4", "--max_new_tokens", "4", "--set", "sft.evaluations=1", "--lr", "1e-3")
    folders = []
    pair = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *sharing)
    for name, launcher in ((f"alone{len(sharing)}", ()), (f"paired{len(sharing)}", pair)):
        reasoner = tc.tiny_reasoner(tmp_path / name)
        process = tc.start(toy, tc.command(toy, reasoner, *line), launcher)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        folders.append(tc.run_folder(toy, reasoner))
    for (step, one), (_, two) in zip(losses(folders[0]), losses(folders[1]), strict=True):
        assert one == pytest.approx(two, rel=1e-4), step
    alone, paired = ([m["val_loss"] for m in tc.metrics(f / "sft") if "val_loss" in m] for f in folders)
    assert alone == pytest.approx(paired, rel=1e-3)
    one, two = (tc.weights(RunFolder(f, "sft").latest.path) for f in folders)
    for weight in one:
        np.testing.assert_allclose(one[weight], two[weight], atol=5e-4, err_msg=weight)
