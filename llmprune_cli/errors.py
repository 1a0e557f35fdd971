"""The error tree: what a user can mend, and the exit code that says so.

LlmpruneError
├── UsageError           2   options that are malformed or contradict each other
├── CheckpointError      3   a checkpoint, text or plan file that is unreadable or contradicts itself
├── UnsupportedError     4   an architecture that the twin proof refuses
├── PlanError            5   widths that cannot be had
├── OutputError          6   a target that cannot be written
├── VerificationError    7   a result that is not what the plan predicted
├── PeerError            8   another process of the same run is gone; where that one said why, its code
└── ResourceError        9   memory that ran out

What Typer itself refuses exits 2 as well, Ctrl-C exits 130, and a bug keeps its traceback and exits 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

NO_MEMORY = ("out of memory", "not enough memory", "n't allocate memory", "cannot allocate memory")  # as they say it


class LlmpruneError(Exception):
    """An error whose message says what is wrong, where, and what to do next."""

    exit_code = 1


class UsageError(LlmpruneError):
    """Options that are malformed, or that contradict each other."""

    exit_code = 2


class CheckpointError(LlmpruneError):
    """A model, text or plan that cannot be read, or that contradicts itself."""

    exit_code = 3


class NoNumbersError(CheckpointError):
    """A model that turns text into NaN: nothing that was computed serves a later run."""


class UnsupportedError(LlmpruneError):
    """An architecture for which the twin proof does not hold."""

    exit_code = 4


class MissingPackageError(UnsupportedError):
    """A package that is not installed, without which nothing good comes of the run."""


class PlanError(LlmpruneError):
    """A request for widths that the architecture cannot have."""

    exit_code = 5


class OutputError(LlmpruneError):
    """A target that cannot be written."""

    exit_code = 6


class VerificationError(LlmpruneError):
    """An output that differs from what the plan predicted."""

    exit_code = 7


class DivergedError(VerificationError):
    """Training whose loss is no number: it would be none again, so that no work is worth going on with."""


class PeerError(LlmpruneError):
    """Another process of the same run that failed."""

    exit_code = 8

    def __init__(self, message: str, exit_code: int = exit_code) -> None:
        """With the other's message and exit code, where it gave any."""
        super().__init__(message)
        self.exit_code = exit_code


class ResourceError(LlmpruneError):
    """Memory that ran out."""

    exit_code = 9


@contextmanager
def memory_explained() -> Iterator[None]:
    """Say that memory ran out, also where that was taken for an error of another kind."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, LlmpruneError) as error:
        shortage = error if isinstance(error, MemoryError) else _shortage(error)
        if shortage is None:
            raise
        raise ResourceError(
            f"Memory ran out: {first_line(shortage)}. `eval` needs less with a smaller --max-seq-len or --batch-size, "
            "`prune` with fewer --calibration-tokens or with --offload-dir, `recover` with --lora or --train, "
            "--gradient-checkpointing, --teacher-mode streamed, smaller --batch-tokens or --mode blocks; --device "
            "names another one."
        ) from error


def _shortage(error: BaseException | None) -> BaseException | None:
    """What torch or the system said, in an error or its causes; a MemoryError there comes of lengths in bad files."""
    while error is not None:
        if isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in NO_MEMORY):
            return error
        error = error.__cause__
    return None


def first_line(error: BaseException) -> str:
    """The first line of what an error says, to be a part of our own message; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), repr(error))
