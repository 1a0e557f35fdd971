"""What a model's tensors will be, before any is read."""

from __future__ import annotations

from typing import Any

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Instance, Keep, Trace, kept_mask, new_name, renumbered
from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.architecture import with_widths
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.family.widths import NEURONS, Width, Widths
from llmprune_cli.folder.tensors import Shape, TensorEntry, split_name
from llmprune_cli.plan.requested_widths import Target


def predict(subject: Subject, target: Target) -> tuple[TensorEntry, ...]:
    """The tensors after pruning, and the Counting oracle: shapes by plan must equal shapes by configuration.

    Raises:
        UnsupportedError: they differ.
    """
    architecture, stored = subject.architecture, subject.checkpoint.entries
    shapes = {entry.name: entry.shape for entry in stored}
    after = predicted_tensors(shapes, subject.trace, subject.widths, target)
    try:
        expected = expected_index(with_widths(architecture, target.widths, target.layers))
    except CheckpointError as error:
        raise UnsupportedError(
            f"{architecture.config.model_type} builds no model of these widths ({str(error).rstrip('.')}). Prune other "
            "widths, or drop other layers."
        ) from error
    wrong = [name for name in after if after[name] != expected.get(name)] + sorted(expected.keys() - after.keys())
    if wrong:
        raise UnsupportedError(
            f"{wrong[0]} would become {after.get(wrong[0])}, but a config.json with these widths makes it "
            f"{expected.get(wrong[0])}, by a rule of {architecture.config.model_type} that is not known here. "
            "Prune other widths, or drop other layers."
        )
    dtypes = {split_name(entry.name)[0]: entry.dtype for entry in stored}
    return tuple(TensorEntry(name, shape, dtypes[split_name(name)[0]], None) for name, shape in after.items())


def predicted_tensors(shapes: dict[str, Shape], trace: Trace, before: Widths, target: Target) -> dict[str, Shape]:
    """Names and shapes after pruning, from the target alone: as if the first units stayed everywhere."""
    after = target.widths
    heads = tuple(
        group * before.heads_per_group + head
        for group in range(after.num_key_value_heads)
        for head in range(after.heads_per_group)
    )
    chosen = {
        width: tuple(range(getattr(after, width)))
        for width in (Width.HIDDEN, Width.GROUPS, Width.EXPERTS, Width.LAYERS, *NEURONS)
    }
    chosen[Width.HEADS] = heads
    keep: Keep = {width: _Everywhere(units) for width, units in chosen.items()}
    counts: dict[tuple[str, Shape], dict[int, int]] = {}
    result = {}
    layers, first_experts = renumbered(target.layers), renumbered(chosen[Width.EXPERTS])
    experts = {Instance(layer): first_experts for layer in target.layers}
    for name, shape in shapes.items():
        new = new_name(name, trace, layers, experts)
        if new is None:
            continue
        template, numbers = split_name(name)
        if (template, shape) not in counts:
            axes = {binding.axis for binding in trace.on(template)}
            counts[template, shape] = {
                axis: int(kept_mask(trace, template, (axis, shape[axis]), numbers, keep, before).sum()) for axis in axes
            }
        result[new] = tuple(counts[template, shape].get(axis, size) for axis, size in enumerate(shape))
    return result


class _Everywhere(dict[Instance, tuple[int, ...]]):
    """The same units for every instance."""

    def __init__(self, units: tuple[int, ...]) -> None:
        self._units = units

    def get(self, instance: Instance, default: Any = None) -> Any:
        return self._units
