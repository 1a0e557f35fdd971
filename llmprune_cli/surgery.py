"""Slice tensors by a plan, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from llmprune_cli.architecture import split_name
from llmprune_cli.checkpoint import Checkpoint, TensorEntry
from llmprune_cli.errors import PlanError
from llmprune_cli.groups import GLOBAL_WIDTHS, Trace, chosen_for, kept_mask
from llmprune_cli.plan import Plan, predicted_shapes

if TYPE_CHECKING:
    import torch


def pruned_entries(checkpoint: Checkpoint, trace: Trace, plan: Plan) -> tuple[TensorEntry, ...]:
    """What `pruned_tensors` will yield: names, dtypes and the shapes that follow from the widths alone."""
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    after = predicted_shapes(shapes, trace, plan.before, plan.after)
    return tuple(replace(entry, shape=after[entry.name]) for entry in checkpoint.entries)


def pruned_tensors(
    checkpoint: Checkpoint, trace: Trace, plan: Plan, progress: Callable[[int], None]
) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """Every tensor cut to the units that stay, in the order in which the checkpoint holds them.

    Raises:
        PlanError: the plan says nothing about a layer that its widths would cut.
    """

    @lru_cache(maxsize=256)
    def indices(template: str, numbers: tuple[int, ...], axis: int) -> torch.Tensor | None:
        mask = kept_mask(trace, template, axis, chosen_for(plan.keep, numbers), plan.before)
        return None if bool(mask.all()) else mask.nonzero().flatten()

    @cache
    def axes(template: str) -> tuple[tuple[int, bool], ...]:
        """The axes that may be cut, and whether all layers cut them alike."""
        bindings = trace.on(template)
        return tuple(
            (axis, all(b.width in GLOBAL_WIDTHS for b in bindings if b.axis == axis))
            for axis in sorted({binding.axis for binding in bindings})
        )

    entries = {entry.name: entry for entry in pruned_entries(checkpoint, trace, plan)}
    for entry, tensor in checkpoint.tensors():
        template, numbers = split_name(entry.name)
        for axis, alike in axes(template):
            index = indices(template, () if alike else numbers, axis)
            if index is not None:
                tensor = take(tensor, axis, index)
        if tuple(tensor.shape) != entries[entry.name].shape:
            raise PlanError(f"The plan's units and widths disagree about {entry.name}. Make the plan anew.")
        progress(entry.size_bytes)
        yield entries[entry.name], tensor


def take(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """`index_select`, bit for bit, through NumPy, which is several times as fast along the inner axis."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    taken = tensor.view(bits).numpy().take(index.numpy(), axis=axis)
    return torch.from_numpy(taken).view(tensor.dtype)
