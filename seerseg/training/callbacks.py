"""What every training stage does besides training: checkpoints in time, curves, and faults told in sentences.

`Survival` decides when a checkpoint is made and makes it whole; `Metrics` writes what is logged; `in_words` turns what ends a run
into a sentence that says what to lower, with a checkpoint behind it. They work with any transformers trainer whose `output_dir` is
`RunFolder.saving` and whose `save_strategy` is "no".
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from seerseg.errors import MissingExtraError, NothingToDoError, OutputError, SeerSegError, TrainingError
from seerseg.training.runs import RunFolder, cannot_save, no_space
from seerseg.training.settings import TrainSettings

_PICTURE_EVERY_S = 60.0
_LINE_EVERY_S = 30.0
_SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def _nothing(*said: Any) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Outside:
    """What a command lends to a run. stop: whether a signal has asked to stop (any process's answer counts for all);
    max_minutes: stop in order after that time; say: a line for a person, also written to log.txt by whoever lends it; draw: make a
    picture (second path) of a metrics file (first); MissingExtraError from it ends the drawing, not the run."""

    stop: Callable[[], bool] = lambda: False
    max_minutes: float = math.inf
    say: Callable[[str], None] = _nothing
    draw: Callable[[Path, Path], None] = _nothing


class PartTimer:
    """Seconds spent in the parts of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were taken elsewhere."""
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds since the last time this was asked, by part."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


class Survival(TrainerCallback):
    """Checkpoints: by the clock, where a validation was the best so far, at the end, and when the run is asked to stop.

    score: from what a validation measured to a number, higher is better, None when it tells nothing; validates: the last step, and the
    one after which the time is up, are validated too, so that they can be the best (a signal leaves no time for it); bank: what a
    checkpoint keeps of a live bank. `stopped` says afterwards why the run ended before its last step.
    """

    def __init__(
        self,
        run: RunFolder,
        settings: TrainSettings,
        *,
        outside: Outside | None = None,
        score: Callable[[Mapping[str, float]], float | None] = lambda metrics: None,
        validates: bool = False,
        bank: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        self.run, self.settings, self.outside = run, settings, outside or Outside()
        self.validates, self.bank = validates, bank
        self.stopped: Literal["signal", "time"] | None = None
        self.saved_step = -1
        self.updating = False
        self._score = score
        self._best = max((c.score for c in run.whole() if c.score is not None), default=-math.inf)
        self._scored: tuple[int, float] | None = None
        self._began = self._saved_at = self._stepped = time.monotonic()
        self._validation_s = 0.0
        self._random: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self._began = self._saved_at = time.monotonic()
        self.saved_step = state.global_step if state.global_step else -1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """TrainingError before a gradient that is not a number reaches the weights (float16 scaling handles its own)."""
        import torch

        self.updating = True
        if self.settings.dtype == "float16":
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if gradients and not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).float().sum())):
            self.updating = False
            raise TrainingError(not_a_number(self.settings, state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, alike on every process, whether to save or stop."""
        self.updating = False
        now = self._stepped = time.monotonic()
        wishes = (
            self.outside.stop(),
            now - self._began + self._validation_s >= 60 * self.outside.max_minutes,
            now - self._saved_at >= 60 * self.settings.checkpoint_minutes,
        )
        signal, late, due = together(wishes)
        last = state.global_step >= state.max_steps
        if (signal or late) and not last:
            self.stopped = "signal" if signal else "time"
            control.should_training_stop = True
        if last or signal or late or due:
            control.should_save = True
        if self.validates and (last or late) and not signal and not control.should_evaluate:
            import torch

            control.should_evaluate = True
            self._random = torch.get_rng_state()  # a validation that was not planned leaves no trace in what follows

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the best."""
        self._validation_s = max(self._validation_s, time.monotonic() - self._stepped)
        if self._random is not None:
            import torch

            torch.set_rng_state(self._random)
            self._random = None
        score = self._score(kwargs.get("metrics") or {})
        if score is None or not math.isfinite(score):
            return
        self._scored = (state.global_step, score)
        if score > self._best:
            self._best = score
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make whole what was written."""
        barrier()
        step = int(state.global_step)
        if state.is_world_process_zero:
            score = self._scored[1] if self._scored is not None and self._scored[0] == step else None
            self.run.commit(self.run.saving / f"checkpoint-{step}", step, score, self.bank())
            self.outside.say(f"Checkpoint of step {step}" + (f", score {score:.4f}" if score is not None else ""))
        self.saved_step, self._saved_at = step, time.monotonic()
        barrier()


class Metrics(TrainerCallback):
    """Everything that is logged, as a line of metrics.jsonl, a TensorBoard event and, now and then, a picture.

    `eval_` becomes `val_`. parts: whose seconds are added to the lines of training.
    """

    def __init__(self, run: RunFolder, settings: TrainSettings, parts: PartTimer | None = None, outside: Outside | None = None) -> None:
        self.run, self.settings, self.parts, self.outside = run, settings, parts or PartTimer(), outside or Outside()
        self._board: Any = None
        self._began, self._step_began = time.monotonic(), time.perf_counter()
        self._first = self._tokens = 0
        self._drawn = self._said = -math.inf
        self._draws = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open TensorBoard's file, leaving out what a run that died wrote after its checkpoint."""
        self._began, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.outside.say("TensorBoard is not installed (pip install tensorboard), so only metrics.jsonl and progress.png are written.")
            return
        self._board = SummaryWriter(str(self.run.tensorboard), purge_step=state.global_step + 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it: forward, backward and update; batches are made ready before."""
        self.parts.add("step", time.perf_counter() - self._step_began)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write one line."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or any(name in logs for name in _SUMMARY):
            return
        numbers = {_name(key): float(v) for key, v in logs.items() if isinstance(v, int | float) and not _idle(key)}
        trained = "loss" in numbers
        if trained:
            if "num_tokens" in logs:  # counted from the start of this process: only differences mean the same after a restart
                numbers["tokens"], self._tokens = logs["num_tokens"] - self._tokens, logs["num_tokens"]
            numbers |= {f"seconds_{name}": seconds for name, seconds in self.parts.take().items()}
        self.record(state, numbers)
        now = time.monotonic()
        if trained and (now - self._said >= _LINE_EVERY_S or state.global_step in (1, state.max_steps)):
            self._said = now
            self.outside.say(self._line(state, numbers["loss"]))

    def record(self, state: Any, numbers: Mapping[str, float]) -> None:
        """A line of metrics at the state's step."""
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        head = {"step": int(state.global_step), "epoch": round(float(state.epoch or 0.0), 4)}
        self.run.append({**head, "minutes": round((time.monotonic() - self._began) / 60, 3), **finite})
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw."""
        self._draw(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw, and have the events written."""
        self._draw(state)
        if self._board is not None:
            self._board.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the last picture."""
        self._drawn = -math.inf
        self._draw(state)
        if self._board is not None:
            self._board.close()

    def _draw(self, state: Any) -> None:
        if not (self._draws and state.is_world_process_zero and time.monotonic() - self._drawn >= _PICTURE_EVERY_S):
            return
        self._drawn = time.monotonic()
        try:
            self.outside.draw(self.run.metrics, self.run.picture)
        except NothingToDoError:
            return
        except MissingExtraError as error:
            self._draws = False
            self.outside.say(str(error))

    def _line(self, state: Any, loss: float) -> str:
        done = max(1, state.global_step - self._first)
        each = (time.monotonic() - self._began) / done
        left = each * (state.max_steps - state.global_step)
        return f"Step {state.global_step} of {state.max_steps}: loss {loss:.4f}, {each:.2f} s a step, {_duration(left)} left"


@contextlib.contextmanager
def in_words(trainer: Any, survival: Survival) -> Iterator[None]:
    """Run `trainer.train` inside: a full disk, too little memory or a loss that is no number end it with a sentence, and with the
    last good weights in a checkpoint where one process trains alone."""
    run, settings = survival.run, survival.settings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # trl, peft and transformers deprecate each other's attributes
            yield
    except TrainingError as error:
        raise TrainingError(f"{error} {_rescue(trainer, survival)}") from error
    except SeerSegError:
        raise
    except Exception as error:
        if no_space(error):
            _clear(run)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
            raise OutputError(cannot_save(run, int(trainer.state.global_step), reason)) from error
        if out_of_memory(error):
            kept = _rescue(trainer, survival)
            raise TrainingError(f"{too_little_memory(settings, int(trainer.state.global_step) + 1)} {kept}") from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or the machine's own."""
    import torch

    words = str(error).casefold()
    said = "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and said)


def too_little_memory(settings: TrainSettings, step: int) -> str:
    """What to lower, in the order of what it costs: nothing, time, then results."""
    advice = []
    if settings.micro_batch > 1:
        advice.append(f"--micro_batch {settings.micro_batch // 2} (now {settings.micro_batch}; the results stay the same)")
    if not settings.checkpointing:
        advice.append("--set device.checkpointing=true (slower, the results stay the same)")
    if settings.tuning == "full":
        advice.append("--tuning lora")
    elif settings.quantize == "none" and settings.dtype != "float32":
        advice.append("--set device.quantize='\"4bit\"'")
    advice.append("fewer or smaller views (--set views.count=N, --set views.size_px=N)")
    return f"Memory ran out in step {step}. Lower, in this order: {'; '.join(advice)}."


def not_a_number(settings: TrainSettings, step: int) -> str:
    """What to lower when a gradient is not finite."""
    precise = "" if settings.dtype == "float32" else " or --dtype float32"
    return (
        f"The gradient of step {step} is not a number; it was not applied. Lower the learning rate (--lr {settings.learning_rate / 3:.2g}, "
        f"now {settings.learning_rate:.2g}){precise}, and begin anew with --overwrite."
    )


def together(wishes: tuple[bool, ...]) -> tuple[bool, ...]:
    """Each wish, true where any process has it."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return wishes
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    said = torch.tensor([int(w) for w in wishes], device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return tuple(bool(w) for w in said.tolist())


def barrier() -> None:
    """Wait until every process is here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _rescue(trainer: Any, survival: Survival) -> str:
    """A checkpoint of weights that are whole, and a sentence about where the run stands."""
    import torch

    step = int(trainer.state.global_step)
    if step > 0 and step != survival.saved_step and not survival.updating and survival.settings.processes == 1:
        trainer.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, RuntimeError, MemoryError, SeerSegError):
            trainer._save_checkpoint(trainer.model, None)
            survival.on_save(trainer.args, trainer.state, trainer.control)
    latest = survival.run.latest
    if latest is None:
        return "There is no checkpoint yet."
    return f"The checkpoint of step {latest.step} is whole ({latest.path})."


def _clear(run: RunFolder) -> None:
    import shutil

    shutil.rmtree(run.saving, ignore_errors=True)


def _idle(key: str) -> bool:
    """What says nothing that is not said elsewhere."""
    return key in ("epoch", "num_tokens") or (
        key.startswith("eval_") and key.endswith(("_runtime", "_per_second", "_num_tokens", "_entropy"))
    )


def _name(key: str) -> str:
    return "val_" + key[5:] if key.startswith("eval_") else key


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"
