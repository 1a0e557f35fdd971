"""What a target makes of a model's tensors, held against what its configuration makes of them."""

from __future__ import annotations

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import expected_index, with_widths
from llmprune_cli.folder.checkpoint import TensorEntry
from llmprune_cli.folder.names import split_name
from llmprune_cli.plan.target import Target, predicted_tensors


def predict(subject: Subject, target: Target) -> tuple[TensorEntry, ...]:
    """The tensors after pruning, and the Counting oracle: shapes by plan must equal shapes by configuration.

    Raises:
        UnsupportedError: they differ.
    """
    stored = subject.checkpoint.entries
    after = predicted_tensors({entry.name: entry.shape for entry in stored}, subject.trace, subject.widths, target)
    expected = expected_index(with_widths(subject.architecture, target.widths, target.layers))
    wrong = [name for name in after if after[name] != expected.get(name)] + sorted(expected.keys() - after.keys())
    if wrong:
        raise UnsupportedError(
            f"{wrong[0]} would become {after.get(wrong[0])}, but a config.json with these widths makes it "
            f"{expected.get(wrong[0])}, by a rule of {subject.architecture.config.model_type} that is not known here. "
            "Prune other widths, or drop other layers."
        )
    dtypes = {split_name(entry.name)[0]: entry.dtype for entry in stored}
    return tuple(TensorEntry(name, shape, dtypes[split_name(name)[0]], None) for name, shape in after.items())
