"""What came of questions, without any library: reports are read where no model is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResult:
    """One figure of one task."""

    task: str  # as the harness calls it
    metric: str  # such as acc, or exact_match,strict-match where answers are filtered
    value: float
    stderr: float | None  # standard error of the value; None where the harness knows none
    questions: int
    shots: int  # answered examples before each question
    version: str
    higher_is_better: bool | None  # None where that is not known
    part_of: str | None  # the group of tasks that it belongs to


@dataclass(frozen=True)
class Answered:
    """A prompt, and the beginnings of two answers to it."""

    prompt: str
    before: str  # by the model before pruning
    after: str
