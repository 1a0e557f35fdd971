"""Whom every loss is told as it comes, beside the screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback

from llmprune_cli.errors import OutputError, first_line

PROJECT = "llmprune"  # that trackio has runs of


@dataclass(frozen=True)
class Reports:
    """Whom losses are told."""

    to: str  # see `REPORTERS`
    folder: Path  # for TensorBoard's
    run: str  # what trackio calls it; the same when it goes on

    def begin(self) -> TrainerCallback:
        """What tells them."""
        if self.to == "trackio":
            return _Trackio()  # type: ignore[no-untyped-call]
        board = TensorBoardCallback()
        board.logging_dir = board.logging_dir or str(self.folder)  # which the user's environment may name
        return board


class _Trackio(TrackioCallback):
    """What keeps a run where trackio keeps all of them, or uploads it where its variables say so."""

    def setup(self, *arguments: Any, **named: Any) -> None:
        try:
            super().setup(*arguments, **named)  # type: ignore[no-untyped-call]
        except Exception as error:  # databases and connections raise every kind
            raise OutputError(
                f"trackio cannot begin a run: {first_line(error).rstrip('.')}. Mend that (variables such "
                "as TRACKIO_SPACE_ID say where it goes), or leave out --report-to trackio."
            ) from error

    def close(self) -> None:
        """End a run that did not come to its end, which would be ended later, with words to stdout."""
        if self._initialized:
            self._initialized = False
            self._trackio.finish()


def end_reports(callbacks: Iterable[TrainerCallback]) -> None:
    """End what a training did not."""
    for own in callbacks:
        if isinstance(own, _Trackio):
            own.close()
