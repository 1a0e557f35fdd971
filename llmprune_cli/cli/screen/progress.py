"""Progress and warnings on stderr: bars in a terminal, a few lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmprune_cli.progress import LOGGER, Estimate, Listener
from llmprune_cli.progress import Progress as Reached
from llmprune_cli.sizes import size_text

STEPS, STEP_S = 10, 60.0  # a line is due at so many places of a stage, or after so many seconds
LEAST_S = 2.0  # between two lines of a stage, however quick it is
MOST_COUNTED = 10**6  # a stage with more steps counts bytes, which say nothing to people


class _Warnings(logging.Handler):
    """Shows warnings beside the progress, each of them once."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self._shown = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text, wraps = record.getMessage(), self._console.is_terminal
        if text not in self._shown:
            self._shown.add(text)
            self._console.print(f"Warning: {text}", style="yellow", highlight=False, soft_wrap=not wraps)


@contextmanager
def progress_on_stderr(is_quiet: bool = False) -> Iterator[Listener]:
    """A listener that shows how far a run is; whatever is logged as a warning is shown there too.

    Args:
        is_quiet: whether warnings alone are shown.
    """
    console = Console(stderr=True, markup=False)
    warnings, propagated = _Warnings(console), LOGGER.propagate
    LOGGER.addHandler(warnings)
    LOGGER.propagate = False

    def expect(estimate: Estimate) -> None:
        console.print(estimate_text(estimate), highlight=False, soft_wrap=not console.is_terminal)

    with ExitStack() as started:
        started.callback(LOGGER.removeHandler, warnings)
        started.callback(setattr, LOGGER, "propagate", propagated)
        if is_quiet:
            yield Listener()
        elif console.is_terminal:
            yield Listener(_Bars(console, started).tell, expect=expect)
        else:
            yield Listener(Lines(console).tell, expect=expect)


class _Bars:
    """A bar for each stage, drawn from the first one on."""

    def __init__(self, console: Console, started: ExitStack) -> None:
        words = partial(TextColumn, markup=False)  # names of files may look like it
        columns = (words("{task.description}"), BarColumn(bar_width=20), words("{task.percentage:>3.0f}%"))
        note = words("{task.fields[note]}")
        self._bars = Progress(*columns, note, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._started = started
        self._current: Any = None

    def tell(self, now: Reached) -> None:
        """See `Told`."""
        if now.done == 0:  # a stage begins
            if self._current is None:
                self._started.enter_context(self._bars)
            self._current = self._bars.add_task(now.stage, total=now.total, note="")
        else:
            self._bars.update(self._current, completed=now.done, note=now.note)


class Lines:
    """A line for each stage, and within it for each tenth or minute."""

    def __init__(self, console: Console, clock: Any = time.monotonic) -> None:
        """Print to a console; a clock counts seconds."""
        self._console, self._clock = console, clock
        self._began = self._said_at = 0.0
        self._said = 0  # of the places, at the last line

    def tell(self, now: Reached) -> None:
        """See `Told`."""
        if now.done == 0:
            self._began = self._said_at = self._clock()
            self._said = 0
            self._print(now.stage)
            return
        share, place, at = now.done / max(now.total, 1), STEPS * now.done // max(now.total, 1), self._clock()
        since = at - self._said_at
        if (place > self._said and since >= LEAST_S) or since >= STEP_S:
            self._said, self._said_at = place, at
            self._print(f"{now.stage}: {_place(now)}, {self._times(share, at - self._began)}{_note(now)}")

    def _times(self, share: float, spent: float) -> str:
        left = spent / share - spent
        return f"{in_words(spent)}{f', about {in_words(left)} left' if left >= 0.5 else ''}"

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _place(now: Reached) -> str:
    percent = f"{100 * now.done // max(now.total, 1)}%"
    return percent if now.total > MOST_COUNTED else f"{now.done:,} of {now.total:,} ({percent})"


def _note(now: Reached) -> str:
    return f"; {now.note}" if now.note else ""


def estimate_text(estimate: Estimate) -> str:
    """What a run will take, in a line or two of 80 columns."""
    time_ = "a time that was not measured" if estimate.seconds is None else f"about {in_words(estimate.seconds)}"
    tried = f" and at most {estimate.candidates} candidates" if estimate.candidates else ""
    gpu = f", {size_text(estimate.device_bytes)} of GPU memory" if estimate.device_bytes else ""
    files = f" and {size_text(estimate.temporary_bytes)} of temporary files" if estimate.temporary_bytes else ""
    taken = f"Expect {time_}{tried}, {size_text(estimate.memory_bytes)} of memory{gpu},"
    return f"{taken}\n{size_text(estimate.disk_bytes)} of disk{files}."


def in_words(seconds: float) -> str:
    """A time for people: `41 s`, `6 min`, `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
