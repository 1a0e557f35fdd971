"""Progress bars and warnings on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmprune_cli.progress import LOGGER, Listener
from llmprune_cli.progress import Progress as Reached


class _Warnings(logging.Handler):
    """Shows warnings beside the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(f"Warning: {record.getMessage()}", style="yellow", highlight=False)


@contextmanager
def progress_on_stderr() -> Iterator[Listener]:
    """A listener that draws progress bars on stderr; whatever is logged as a warning is shown there too."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bars = Progress(
        *columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )
    warnings, propagated = _Warnings(console), LOGGER.propagate
    LOGGER.addHandler(warnings)
    LOGGER.propagate = False
    with ExitStack() as started:
        started.callback(LOGGER.removeHandler, warnings)
        started.callback(setattr, LOGGER, "propagate", propagated)
        current: list[Any] = []

        def tell(now: Reached) -> None:
            if now.done == 0:  # a stage begins
                if not current:
                    started.enter_context(bars)
                current[:] = [bars.add_task(now.stage, total=now.total, note="")]
            else:
                bars.update(current[0], completed=now.done, note=now.note)

        yield Listener(tell)
