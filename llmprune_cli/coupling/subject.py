"""The model that a command is about: a checkpoint, and what was found out about its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune_cli.coupling.discovery import trace
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.coupling.twin import settle_head_dim
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture, discover
from llmprune_cli.family.widths import Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.processes import ALONE, Processes


@dataclass(frozen=True)
class Subject:
    """A checkpoint together with what was found out about its architecture."""

    checkpoint: Checkpoint
    architecture: Architecture
    trace: Trace
    processes: Processes = ALONE  # that share the text on which the model is run
    folded_norms: Mapping[str, float] = field(default_factory=dict)  # see `surgery.pruned_tensors`

    @property
    def widths(self) -> Widths:
        """The widths before pruning."""
        return self.architecture.widths

    def require(self, widths: Widths) -> None:
        """Make sure that this family can be pruned to these widths.

        Raises:
            UnsupportedError: it cannot in one of those that change.
        """
        for width in widths.changed_from(self.widths):
            if width in self.trace.refused:
                family = self.architecture.config.model_type
                raise UnsupportedError(f"{family} cannot be pruned in {width}: {self.trace.refused[width]}.")


def understand(checkpoint: Checkpoint, processes: Processes = ALONE) -> Subject:
    """Trace a checkpoint's architecture and hold the trace against its shapes.

    Args:
        processes: that share the text on which the model is run.

    Raises:
        UnsupportedError: no twin can be built, or the shapes follow other rules.
    """
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    architecture = settle_head_dim(discover(checkpoint.config, shapes))
    traced = trace(architecture)
    traced.check(shapes, architecture.widths)
    return Subject(checkpoint, architecture, traced, processes)
