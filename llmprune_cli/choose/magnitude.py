"""Importance of units from weights alone, read tensor by tensor."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from llmprune_cli.coupling.trace import Binding, Instance, Trace, instance_of
from llmprune_cli.errors import CheckpointError
from llmprune_cli.family.widths import HEAD_COUNTS, Width, Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import Shape, split_name
from llmprune_cli.plan.units import Scores

Progress = Callable[[int], None]  # told the bytes that were just read

SLAB_BYTES = 64 * 2**20  # squares of a larger tensor are formed slab by slab, so that memory stays bounded


def score_magnitude(checkpoint: Checkpoint, trace: Trace, widths: Widths, seed: int, progress: Progress) -> Scores:
    """Group magnitude as torch-pruning computes it (`GroupMagnitudeImportance(p=2, group_reduction="mean")`).

    The score of an element is the sum of squared weights, in the checkpoint's dtype (float32 where float16 overflows),
    over its row in each tensor that writes it and its column in each that reads it; the terms are added in float32,
    divided by their number and by the mean over the elements. A unit's score is the mean over its elements (DepGraph,
    arXiv 2301.12900, section 3.3).

    A query head's terms are its own query rows and output columns. A KV group's are its key and value rows and the rows
    and columns of all its query heads. An expert's are all its weights and its row in the router.
    """
    terms_of: dict[tuple[str, Shape], tuple[_Term, ...]] = {}
    totals: dict[tuple[str, Instance], torch.Tensor] = {}
    terms: dict[tuple[str, Instance], int] = defaultdict(int)
    scratch = torch.empty(min(SLAB_BYTES, max(entry.size_bytes for entry in checkpoint.entries)), dtype=torch.uint8)
    for entry, tensor in checkpoint.tensors():
        template, numbers = split_name(entry.name)
        if (template, entry.shape) not in terms_of:
            terms_of[template, entry.shape] = _terms(trace, template, entry.shape, widths)
        on_template = terms_of[template, entry.shape]
        sums = squared_sums(tensor, {term.axis for term in on_template}, scratch)
        for term in on_template:
            key = term.width, instance_of(term.binding, numbers)
            if key not in totals:
                totals[key] = torch.zeros(term.size)
            totals[key].index_add_(0, term.target, sums[term.axis][term.source])
            terms[key] += 1
        if template in trace.expert_templates and template in trace.scored:
            key = Width.EXPERTS, Instance(numbers[0])
            totals.setdefault(key, torch.zeros(widths.num_experts))[numbers[1]] += whole_sum(tensor, scratch)
        progress(entry.size_bytes)
    scores: Scores = defaultdict(dict)
    for (width, instance), total in totals.items():
        total /= max(1, terms[width, instance])
        total /= total.mean().clamp_min(torch.finfo(total.dtype).tiny)  # where all weights are zero, scores are too
        count = getattr(widths, width)
        by_unit = total.view(count, -1).mean(1) if width in HEAD_COUNTS else total.view(-1, count).mean(0)
        scores[width][instance] = by_unit
    return dict(scores)


def score_random(checkpoint: Checkpoint, trace: Trace, widths: Widths, seed: int, progress: Progress) -> Scores:
    """Uniform random scores, the baseline that every method must beat; no weight is read.

    Each choice of units draws from its own stream, so that one width's scores do not depend on the others.
    """
    scores: Scores = defaultdict(dict)
    for width, instance in instances(checkpoint, trace):
        stream = zlib.crc32(f"{width}/{instance}/{seed}".encode())
        scores[width][instance] = torch.rand(getattr(widths, width), generator=torch.Generator().manual_seed(stream))
    progress(checkpoint.size_bytes)
    return dict(scores)


def check_scores(scores: Scores) -> None:
    """Hold that units can be ranked.

    Raises:
        CheckpointError: scores are NaN or infinite.
    """
    for width, by_instance in scores.items():
        for instance, score in by_instance.items():
            if not score.isfinite().all():
                place = "" if instance.layer is None else f" of layer {instance.layer}"
                raise CheckpointError(
                    f"The scores by {width}{place} are NaN or infinite: weights that count there are damaged. Download "
                    "the checkpoint again."
                )


def instances(checkpoint: Checkpoint, trace: Trace) -> Iterator[tuple[str, Instance]]:
    """Every (width, instance) for which units have to be chosen, each once, in the order of the checkpoint."""
    seen: dict[tuple[str, Instance], None] = {}
    for entry in checkpoint.entries:
        template, numbers = split_name(entry.name)
        for binding in trace.on(template):
            instance = instance_of(binding, numbers)
            widths = HEAD_COUNTS if binding.width == Width.HEADS else (binding.width,)
            seen.update({(width, instance): None for width in widths})
    yield from seen


def squared_sums(tensor: torch.Tensor, axes: set[int], scratch: torch.Tensor) -> dict[int, torch.Tensor]:
    """For each axis, the sums of squares over all other axes, rounded in the tensor's dtype, as float32 [axis size].

    Args:
        scratch: bytes for the squares, which fresh memory would cost more than the squaring; a tensor that does not fit
            is squared slab by slab, each axis on its own.
    """
    sums = _squared_sums(tensor, axes, scratch, tensor.dtype)
    if tensor.dtype == torch.float16 and not all(own.isfinite().all() for own in sums.values()):
        sums = _squared_sums(tensor, axes, scratch, torch.float32)  # squares, or their sums, were beyond 65,504
    return sums


def _squared_sums(
    tensor: torch.Tensor, axes: set[int], scratch: torch.Tensor, dtype: torch.dtype
) -> dict[int, torch.Tensor]:
    size = tensor.numel() * dtype.itemsize
    if not axes:
        return {}
    if size <= scratch.numel():
        squares = _squares(tensor.to(dtype), scratch)
        return {axis: _sums_along(squares, axis) for axis in axes}
    slabs = math.ceil(size / scratch.numel())
    parts = {axis: torch.tensor_split(tensor, slabs + 1, dim=axis) for axis in axes}
    return {axis: torch.cat([_sums_along(_squares(p.to(dtype), scratch), axis) for p in parts[axis]]) for axis in axes}


def whole_sum(tensor: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The sum of all squares, its rows summed in the tensor's dtype; a float32 scalar."""
    return squared_sums(tensor, {0}, scratch)[0].sum()


def _squares(tensor: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    if tensor.nbytes > scratch.numel():
        return tensor.square()  # one unit alone is larger than a slab
    return torch.square(tensor, out=scratch[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))


def _sums_along(squares: torch.Tensor, axis: int) -> torch.Tensor:
    return squares.movedim(axis, 0).reshape(squares.shape[axis], -1).sum(1).float()


@dataclass(frozen=True)
class _Term:
    """Where the sums along one axis of a template are added."""

    binding: Binding
    width: str  # the binding's, or KV groups where the units are query heads
    axis: int
    source: torch.Tensor  # which elements of the axis count
    target: torch.Tensor  # where in the vector of the width's elements each of them is added
    size: int  # of that vector


def _terms(trace: Trace, template: str, shape: Shape, widths: Widths) -> tuple[_Term, ...]:
    """What a template's tensors of a shape add to.

    Heads: unit by unit, P elements each. Neurons: copy by copy; a tensor that holds fewer copies than the gate|up
    projection adds to the last ones, as torch-pruning does.
    """
    found = []
    for binding in trace.on(template) if template in trace.scored else ():
        units, elements = (of(widths, shape[binding.axis]) for of in (binding.units, binding.elements))
        source = (units >= 0).nonzero().flatten()
        units, elements = units[source], elements[source]
        count = getattr(widths, binding.width)
        if binding.width not in HEAD_COUNTS:
            alike = (b for b in trace.of(binding.width) if b.component == binding.component)
            copies = max(other.copies for other in alike if other.template in trace.scored)
            target = (copies - binding.copies + elements) * count + units
            found.append(_Term(binding, binding.width, binding.axis, source, target, copies * count))
            continue
        within = elements % widths.head_dim
        target = units * widths.head_dim + within
        found.append(_Term(binding, binding.width, binding.axis, source, target, count * widths.head_dim))
        if binding.width == Width.HEADS:
            target = units // widths.heads_per_group * widths.head_dim + within
            size = widths.num_key_value_heads * widths.head_dim
            found.append(_Term(binding, Width.GROUPS, binding.axis, source, target, size))
    return tuple(found)
