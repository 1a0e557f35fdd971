"""Importance of units from weights alone, read tensor by tensor.

An importance is one function with the signature of `Importance`; adding it to `IMPORTANCES` makes it an option.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmprune_cli.architecture import Widths, split_name
from llmprune_cli.checkpoint import Checkpoint
from llmprune_cli.groups import Binding, Trace, instance_of

if TYPE_CHECKING:
    import torch

Scores = dict[str, dict[str, "torch.Tensor"]]  # width → instance → score of each unit, float32 [units]
Progress = Callable[[int], None]  # told the bytes that were just read
Importance = Callable[[Checkpoint, Trace, Widths, int, Progress], Scores]

SLAB_BYTES = 64 * 2**20  # squares of a larger tensor are formed slab by slab, so that memory stays bounded
HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"


def score_magnitude(checkpoint: Checkpoint, trace: Trace, widths: Widths, seed: int, progress: Progress) -> Scores:
    """Group magnitude as torch-pruning computes it (`GroupMagnitudeImportance(p=2, group_reduction="mean")`).

    The score of an element is the sum of squared weights, in the checkpoint's dtype, over its row in each tensor that
    writes it and its column in each that reads it; the terms are added in float32, divided by their number and by the
    mean over the elements. A unit's score is the mean over its elements (DepGraph, arXiv 2301.12900, section 3.3).

    A query head's terms are its own query rows and output columns. A KV group's are its key and value rows and the rows
    and columns of all its query heads.
    """
    import torch

    bindings = {template: trace.on(template) for template in trace.scored}
    copies = {
        width: max((b.copies for b in trace.of(width) if b.template in trace.scored), default=1) for width in WIDTHS
    }
    totals: dict[tuple[str, str], torch.Tensor] = {}
    terms: dict[tuple[str, str], int] = defaultdict(int)
    for entry, tensor in checkpoint.tensors():
        template, numbers = split_name(entry.name)
        on_template = bindings.get(template, ())
        sums = squared_sums(tensor, {binding.axis for binding in on_template})
        for binding in on_template:
            units, elements = binding.units(widths), binding.elements(widths)
            valid = units >= 0
            for width, index, size in _places(binding, units, elements, copies, widths):
                key = width, instance_of(width, numbers)
                total = totals.setdefault(key, torch.zeros(size))
                total.index_add_(0, index[valid], sums[binding.axis][valid])
                terms[key] += 1
        progress(entry.size_bytes)
    scores: Scores = defaultdict(dict)
    for (width, instance), total in totals.items():
        total /= terms[width, instance]
        total /= total.mean()
        count = getattr(widths, width)
        by_unit = total.view(count, -1).mean(1) if width in (HEADS, GROUPS) else total.view(-1, count).mean(0)
        scores[width][instance] = by_unit
    return dict(scores)


def score_random(checkpoint: Checkpoint, trace: Trace, widths: Widths, seed: int, progress: Progress) -> Scores:
    """Uniform random scores, the baseline that every method must beat; no weight is read.

    Each choice of units draws from its own stream, so that one width's scores do not depend on the others.
    """
    import torch

    scores: Scores = defaultdict(dict)
    for width, instance in instances(checkpoint, trace):
        stream = zlib.crc32(f"{width}/{instance}/{seed}".encode())
        scores[width][instance] = torch.rand(getattr(widths, width), generator=torch.Generator().manual_seed(stream))
    progress(checkpoint.size_bytes)
    return dict(scores)


IMPORTANCES: dict[str, Importance] = {"magnitude": score_magnitude, "random": score_random}
WIDTHS = ("hidden_size", HEADS, GROUPS, "intermediate_size")


def instances(checkpoint: Checkpoint, trace: Trace) -> Iterator[tuple[str, str]]:
    """Every (width, instance) for which units have to be chosen, each once, in the order of the checkpoint."""
    seen: dict[tuple[str, str], None] = {}
    for entry in checkpoint.entries:
        template, numbers = split_name(entry.name)
        for binding in trace.on(template):
            widths = (HEADS, GROUPS) if binding.width == HEADS else (binding.width,)
            seen.update({(width, instance_of(width, numbers)): None for width in widths})
    yield from seen


def squared_sums(tensor: torch.Tensor, axes: set[int]) -> dict[int, torch.Tensor]:
    """For each axis, the sums of squares over all other axes, rounded in the tensor's dtype, as float32 [axis size]."""
    if not axes:
        return {}
    if tensor.nbytes <= SLAB_BYTES:
        squares = tensor.square()
        return {axis: squares.movedim(axis, 0).reshape(tensor.shape[axis], -1).sum(1).float() for axis in axes}
    return {axis: _slab_sums(tensor, axis) for axis in axes}


def _slab_sums(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    import torch

    slabs = math.ceil(tensor.nbytes / SLAB_BYTES)
    parts = torch.tensor_split(tensor, slabs, dim=axis)
    return torch.cat([part.square().movedim(axis, 0).flatten(1).sum(1).float() for part in parts])


def _places(
    binding: Binding, units: torch.Tensor, elements: torch.Tensor, copies: dict[str, int], widths: Widths
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Where the sums of a binding's axis are added: width, index of each axis element, length of the vector.

    Heads: unit by unit, P elements each. Neurons: copy by copy; a tensor that holds fewer copies than the gate|up
    projection adds to the last ones, as torch-pruning does.
    """
    if binding.width not in (HEADS, GROUPS):
        count, total = getattr(widths, binding.width), copies[binding.width]
        yield binding.width, (total - binding.copies + elements) * count + units, total * count
        return
    within = elements % widths.head_dim
    count = getattr(widths, binding.width)
    yield binding.width, units * widths.head_dim + within, count * widths.head_dim
    if binding.width == HEADS:
        groups = units // widths.heads_per_group
        yield GROUPS, groups * widths.head_dim + within, widths.num_key_value_heads * widths.head_dim
