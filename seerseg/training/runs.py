"""The folder of a training run, and checkpoints that are either whole or not there.

    $seerseg_results/<dataset>/<plans>__<protocol>__<reasoner>__<segmenter>/fold_F/
        manifest.json               the trained model (`seerseg.model`), written when there is something to predict with
        sft/ | grpo/
            settings.json           what the stage does (`TrainSettings`) and from what: plans, traces, base model
            log.txt metrics.jsonl progress.png tensorboard/
            checkpoints/checkpoint-N/   weights, optimiser, schedule, random states; checkpoint.json, written last, makes it whole
            model/                  the chosen weights as a model folder: what manifest.json points to

A checkpoint is written to `.saving`, flushed to the disk and renamed: a machine that dies leaves the ones before. The last two and
the best stay.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerseg.errors import OutputError, PlanError, UsageError
from seerseg.model import run_name
from seerseg.paths import read_json, write_json, write_text
from seerseg.training.settings import Stage, TrainSettings, load_settings

CHECKPOINT_FILE = "checkpoint.json"
CHECKPOINT_SCHEMA = 1
KEPT = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. score: higher is better, None where nothing was validated at this step; bank: number and version of the state
    of the live bank that its step was shown, None without one."""

    path: Path
    step: int
    score: float | None = None
    bank: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunFolder:
    """One stage of one fold. `root` is the fold's folder, the model folder of `seerseg_predict -m`."""

    root: Path
    stage: Stage

    @property
    def folder(self) -> Path:
        """Everything of the stage."""
        return self.root / self.stage

    @property
    def settings(self) -> Path:
        """What the stage does."""
        return self.folder / "settings.json"

    @property
    def sources(self) -> Path:
        """What the stage was made from: names and digests."""
        return self.folder / "sources.json"

    @property
    def metrics(self) -> Path:
        """One JSON object of numbers per line."""
        return self.folder / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Dated lines for a person."""
        return self.folder / "log.txt"

    @property
    def picture(self) -> Path:
        """Curves of the metrics."""
        return self.folder / "progress.png"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.folder / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """All checkpoints."""
        return self.folder / "checkpoints"

    @property
    def saving(self) -> Path:
        """Where transformers writes a checkpoint before it counts: its `output_dir`."""
        return self.folder / ".saving"

    @property
    def model(self) -> Path:
        """The chosen weights as a model folder."""
        return self.folder / "model"

    def say(self, line: str) -> None:
        """A dated line in log.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def whole(self) -> list[Checkpoint]:
        """Whole checkpoints by step."""
        found = []
        for path in self.checkpoints.glob("checkpoint-*"):
            if (path / CHECKPOINT_FILE).is_file():
                said = read_json(path / CHECKPOINT_FILE, OutputError, CHECKPOINT_SCHEMA)
                found.append(Checkpoint(path, int(said["step"]), said.get("score"), said.get("bank")))
        return sorted(found, key=lambda c: c.step)

    @property
    def latest(self) -> Checkpoint | None:
        """The one that a run continues from."""
        return next(reversed(self.whole()), None)

    @property
    def best(self) -> Checkpoint | None:
        """The one with the highest score, the later of equals; the latest where none was scored."""
        scored = [c for c in self.whole() if c.score is not None]
        return max(scored, key=lambda c: (c.score, c.step)) if scored else self.latest

    @property
    def finished(self) -> bool:
        """Whether the stage came to its planned end."""
        latest = self.latest
        return latest is not None and self.settings.is_file() and latest.step >= load_settings(self.settings).steps

    def begin(self, settings: TrainSettings, sources: Mapping[str, Any], *, resume: bool, overwrite: bool = False) -> Checkpoint | None:
        """Make the folder ready and return the checkpoint to continue from, None to start from the beginning.

        sources: what the stage is made from ("plans", "traces", "base", ...: text). UsageError when there are checkpoints and
        neither resume nor overwrite is said; PlanError when they are of another plan, base or data. Nothing is removed but with
        overwrite, and unfinished checkpoints.
        """
        shutil.rmtree(self.saving, ignore_errors=True)
        latest = self.latest
        if overwrite:
            for name in ("checkpoints", "model", "tensorboard"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for path in (self.metrics, self.picture):
                path.unlink(missing_ok=True)
            latest = None
        elif latest is not None and not resume:
            raise UsageError(
                f"{self.folder} already holds a run, at step {latest.step}. Add -c to continue it, or --overwrite to begin anew."
            )
        elif latest is not None:
            self._check_same(settings, sources)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.settings, settings.to_json())
        write_json(self.sources, dict(sources))
        self._forget_after(latest.step if latest else -1)
        return latest

    def commit(self, written: Path, step: int, score: float | None, bank: Mapping[str, Any] | None = None) -> Checkpoint:
        """Make what lies in the folder `written` the checkpoint of a step. OutputError when it cannot be."""
        target = self.checkpoints / f"checkpoint-{step}"
        if not written.is_dir():
            raise OutputError(cannot_save(self, step, "nothing was written"))
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            # pickles that nothing reads again: a folder that is moved must not be able to run code
            for stale in written.glob("training_args.bin"):
                stale.unlink()
            said = {"schema": CHECKPOINT_SCHEMA, "step": step, "score": score}
            write_json(written / CHECKPOINT_FILE, said if bank is None else {**said, "bank": dict(bank)})
            for path in _files(written):
                _flush(path)
            if target.exists():
                shutil.rmtree(target)
            written.rename(target)
            _flush(self.checkpoints)
        except OSError as error:
            raise OutputError(cannot_save(self, step, error.strerror or str(error))) from error
        made = Checkpoint(target, step, score, bank)
        self._rotate()
        return made

    def append(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; written whole or not at all as far as the system allows."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _rotate(self) -> None:
        kept, best = self.whole(), self.best
        for old in kept[:-KEPT]:
            if best is None or old.path != best.path:
                # the mark goes first: what is left of a removal that is cut short does not count as a checkpoint
                (old.path / CHECKPOINT_FILE).unlink(missing_ok=True)
                shutil.rmtree(old.path, ignore_errors=True)

    def _check_same(self, settings: TrainSettings, sources: Mapping[str, Any]) -> None:
        before = read_json(self.sources, PlanError) if self.sources.is_file() else {}
        other = [name for name in sources if name in before and before[name] != sources[name]]
        if other:
            raise PlanError(
                f"The run in {self.folder} was made from other {' and '.join(other)} ({before[other[0]]}, now {sources[other[0]]}). "
                "Bring those back to continue it, or begin anew with --overwrite."
            )
        changed = settings.differences(load_settings(self.settings))
        if changed:
            raise PlanError(
                f"The run in {self.folder} was planned otherwise: {', '.join(changed)}. Give the same options to continue it, or begin "
                "anew with --overwrite."
            )

    def _forget_after(self, step: int) -> None:
        """Take out of metrics.jsonl what a run that died had written after the checkpoint that is continued from."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(line + "\n")
        write_text(self.metrics, "".join(kept))


def open_run(
    results: Path, dataset: str, fold: int, stage: Stage, *, plans: str, protocol: str, reasoner: str, segmenter: str
) -> RunFolder:
    """The folder of a run; nothing is made yet. reasoner, segmenter: as named on the command line; of a folder its last part counts."""
    return RunFolder(results / dataset / run_name(plans, protocol, reasoner, segmenter) / f"fold_{fold}", stage)


def cannot_save(run: RunFolder, step: int, reason: str) -> str:
    """The sentence for a checkpoint that could not be written."""
    before = [c.step for c in run.whole()]
    kept = f"The checkpoint of step {before[-1]} is whole" if before else "There is no earlier one"
    return (
        f"The checkpoint of step {step} could not be written to {run.folder}: {reason.rstrip('.')}. {kept}; free some space and "
        "continue with -c."
    )


def no_space(error: BaseException) -> bool:
    """Whether an exception says that a disk or a quota is full; writers of safetensors and torch say so in words."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    words = str(error).casefold()
    return any(
        w in words for w in ("no space left", "file too large", "quota exceeded", "pytorchstreamwriter failed writing", "write failed")
    )


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file())
    yield folder


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's list of files to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
