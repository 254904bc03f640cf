"""Faults that a user can cause, and the exit code each one ends a command with.

    SeerSegError (1)                something is wrong with what was given; the text says what, where and what to do
    ├── UsageError (2)              the command line contradicts itself or lacks something
    │   └── FolderError (2)         a folder variable is unset, or a dataset cannot be found under it
    ├── DatasetError (1)            a raw dataset breaks its contract
    ├── ImageError (1)              a file cannot be read as the image it should be
    │   └── GeometryError (1)       its position in space is unusable or contradicts its siblings
    ├── RequestError (1)            a request file or a request text cannot be used
    ├── PlanError (1)               plans or splits are missing, damaged or of another version
    ├── StoreError (1)              a preprocessed file is missing, damaged or outdated
    ├── ModelError (1)              a model folder cannot be used
    │   ├── WeightsError (1)        weights are missing, damaged or of another architecture
    │   └── MissingExtraError (1)   an optional package is needed; the text holds the command that installs it
    ├── BankError (1)               a skill bank or a skill cannot be used
    ├── SegmenterError (1)          a segmenter was asked for what it cannot do
    ├── TrainingError (1)           a training run cannot go on (not a number, out of memory)
    ├── OutputError (1)             results cannot be written (no space, read-only)
    ├── SchedulerError (1)          Slurm is missing, does not answer or refuses a job
    ├── SomeCasesFailedError (3)    the rest is written
    ├── NothingToDoError (4)        the input held nothing to work on
    └── InterruptedRunError (75)    stopped by a signal; running the same command again continues

Everything else that is raised is a bug and keeps its traceback. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_MISUSE = 2
EXIT_SOME_FAILED = 3
EXIT_NOTHING_TO_DO = 4
EXIT_REQUEUE = 75


class SeerSegError(Exception):
    """A fault that a user can mend; `str()` of it is one or more whole sentences fit to be shown."""

    exit_code = EXIT_FAULT


class UsageError(SeerSegError):
    """The command line contradicts itself or lacks something."""

    exit_code = EXIT_MISUSE


class FolderError(UsageError):
    """A folder variable is unset, or a dataset cannot be found under it."""


class DatasetError(SeerSegError):
    """A raw dataset breaks its contract."""


class ImageError(SeerSegError):
    """A file cannot be read as the image it should be."""


class GeometryError(ImageError):
    """An image's position in space is unusable or contradicts that of its siblings."""


class RequestError(SeerSegError):
    """A request file or a request text cannot be used."""


class PlanError(SeerSegError):
    """Plans or splits are missing, damaged or of another version."""


class StoreError(SeerSegError):
    """A preprocessed file is missing, damaged or outdated."""


class ModelError(SeerSegError):
    """A model folder cannot be used."""


class WeightsError(ModelError):
    """Weights are missing, damaged or of another architecture."""


class MissingExtraError(ModelError):
    """An optional package is needed; the text holds the command that installs it."""


class BankError(SeerSegError):
    """A skill bank or a skill cannot be used."""


class SegmenterError(SeerSegError):
    """A segmenter was asked for what it cannot do."""


class TrainingError(SeerSegError):
    """A training run cannot go on; its last whole checkpoint can."""


class OutputError(SeerSegError):
    """Results cannot be written."""


class SchedulerError(SeerSegError):
    """Slurm is missing, does not answer or refuses a job."""


class SomeCasesFailedError(SeerSegError):
    """Some cases failed; the rest is written."""

    exit_code = EXIT_SOME_FAILED


class NothingToDoError(SeerSegError):
    """The input held nothing to work on."""

    exit_code = EXIT_NOTHING_TO_DO


class InterruptedRunError(SeerSegError):
    """Stopped by a signal; running the same command again continues."""

    exit_code = EXIT_REQUEUE


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """' Did you mean a, b or c?' for the nearest of the known words, or '' when none is near."""
    folded = {k.casefold(): k for k in known}
    near = [folded[k] for k in difflib.get_close_matches(word.casefold(), folded, n=limit, cutoff=0.6)]
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else ", ".join(near[:-1]) + " or " + near[-1]
    return f" Did you mean {listed}?"
