"""What the stages from the choice to the report work with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmprune_cli.journal.journal import Journal
from llmprune_cli.progress import Listener
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import DenseStates, roomy_folder


@dataclass(frozen=True)
class Workbench:
    """The unpruned model, the text that it is run on, and where results and reports go."""

    model: LayeredModel
    text: CalibrationText | None  # None where nothing is measured or refitted
    listener: Listener
    journal: Journal = field(default_factory=Journal)
    offload_dir: Path | None = None  # for the hidden states of calibration text; None keeps them in memory
    serves_several: bool = False  # pruned models, so that it is worth keeping what the unpruned one makes of all text
    shows_answers: bool = True  # of a model that chats, in the card of a pruned one
    answers: list[str] = field(default_factory=list, compare=False, repr=False)  # of the unpruned one, once asked
    known: dict[str, DenseStates] = field(default_factory=dict, compare=False, repr=False)  # by what the text is for

    @property
    def all_layers_dir(self) -> Path:
        """Where the hidden states of all layers lie, which are too many for memory."""
        return self.offload_dir or roomy_folder(self.journal.folder)

    @property
    def dense(self) -> DenseStates:
        """What the unpruned model has made of the calibration text so far."""
        return self._states("fitted")

    @property
    def tried(self) -> DenseStates:
        """The same of the text on which candidates of a search are refitted and judged."""
        return self._states("tried")

    @property
    def judged(self) -> DenseStates:
        """The same of the text on which results are judged, behind whole layers."""
        return self._states("judged")

    def _states(self, text: str) -> DenseStates:
        return self.known.setdefault(text, DenseStates(self.all_layers_dir))
