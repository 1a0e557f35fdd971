"""From the unit at each index of an axis to a binding that says so at any size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune_cli.coupling.step import Followers, Place, changed_axes, followers_of
from llmprune_cli.coupling.trace import Binding
from llmprune_cli.coupling.twin import Twin
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.family.architecture import Architecture, reconfigure
from llmprune_cli.family.layers import layer_changes
from llmprune_cli.family.skeleton import shapes_of
from llmprune_cli.family.widths import Width, Widths, field_changes
from llmprune_cli.folder.tensors import split_name


def bind(
    bound: Followers,
    labels: dict[str, dict[Place, torch.Tensor]],
    widths: Widths,
    loose: bool,
    output_axis: int,
    component: int = 0,
) -> tuple[list[Binding], str]:
    """Turn labels into bindings, one for each template and axis; the second value says why that failed."""
    found: dict[tuple[str, int, str], Binding] = {}
    for name, axis in bound.disk:
        template = split_name(name)[0]
        by_width = {width: spaces[name, axis] for width, spaces in labels.items()}
        by_width = _with_bias(name, output_axis, by_width, labels)
        if loose and all(bool((units < 0).all()) for units in by_width.values()):
            continue  # not an axis of heads but one of channels, whose size follows theirs
        if "num_key_value_heads" in by_width:
            bindings = _bind_heads(template, axis, by_width, widths)
        else:
            ((width, units),) = by_width.items()
            bindings = _bind_neurons(Binding(template, axis, width, component=component), units, widths)
        if bindings is None:
            if bound.disk[name, axis] == widths.head_dim:
                continue  # a norm over one head's elements, shared by all heads
            return [], f"the units along axis {axis} of {template} could not be told apart"
        for binding in bindings:
            known = found.setdefault((template, axis, binding.width), binding)
            if known != binding and not (known.interleaved and binding.interleaved and binding.width == Width.HEADS):
                return [], f"axis {axis} of {template} is laid out differently from layer to layer"
            if known != binding:  # heads that are larger in some layers
                found[template, axis, binding.width] = replace(binding, copies=0)
    return list(found.values()), "" if found else "no axis carries its units"


def _with_bias(
    name: str, output_axis: int, own: dict[str, torch.Tensor], labels: dict[str, dict[Place, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """A bias follows the rows of its weight (a key bias has no gradient without a position encoding)."""
    if not name.endswith(".bias"):
        return own
    size = len(next(iter(own.values())))
    weight = name.removesuffix("bias") + "weight"
    mates = {width: spaces.get((weight, output_axis)) for width, spaces in labels.items()}
    if all(mate is not None and len(mate) == size for mate in mates.values()):
        return {width: mate for width, mate in mates.items() if mate is not None}
    return own


def _bind_neurons(bare: Binding, labels: torch.Tensor, widths: Widths) -> list[Binding] | None:
    for interleaved in (False, True):
        copies = len(labels) // getattr(widths, bare.width)
        binding = replace(bare, copies=copies, interleaved=interleaved)
        units = binding.units(widths, len(labels))
        if len(units) == len(labels) and bool((units == labels).all()):
            return [binding]
    return None


def _bind_heads(template: str, axis: int, by_width: dict[str, torch.Tensor], widths: Widths) -> list[Binding] | None:
    size = len(by_width["num_attention_heads"])
    if size % widths.head_dim:
        return None
    heads = _by_head(by_width["num_attention_heads"], widths.head_dim)
    groups = _by_head(by_width["num_key_value_heads"], widths.head_dim)
    if heads is None or groups is None:
        return None
    heads_per_group = widths.heads_per_group
    if heads_per_group == 1:
        heads = groups  # one name for a head and its group
    if all(unit < 0 for unit in heads) and all(unit < 0 for unit in groups):
        # a norm over all heads lets every row feel every unit: take the plain order, which the proof then checks
        if size == widths.num_attention_heads * widths.head_dim:
            heads = tuple(range(widths.num_attention_heads))
        elif size == widths.num_key_value_heads * widths.head_dim:
            groups = tuple(range(widths.num_key_value_heads))
        else:
            return None
    # a row of one query head is bound to that head alone: a removed group takes its heads with it
    groups = tuple(group if head < 0 else -1 for head, group in zip(heads, groups, strict=True))
    if any(head < 0 and group < 0 for head, group in zip(heads, groups, strict=True)):
        return None
    made = {"num_attention_heads": heads, "num_key_value_heads": groups}
    return [Binding(template, axis, width, heads=units) for width, units in made.items() if max(units) >= 0]


def _by_head(labels: torch.Tensor, head_dim: int) -> tuple[int, ...] | None:
    blocks = labels.reshape(-1, head_dim)
    if not bool((blocks == blocks[:, :1]).all()):
        return None
    return tuple(blocks[:, 0].tolist())


def leave_channels_out(labels: dict[str, dict[Place, torch.Tensor]], widths: Widths) -> None:
    """With one KV head, silencing it silences whole tensors, their channel axes too: take those labels back."""
    for place, units in labels["num_attention_heads"].items():
        if len(units) == widths.hidden_size and bool((units < 0).all()):
            labels["num_key_value_heads"][place].fill_(-1)


def with_biases(explained: dict[Place, int], remaining: dict[Place, int], output_axis: int) -> dict[Place, int]:
    """The same axes with those of the biases that run along them."""

    def is_explained(name: str, axis: int) -> bool:
        weight = name.removesuffix("bias") + "weight"
        return (name, axis) in explained or (name.endswith(".bias") and (weight, output_axis) in explained)

    return {(name, axis): size for (name, axis), size in remaining.items() if is_explained(name, axis)}


def bind_channels(bound: Followers, taken: set[Place], architecture: Architecture) -> tuple[list[Binding], str]:
    """Bind the axes of the residual stream's channels, all but those that are taken; the second value as in `bind`."""
    widths = architecture.widths
    head_dim = widths.head_dim if architecture.hidden_follows_heads else 0
    found = {}
    for (name, axis), size in bound.disk.items():
        template = split_name(name)[0]
        if (template, axis) in taken:
            continue
        if size == head_dim:
            continue  # a norm over one head's elements, whose number stays
        if size != widths.hidden_size:
            return [], f"axis {axis} of {template} has {size} elements for {widths.hidden_size} channels"
        found[template, axis] = Binding(template, axis, "hidden_size")
    return list(found.values()), ""


def bind_whole_heads(twin: Twin, bound: Followers) -> list[Binding]:
    """Axes with one element for each head, such as attention sinks: they follow the heads, but not the head dim."""
    architecture = twin.architecture
    if not architecture.explicit_head_dim:
        return []
    widths, config = architecture.widths, architecture.config
    counts = {"num_attention_heads": widths.num_attention_heads, "num_key_value_heads": widths.num_key_value_heads}
    found = {}
    more = (widths.num_attention_heads + widths.heads_per_group, widths.num_key_value_heads + 1)
    changes: dict[str, Any] = {"head_dim": widths.head_dim}
    for width, size in zip(counts, more, strict=True):
        changes.update(field_changes(config, width, size))
    for steps in (0, 1):  # where the hidden size must be a multiple of the heads, both move
        hidden = field_changes(config, "hidden_size", widths.hidden_size // widths.num_attention_heads * more[0])
        try:
            after = shapes_of(reconfigure(config, {**changes, **(hidden if steps else {})})).disk
        except (ValueError, LlmpruneError):
            continue
        before = shapes_of(config).disk
        for (name, axis), size in changed_axes(before, after).items():
            for width, count in counts.items():
                if size == count and after[name][axis] == changes.get(width, 0) and (name, axis) not in bound.disk:
                    binding = Binding(split_name(name)[0], axis, width)
                    found[binding.template, axis] = binding
        break
    return list(found.values())


def bind_layers(twin: Twin) -> tuple[Binding, ...]:
    """Axes outside the layers with a share for each of them, such as the embeddings that Gemma 3n gives every layer."""
    config, count = twin.architecture.config, twin.architecture.widths.num_hidden_layers
    for gone in reversed(range(count if count > 1 else 0)):
        fewer = tuple(layer for layer in range(count) if layer != gone)
        try:
            after = shapes_of(reconfigure(config, layer_changes(config, fewer))).disk
        except (ValueError, LlmpruneError):
            continue
        places = changed_axes(shapes_of(config).disk, after).items()
        shares = {place: size // count for place, size in places if not split_name(place[0])[1]}
        return tuple(Binding(*place, Width.LAYERS, copies=share, interleaved=True) for place, share in shares.items())
    return ()


@dataclass(frozen=True)
class Experts:
    """How a family stores routed experts."""

    bindings: tuple[Binding, ...] = ()  # the axes along which experts are stacked
    templates: frozenset[str] = frozenset()  # those that name each expert
    routers: frozenset[str] = frozenset()  # names in memory, with {} for numbers
    reason: str = ""  # why they cannot be told apart; empty where they can


def bind_experts(twin: Twin) -> Experts:
    """Find how a family stores its routed experts, if it has any."""
    count = twin.architecture.widths.num_experts
    if not count:
        return Experts()
    tables = [name for name, tensor in twin.model.state_dict().items() if not tensor.is_floating_point()]
    if tables:
        table = split_name(tables[0])[0]
        return Experts(reason=f"{table} names experts by their numbers, and cannot do without any of them")
    bound = followers_of(twin, "num_experts", 1)
    if bound is None or not (bound.disk or bound.new):
        return Experts(reason="no tensor follows the number of experts")
    found = {}
    for (name, axis), size in bound.disk.items():
        template = split_name(name)[0]
        if size != count:
            return Experts(reason=f"axis {axis} of {template} has {size} elements for {count} experts")
        found[template, axis] = Binding(template, axis, "num_experts")
    for name in bound.new:
        numbers = split_name(name)[1]
        if len(numbers) != 2 or numbers[1] != count:
            return Experts(reason=f"{name} is not numbered by layer and expert")
    return Experts(
        bindings=tuple(found.values()),
        templates=frozenset(split_name(name)[0] for name in bound.new),
        routers=frozenset(split_name(name)[0] for name, _ in bound.memory if twin.model.get_parameter(name).ndim == 2),
    )


def output_axis_of(model: PreTrainedModel) -> int:
    """The axis of a weight that its bias runs along: 1 in GPT-2's transposed `Conv1D`, else 0."""
    return int(any(type(module).__name__ == "Conv1D" for module in model.modules()))
