"""What the predictions lose when a part of one layer alone goes, for every layer and every width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from llmprune_cli.choose.layers.figures import WidthSensitivity
from llmprune_cli.choose.targets.limits import measure_size, whole_target
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.family.architecture import most_heads
from llmprune_cli.family.widths import HEAD_COUNTS, NEURONS, Width
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.legal import legal_experts
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.repair.dense_goals import Streams
from llmprune_cli.repair.layer_refit import LayerRefit
from llmprune_cli.run.divergence import Side, compare_all
from llmprune_cli.run.layer import check_states
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import copy_states

SHARE = 4  # one unit in so many goes
SENSITIVITY_TOKENS = 2048  # of held-out text, at most: the cost grows with the square of the number of layers


def reduced_targets(subject: Subject) -> dict[str, Target]:
    """For each width that a layer has units of, and that can be pruned, the widths with a quarter of these gone."""
    before, layers = subject.widths, tuple(range(subject.widths.num_hidden_layers))
    refused = subject.trace.refused
    changes = {name: sizes for name, sizes in _reductions(subject) if name not in refused}
    return {name: Target(replace(before, **sizes), layers, ()) for name, sizes in changes.items()}


def _reductions(subject: Subject) -> Iterator[tuple[str, dict[str, int]]]:
    before = subject.widths
    for width in NEURONS:
        if getattr(before, width) > 1:
            yield width, {width: _fewer(getattr(before, width))}
    groups, each = before.num_key_value_heads, before.heads_per_group
    fewer = most_heads(subject.architecture, groups, groups * _fewer(each)) if groups else 0
    if fewer < before.num_attention_heads and each > 1:
        yield Width.HEADS, {Width.HEADS: fewer}
    if groups > 1:
        fewer = _fewer(groups)
        name = Width.HEADS if each == 1 else Width.GROUPS  # where each query head has its own, they go together
        yield name, {Width.GROUPS: fewer, Width.HEADS: fewer * each}
    if before.num_experts:
        legal = legal_experts(subject.architecture)
        fewer = max((n for n in legal if n <= before.num_experts - before.num_experts // SHARE), default=0)
        if 0 < fewer < before.num_experts:
            yield Width.EXPERTS, {Width.EXPERTS: fewer}


def _fewer(count: int) -> int:
    return count - max(1, count // SHARE)


def measure_sensitivity(
    model: LayeredModel,
    plans: Mapping[str, Plan],
    windows: torch.Tensor,
    folder: Path,
    progress: Callable[[int], None],
) -> tuple[WidthSensitivity, ...]:
    """How far the predictions diverge when units of one width, or all of a layer, go from one layer alone.

    Nothing is refitted. The figure is the mean KL(p ‖ q) of the next token, of the whole model and of the one that
    lacks them. All models advance together, so that every layer of the whole one is loaded once; their hidden states
    are kept in files.

    Args:
        plans: by width, that keep all layers and fewer units of it.
        windows: token ids, [N, T], of held-out text, of which each process runs its share.
        folder: for the files, L times the number of widths and one times the hidden states of all tokens in float32.
        progress: told how many models went through a layer, see `steps`.

    Raises:
        CheckpointError: see `check_states`.
    """
    windows = model.share(windows, windows.shape[1])
    dense = model.embed(windows)
    without: dict[tuple[str, int], torch.Tensor] = {}
    for number in range(model.layers):
        own = {}
        for width, plan in plans.items():
            if _has_units(plan, width, number):
                own[width, number] = copy_states(dense, folder)
                _advance_without(model, plan, number, own[width, number])
        own[Width.LAYERS, number] = copy_states(dense, folder)
        layer = model.load_layer(number)
        for stream in (dense, *without.values()):
            layer.advance(stream)
        check_states(dense, f"Layer {number}")
        without |= own
        progress((number + 1) * (len(plans) + 1))
    ends, items = model.load_ends(exact=True), layer.returned_items(dense)
    sides = [Side(ends, states, items) for states in without.values()]
    found = compare_all(Side(ends, dense, items), sides, windows, model.processes)
    costs = dict(zip(without, found, strict=True))
    return tuple(_row(model.subject, width, plans, costs) for width in (*plans, Width.LAYERS))


def steps(layers: int, widths: int) -> int:
    """How often a model goes through a layer while so many widths are tried."""
    return (widths + 1) * layers * (layers + 1) // 2


def _has_units(plan: Plan, width: str, layer: int) -> bool:
    names = HEAD_COUNTS if width in HEAD_COUNTS else (width,)
    return any(place.layer == layer for name in names for place in plan.keep.get(name, {}))


def _advance_without(model: LayeredModel, plan: Plan, number: int, stream: torch.Tensor) -> None:
    """Take hidden states [N, T, D] through a layer without the units that go; what reads them stays as it is."""
    LayerRefit(model.load_layer(number), model, plan, number, Streams(stream, stream, 0)).only_remove()


def _row(
    subject: Subject, width: str, plans: Mapping[str, Plan], costs: Mapping[tuple[str, int], float]
) -> WidthSensitivity:
    whole = whole_target(subject)
    kl = tuple(costs.get((width, number)) for number in whole.layers)
    if width == Width.LAYERS:
        inside = sum(entry.numel for entry in subject.checkpoint.entries if split_name(entry.name)[1])
        return WidthSensitivity(width, 1, 1, inside // len(kl), kl)
    after = plans[width].after
    units, left = getattr(subject.widths, width), getattr(after, width)
    gone = measure_size(subject, whole)[0] - measure_size(subject, replace(whole, widths=after))[0]
    return WidthSensitivity(width, units, units - left, gone // max(1, sum(each is not None for each in kl)), kl)
