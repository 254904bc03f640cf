"""Run folders: checkpoints are whole or not there, the last two and the best stay, other runs are not continued."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from seerseg.errors import OutputError, PlanError, UsageError
from seerseg.training.runs import CHECKPOINT_FILE, RunFolder, no_space, open_run
from seerseg.training.settings import TrainSettings

SETTINGS = TrainSettings(
    stage="sft", tuning="full", lora_rank=4, lora_alpha=8, lora_targets="all-linear", train_vision=False, max_tokens=100, max_new_tokens=10,
    batch=8, paraphrases=2, samples=2, learning_rate=1e-3, warmup_steps=0, steps=10, epochs=1.0, weight_decay=0.0, max_grad_norm=1.0,
    lambda_=0.5, beta=0.01, temperature=1.0, evaluate_steps=5, validation_rows=4, validation_sets=2, seed=1,
)  # fmt: skip
SOURCES = {"plans": "p1", "base model": "b1", "traces": "t1"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "fold_0", "sft")


def save(run: RunFolder, step: int, score: float | None = None) -> None:
    written = run.saving / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_bytes(b"weights")
    (written / "training_args.bin").write_bytes(b"pickle")
    run.commit(written, step, score)


def steps(run: RunFolder) -> list[int]:
    return [c.step for c in run.whole()]


def test_where_a_run_lies(tmp_path: Path) -> None:
    run = open_run(
        tmp_path, "Dataset004_X", 2, "grpo", plans="plans", protocol="seer", reasoner="/models/my__tiny", segmenter="scripted:/a/b.json"
    )
    assert run.root == tmp_path / "Dataset004_X" / "plans__seer__my_tiny__scripted-b.json" / "fold_2"
    named = open_run(tmp_path, "D", 0, "sft", plans="plans", protocol="seer", reasoner="Qwen/Qwen3-VL-4B-Instruct", segmenter="nano")
    assert named.root.parent.name == "plans__seer__Qwen-Qwen3-VL-4B-Instruct__nano"


def test_the_last_two_and_the_best_stay(run: RunFolder) -> None:
    assert run.begin(SETTINGS, SOURCES, resume=False) is None
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, None), (5, 0.3)):
        save(run, step, score)
    assert steps(run) == [2, 4, 5]
    assert (run.latest.step, run.best.step) == (5, 2)
    assert not list(run.folder.rglob("training_args.bin")), "no pickle stays in the folder"
    save(run, 6, 0.9)
    assert (steps(run), run.best.step) == ([5, 6], 6)


def test_what_was_not_finished_does_not_count(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 3)
    half = run.saving / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"wei")
    moved = run.checkpoints / "checkpoint-5"
    moved.mkdir()
    assert run.latest.step == 3
    assert run.begin(SETTINGS, SOURCES, resume=True).step == 3
    assert not run.saving.exists()


def test_a_run_is_never_overwritten_by_mistake(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 3)
    with pytest.raises(UsageError, match=r"already holds a run, at step 3. Add -c to continue it, or --overwrite"):
        run.begin(SETTINGS, SOURCES, resume=False)
    assert steps(run) == [3]
    assert run.begin(SETTINGS, SOURCES, resume=False, overwrite=True) is None
    assert steps(run) == []


@pytest.mark.parametrize("name", list(SOURCES))
def test_another_plan_base_or_data_is_not_continued(run: RunFolder, name: str) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 3)
    with pytest.raises(PlanError, match=f"made from other {name}"):
        run.begin(SETTINGS, {**SOURCES, name: "other"}, resume=True)
    assert json.loads(run.sources.read_text()) == SOURCES


def test_other_settings_are_not_continued_but_another_cut_is(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 3)
    with pytest.raises(PlanError, match=r"planned otherwise: learning_rate \(0.5, not 0.001\), steps \(20, not 10\)"):
        run.begin(dataclasses.replace(SETTINGS, learning_rate=0.5, steps=20), SOURCES, resume=True)
    assert run.begin(dataclasses.replace(SETTINGS, micro_batch=4, accumulation=2, dtype="bfloat16"), SOURCES, resume=True).step == 3


def test_metrics_after_the_checkpoint_are_forgotten(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    for step in (1, 2, 3, 4):
        run.append({"step": step, "loss": 1.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    save(run, 2)
    run.begin(SETTINGS, SOURCES, resume=True)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_finished(run: RunFolder) -> None:
    assert not run.finished
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 9)
    assert not run.finished
    save(run, 10)
    assert run.finished


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 1)
    run.checkpoints.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"The checkpoint of step 2 could not be written .* The checkpoint of step 1 is whole"):
            save(run, 2)
    finally:
        run.checkpoints.chmod(0o700)


def test_a_checkpoint_that_cannot_be_moved_is_a_sentence(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 1)
    with pytest.raises(OutputError, match=r"The checkpoint of step 2 could not be written .* The checkpoint of step 1 is whole"):
        run.commit(run.saving / "nothing-was-written", 2, None)
    assert steps(run) == [1]


def test_a_damaged_mark_is_a_sentence(run: RunFolder) -> None:
    run.begin(SETTINGS, SOURCES, resume=False)
    save(run, 1)
    (run.checkpoints / "checkpoint-1" / CHECKPOINT_FILE).write_text("{")
    with pytest.raises(OutputError, match="not valid JSON"):
        _ = run.latest


def test_a_full_disk_is_known_in_all_its_words() -> None:
    assert no_space(OSError(errno.ENOSPC, "No space left on device"))
    assert no_space(OSError(errno.EFBIG, "File too large"))
    assert no_space(RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"))
    assert no_space(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not no_space(OSError(errno.EACCES, "Permission denied"))
    assert not no_space(RuntimeError("shapes do not match"))
