"""What the stages from the choice to the report work with."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llmprune_cli.journal.journal import Journal
from llmprune_cli.progress import Listener
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import DenseStates


@dataclass(frozen=True)
class Workbench:
    """The unpruned model, the text that it is run on, and where results and reports go."""

    model: LayeredModel
    text: CalibrationText | None  # None where nothing is measured or refitted
    listener: Listener
    journal: Journal = field(default_factory=Journal)
    offload_dir: Path | None = None  # for the hidden states of calibration text; None keeps them in memory

    @property
    def all_layers_dir(self) -> Path:
        """Where the hidden states of all layers lie, which are too many for memory."""
        return self.offload_dir or Path(tempfile.gettempdir())

    @cached_property
    def dense(self) -> DenseStates:
        """What the unpruned model has made of the calibration text so far."""
        return DenseStates(self.all_layers_dir)
