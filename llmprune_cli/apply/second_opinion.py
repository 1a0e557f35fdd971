"""A second opinion on the trace: torch-pruning's dependency graph, where it speaks reliably."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator
from typing import Any

from torch import nn

from llmprune_cli.coupling.trace import Binding, Trace
from llmprune_cli.coupling.twin import Twin, build_twin, trace_sizes
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.family.widths import NEURONS, Width
from llmprune_cli.folder.tensors import split_name

Place = tuple[str, int]  # (tensor name, axis)


def hold_against_torch_pruning(architecture: Architecture, traced: Trace) -> int:
    """Compare the channels and the neurons of linear layers with torch-pruning's groups on the same twin.

    Attention is left out, where the graph loses grouped queries, and so is whatever the graph cannot build: fused
    experts are bare parameters, and GPT-2's `Conv1D` is unknown to it.

    Returns:
        How many groups were compared.

    Raises:
        UnsupportedError: the two couple different tensors or indices.
    """
    compared = 0
    for _, difference in _compared(architecture, traced):
        if difference:
            raise UnsupportedError(difference)
        compared += 1
    return compared


def disagreements(architecture: Architecture, traced: Trace) -> dict[str, str]:
    """The widths of which torch-pruning couples other tensors or indices than the trace, and which."""
    found: dict[str, str] = {}
    for width, difference in _compared(architecture, traced):
        if difference:
            found.setdefault(width, difference)
    return found


def _compared(architecture: Architecture, traced: Trace) -> Iterator[tuple[str, str]]:
    """The width of each group that is compared, and how the two differ about it; empty where they agree."""
    twin = build_twin(architecture, trace_sizes(architecture.config))
    tied = bool(getattr(twin.model, "all_tied_weights_keys", None))
    for width, unit, group in _groups(twin, traced):
        ours, difference = _ours(twin, traced, width, unit, group), ""
        for place in ours.keys() | group.keys():
            # the graph knows no ties: what a module before a tied output projection makes are channels of its own to it
            is_before_tied = tied and width == Width.HIDDEN and place not in group and not split_name(place[0])[1]
            if ours.get(place) != group.get(place) and not is_before_tied:
                difference = (
                    f"torch-pruning and the twin disagree about {place[0]}, axis {place[1]}: of {width} {unit} "
                    f"one says {group.get(place, ())}, the other {ours.get(place, ())}. This layout is not supported."
                )
                break
        yield width, difference


def _groups(twin: Twin, traced: Trace) -> Iterator[tuple[str, int, dict[Place, tuple[int, ...]]]]:
    """Width, unit and torch-pruning's indices on linear layers, for a unit of every MLP and a channel."""
    import torch_pruning as tp

    twin.model.config.use_cache = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tp.DependencyGraph().build_dependency(
                twin.model, example_inputs=twin.tokens, output_transform=lambda output: output.logits
            )
    except Exception:  # it fails in as many ways as there are models; the gradients speak alone then
        return
    names = {module: name for name, module in twin.model.named_modules()}
    stored = expected_index(twin.architecture.config)  # tied and renamed tensors have other names there: left out
    channels = not twin.architecture.widths.num_experts
    for module, name in names.items():
        if not isinstance(module, nn.Linear):
            continue
        for binding in traced.on(split_name(f"{name}.weight")[0]):
            begins = channels and bool(split_name(name)[1])  # outside layers it may be a head before a tied projection
            if binding.axis != 0 or not (binding.width in NEURONS or (_is_channel(binding) and begins)):
                continue
            channels = channels and binding.width != "hidden_size"  # one group of channels is all of them
            unit = getattr(twin.architecture.widths, binding.width) // 2
            start = (binding.units(twin.architecture.widths, module.out_features) == unit).nonzero().flatten().tolist()
            try:
                group = graph.get_pruning_group(module, tp.prune_linear_out_channels, idxs=start)
            except Exception:  # likewise, in state-space layers
                continue
            places = _linear_places(group, names, stored)
            if all(max(indices) < _size(twin, place) for place, indices in places.items()):  # else it missed a split
                yield binding.width, unit, places


def _is_channel(binding: Binding) -> bool:
    return binding.is_global and binding.width == Width.HIDDEN


def _size(twin: Twin, place: Place) -> int:
    return twin.model.get_parameter(place[0]).shape[place[1]]


def _linear_places(group: Any, names: dict[nn.Module, str], stored: Container[str]) -> dict[Place, tuple[int, ...]]:
    found: dict[Place, set[int]] = {}
    for dependency, indices in group:
        module = dependency.target.module
        if isinstance(module, nn.Linear) and f"{names[module]}.weight" in stored:
            axis = int("in_channels" in dependency.handler.__name__)
            found.setdefault((f"{names[module]}.weight", axis), set()).update(indices)
    return {place: tuple(sorted(indices)) for place, indices in found.items()}


def _ours(
    twin: Twin, traced: Trace, width: str, unit: int, group: dict[Place, tuple[int, ...]]
) -> dict[Place, tuple[int, ...]]:
    """The indices that the trace couples, on the linear layers with the numbers of the group's."""
    numbers = {split_name(name)[1] for name, _ in group}
    found = {}
    for name, module in twin.model.named_modules():
        template, own = split_name(f"{name}.weight")
        if isinstance(module, nn.Linear) and (own in numbers or width == "hidden_size"):
            for binding in traced.on(template):
                if binding.width == width and (_is_channel(binding) or width in NEURONS):
                    same = binding.units(twin.architecture.widths, module.weight.shape[binding.axis]) == unit
                    found[f"{name}.weight", binding.axis] = tuple(same.nonzero().flatten().tolist())
    return found
