"""The model that a command is about: a checkpoint, and what was found out about its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune_cli.coupling.trace import Trace
from llmprune_cli.coupling.twin import settle_head_dim, trace
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture, Widths, discover, expected_index, with_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import TensorEntry, split_name
from llmprune_cli.plan.target import Target, predicted_tensors
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.run.layered_model import LayeredModel


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

    def layered(self, device: str) -> LayeredModel:
        """The same model, to be run one layer at a time on a device."""
        return LayeredModel(self.checkpoint, self.architecture, device, self.processes)

    def require(self, widths: Widths) -> None:
        """Make sure that this family can be pruned to these widths.

        Raises:
            UnsupportedError: it cannot in one of those that change.
        """
        for width in widths.changed_from(self.widths):
            if width in self.trace.refused:
                family = self.architecture.config.model_type
                raise UnsupportedError(f"{family} cannot be pruned in {width}: {self.trace.refused[width]}.")

    def predict(self, target: Target) -> tuple[TensorEntry, ...]:
        """The tensors after pruning, and the Counting oracle: shapes by plan must equal shapes by configuration.

        Raises:
            UnsupportedError: they differ.
        """
        stored = self.checkpoint.entries
        after = predicted_tensors({entry.name: entry.shape for entry in stored}, self.trace, self.widths, target)
        expected = expected_index(with_widths(self.architecture, target.widths, target.layers))
        wrong = [name for name in after if after[name] != expected.get(name)] + sorted(expected.keys() - after.keys())
        if wrong:
            raise UnsupportedError(
                f"{wrong[0]} would become {after.get(wrong[0])}, but a config.json with these widths makes it "
                f"{expected.get(wrong[0])}, by a rule of {self.architecture.config.model_type} that is not known here. "
                "Prune other widths, or drop other layers."
            )
        dtypes = {split_name(entry.name)[0]: entry.dtype for entry in stored}
        return tuple(TensorEntry(name, shape, dtypes[split_name(name)[0]], None) for name, shape in after.items())


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
