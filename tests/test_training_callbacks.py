"""Checkpoints in time, curves, and sentences, apart from any model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_training_runs import SETTINGS, SOURCES

from seerseg.errors import MissingExtraError
from seerseg.report import plot_progress
from seerseg.report.plots import _family
from seerseg.training.callbacks import (
    Metrics,
    Outside,
    PartTimer,
    Survival,
    not_a_number,
    out_of_memory,
    together,
    too_little_memory,
)
from seerseg.training.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "fold_0", "sft")
    made.begin(SETTINGS, SOURCES, resume=False)
    return made


def state(step: int, **more: Any) -> Any:
    return SimpleNamespace(**{"global_step": step, "max_steps": 10, "epoch": step / 10, "is_world_process_zero": True, **more})


def control() -> Any:
    return SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=False)


def saved(run: RunFolder, survival: Survival, step: int) -> None:
    """As a trainer saves when it is told to."""
    (run.saving / f"checkpoint-{step}").mkdir(parents=True)
    survival.on_save(None, state(step), control())


def test_a_checkpoint_when_it_is_due(run: RunFolder) -> None:
    survival = Survival(run, dataclasses.replace(SETTINGS, checkpoint_minutes=0.0))
    survival.on_train_begin(None, state(0), control())
    told = control()
    survival.on_step_end(None, state(1), told)
    assert (told.should_save, told.should_training_stop) == (True, False)
    rare = Survival(run, SETTINGS)
    rare.on_train_begin(None, state(0), control())
    for step, expected in ((1, False), (10, True)):
        told = control()
        rare.on_step_end(None, state(step), told)
        assert (told.should_save, told.should_training_stop, rare.stopped) == (expected, False, None)


@pytest.mark.parametrize(("outside", "why"), [(Outside(stop=lambda: True), "signal"), (Outside(max_minutes=0.0), "time")])
def test_stopping_saves_first(run: RunFolder, outside: Outside, why: str) -> None:
    survival = Survival(run, SETTINGS, outside=outside)
    survival.on_train_begin(None, state(0), control())
    told = control()
    survival.on_step_end(None, state(3), told)
    assert (told.should_save, told.should_training_stop, survival.stopped) == (True, True, why)


def test_time_is_kept_for_a_last_validation(run: RunFolder) -> None:
    survival = Survival(run, SETTINGS, outside=Outside(max_minutes=10.0), validates=True)
    survival.on_train_begin(None, state(0), control())
    told = control()
    survival.on_step_end(None, state(1), told)
    assert (told.should_evaluate, told.should_training_stop) == (False, False)
    survival._validation_s = 600.0  # as long as everything
    survival.on_step_end(None, state(2), told)
    assert (told.should_evaluate, told.should_save, survival.stopped) == (True, True, "time")
    asked = Survival(run, SETTINGS, outside=Outside(stop=lambda: True), validates=True)
    asked.on_train_begin(None, state(0), control())
    told = control()
    asked.on_step_end(None, state(1), told)
    assert (told.should_evaluate, told.should_save) == (False, True), "a signal leaves no time"


def test_the_best_is_kept_and_known_after_a_restart(run: RunFolder) -> None:
    survival = Survival(run, SETTINGS, score=lambda metrics: metrics.get("eval_dice"))
    for step, dice, expected in ((1, 0.5, True), (2, 0.4, False), (3, None, False), (4, float("nan"), False), (5, 0.6, True)):
        told = control()
        survival.on_evaluate(None, state(step), told, metrics={"eval_dice": dice})
        assert told.should_save is expected, step
        if expected:
            saved(run, survival, step)
    assert run.best.step == 5
    again = Survival(run, SETTINGS, score=lambda metrics: metrics["eval_dice"])
    told = control()
    again.on_evaluate(None, state(6), told, metrics={"eval_dice": 0.55})
    assert not told.should_save


def test_curves(run: RunFolder) -> None:
    lines: list[str] = []
    parts = PartTimer()
    metrics = Metrics(run, SETTINGS, parts, Outside(say=lines.append, draw=plot_progress))
    metrics.on_train_begin(None, state(0), control())
    for step in range(1, 41):
        metrics.on_step_begin(None, state(step), control())
        with parts.part("data"):
            pass
        metrics.on_step_end(None, state(step), control())
        metrics.on_log(None, state(step), control(), logs={"loss": 1 / step, "num_tokens": 100 * step, "epoch": 1.0})
    metrics.on_log(None, state(40), control(), logs={"eval_loss": float("nan"), "eval_runtime": 3.0, "eval_dice_mean": 0.5})
    metrics.on_log(None, state(40), control(), logs={"train_runtime": 3.0, "train_loss": 0.1})
    metrics.on_train_end(None, state(40), control())
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert len(records) == 41
    assert set(records[0]) == {"step", "epoch", "minutes", "loss", "tokens", "seconds_data", "seconds_step"}
    assert [r["tokens"] for r in records[:3]] == [100, 100, 100]
    assert {k: records[-1][k] for k in ("val_loss", "val_dice_mean")} == {"val_loss": None, "val_dice_mean": 0.5}
    assert "val_runtime" not in records[-1]
    with Image.open(run.picture) as picture:
        assert picture.size[0] > 1000
    assert lines[0].startswith("Step 1 of 10: loss 1.0000")


def test_no_matplotlib_is_said_once_and_ends_nothing(run: RunFolder) -> None:
    lines: list[str] = []

    def draw(log: Path, picture: Path) -> None:
        raise MissingExtraError("Plots need matplotlib.")

    metrics = Metrics(run, SETTINGS, None, Outside(say=lines.append, draw=draw))
    for _ in range(3):
        metrics.on_train_end(None, state(4), control())
    assert lines == ["Plots need matplotlib."]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("loss", "loss"),
        ("val_loss", "loss"),
        ("val_dice_worst", "dice"),
        ("dice/mean", "dice"),
        ("rewards/format/mean", "reward"),
        ("reward", "reward"),
        ("seconds_generate", "seconds of a step"),
        ("val_exact", "exact"),
    ],
)
def test_what_belongs_together_shares_a_plot(name: str, family: str) -> None:
    assert _family(name) == family


def test_what_ran_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60)
    assert out_of_memory(real.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(ValueError("out of memory"))


def test_advice_costs_least_first() -> None:
    said = too_little_memory(dataclasses.replace(SETTINGS, micro_batch=8), 5)
    places = [said.index(word) for word in ("--micro_batch 4 (now 8", "checkpointing", "--tuning lora", "views.count")]
    assert places == sorted(places)
    least = too_little_memory(
        dataclasses.replace(SETTINGS, micro_batch=1, checkpointing=True, tuning="lora", dtype="bfloat16", quantize="4bit"), 5
    )
    assert "views.count" in least
    assert not any(word in least for word in ("--micro_batch", "checkpointing", "--tuning", "4bit"))
    assert "--lr 0.00033, now 0.001)" in not_a_number(SETTINGS, 3)
    assert "--dtype float32" in not_a_number(dataclasses.replace(SETTINGS, dtype="float16"), 3)


def test_alone_there_is_nobody_to_agree_with() -> None:
    assert together((True, False)) == (True, False)
