"""Find the coupled axes of an architecture, and the unit at each of their indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from llmprune_cli.coupling.bind import (
    bind,
    bind_channels,
    bind_experts,
    bind_layers,
    bind_whole_heads,
    leave_channels_out,
    output_axis_of,
    with_biases,
)
from llmprune_cli.coupling.probe import (
    find_reader,
    idle_templates,
    label_units,
    read_units,
    reader_on_disk,
    summed_axes,
)
from llmprune_cli.coupling.step import Followers, Place, followers_of, own_rule, template_place, within_layers
from llmprune_cli.coupling.trace import GLOBAL_WIDTHS, Binding, Reader, Trace
from llmprune_cli.coupling.twin import Twin, build_twin, trace_sizes
from llmprune_cli.family.architecture import Architecture, legal_heads, rotary_fraction
from llmprune_cli.family.layers import KV_SHARED
from llmprune_cli.family.skeleton import expected_index, on_disk, shapes_of
from llmprune_cli.family.widths import HEAD_COUNTS, NEURONS, Width, Widths, varied_widths
from llmprune_cli.folder.tensors import split_name

ROTARY = "rotary frequencies follow the head dim, so that fewer elements would turn at other speeds"
PARTLY_ROTARY = "the share of a head that turns, its speeds and the scale of attention follow the head dim"
UNROTATED = "the scale of attention follows the head dim, so that fewer elements would be weighed differently"
SLOPES = "the slopes of its position bias (ALiBi) follow the number of heads, so that fewer would look elsewhere"
IDLE = "takes no part in what the model makes of text, so that nothing shows what its rows and columns stand for"
SHARED = "layers take the keys and values of others, so that all would have to keep the same groups"
SEVERAL = "its layers have several sizes of it, of which a configuration cannot say fewer"
SEVERAL_HEADS = "its layers have several numbers of heads, which cannot be made fewer yet"
OTHERS = "is of these heads in some layers alone: in others, attention of another kind has heads under that name"
OWN_GROUPS = "its layers have KV heads of several sizes, or several numbers of them: only query heads can go"


@dataclass(frozen=True)
class Findings:
    """What was found out about one kind of unit."""

    bindings: tuple[Binding, ...] = ()
    readers: tuple[Binding, ...] = ()  # those bindings whose axis is that of a reader
    inputs: tuple[Reader, ...] = ()  # weights that can make up for units that go
    joint: tuple[Reader, ...] = ()  # weights that read units, and cannot make up for them
    refused: dict[str, str] = field(default_factory=dict)  # width → why it cannot be pruned


def trace(architecture: Architecture) -> Trace:
    """Find the coupled axes of an architecture and the unit at each of their indices.

    Which axes: those whose size follows a width when the width takes one step. Which indices: zeroing what reads a unit
    makes the gradient of exactly that unit's rows vanish. Units are told apart by a binary code, with two passes for
    each bit, so that a row which several units need is never taken for one unit's own.

    Raises:
        UnsupportedError: no twin can be built.
    """
    twin = build_twin(architecture, trace_sizes(architecture.config))
    widths = twin.architecture.widths
    hidden = followers_of(twin, "hidden_size", 1 if architecture.own_heads else widths.num_attention_heads)
    experts = bind_experts(twin)
    parts = [_trace_neurons(twin, width) for width in NEURONS if getattr(widths, width)]
    parts.append(_trace_heads(twin, hidden))
    parts.append(Findings(experts.bindings, refused={"num_experts": experts.reason} if experts.reason else {}))
    taken = {(binding.template, binding.axis) for part in parts for binding in part.bindings}
    parts += [_trace_channels(twin, hidden, taken), Findings(bind_layers(twin))]
    refused = {width: reason for part in parts for width, reason in part.refused.items()}
    idle = idle_templates(twin)
    unseen = {str(b.width): f"{b.template} {IDLE}" for part in parts for b in part.bindings if b.template in idle}
    refused = {**unseen, **_shared_groups(architecture), **refused}
    if architecture.hidden_follows_heads:  # none of the two goes without the other
        why = refused.get(Width.HEADS) or refused.get(Width.HIDDEN)
        refused |= dict.fromkeys(map(str, (*HEAD_COUNTS, Width.HIDDEN)), why) if why else {}
    found = Trace(
        bindings=tuple(binding for part in parts for binding in part.bindings),
        inputs=tuple(reader for part in parts for reader in part.inputs),
        joint=tuple(reader for part in parts for reader in part.joint),
        readers=tuple(binding for part in parts for binding in part.readers),
        scored=_scored(twin),
        expert_templates=experts.templates,
        routers=experts.routers,
        refused={**refused, "head_dim": _why_head_dim_stays(architecture)},
    )
    return found.fitting(expected_index(twin.architecture.config), widths)


def _trace_neurons(twin: Twin, width: str) -> Findings:
    """What follows a width of neurons."""
    if width in varied_widths(twin.architecture.config):
        return Findings(refused={width: SEVERAL})
    bound = followers_of(twin, width, 1)
    if bound is None:
        return Findings(refused={width: own_rule(twin, width)})
    if not bound.disk:
        return Findings(refused={width: f"no tensor axis of {twin.architecture.config.model_type} follows it"})
    return _trace_units(twin, bound, width)


def _trace_units(twin: Twin, bound: Followers, width: str) -> Findings:
    """What follows a width, one MLP of a layer after the other.

    Several MLPs may share the width: one reader after the other is found, until every axis has one. Of the axes that
    follow the hidden size only those within a layer are bound here, such as the channels of a convolution: what reads
    those silences matrices, which nothing does to the channels of the residual stream.
    """
    widths, output_axis = twin.architecture.widths, output_axis_of(twin.model)
    found: list[Binding] = []
    readers: list[Binding] = []
    inputs: list[Reader] = []
    joint: list[Reader] = []
    remaining, component = dict(bound.disk), int(width in GLOBAL_WIDTHS)
    while remaining:
        rest = replace(bound, disk=remaining)
        unit_readers, labels = read_units(twin, rest, width)
        if not unit_readers and width in GLOBAL_WIDTHS:
            break
        if not unit_readers:
            unread = split_name(next(iter(remaining))[0])[0]
            return Findings(refused={width: f"nothing that reads the units of {unread} was found"})
        explained = {place: size for place, size in remaining.items() if bool((labels[place] >= 0).any())}
        explained = with_biases(explained, remaining, output_axis)
        part = replace(bound, disk=explained)
        bindings, reason = bind(part, {width: labels}, widths, False, output_axis, component)
        if reason or not explained:
            return Findings(refused={width: reason or "no axis carries its units"})
        found += bindings
        readers += [binding for reader in unit_readers for binding in _reading(twin, part, reader, bindings)]
        alone, together = _inputs(twin, unit_readers, width, component)
        inputs += alone
        joint += together
        remaining = {place: size for place, size in remaining.items() if place not in explained}
        component += 1
    return Findings(tuple(found), tuple(readers), tuple(inputs), tuple(joint))


def _trace_heads(twin: Twin, hidden: Followers | None) -> Findings:
    """What follows query heads and KV groups.

    Args:
        hidden: what follows the hidden size, which stands in for the head dim where the two move together.
    """
    architecture = twin.architecture
    widths, spaces = architecture.widths, _head_spaces(architecture.widths)
    bound = followers_of(twin, "head_dim", 2) if architecture.explicit_head_dim else None
    bound = bound or (hidden if architecture.hidden_follows_heads else None)
    if _has_slopes(architecture.config):
        return Findings(refused=dict.fromkeys(spaces, SLOPES))
    if Width.HEADS in varied_widths(architecture.config):
        return Findings(refused=dict.fromkeys(spaces, SEVERAL_HEADS))
    if spaces and architecture.own_heads:
        return _trace_own_heads(twin)
    if bound is None or not bound.disk:
        return Findings(refused=dict.fromkeys(spaces, "no tensor axis follows the size of its heads"))
    reader = find_reader(twin, bound, widths, spaces)
    if reader is None:
        return Findings(refused=dict.fromkeys(spaces, "nothing that reads its heads was found"))
    labels = {name: label_units(twin, bound, [reader], name, count) for name, count in spaces.items()}
    loose = architecture.hidden_follows_heads
    if loose and widths.num_key_value_heads == 1:
        leave_channels_out(labels, widths)
    bindings, reason = bind(bound, labels, widths, loose, output_axis_of(twin.model))
    inputs, joint = _inputs(twin, [reader], "num_attention_heads")
    if reason:
        return Findings(inputs=inputs, refused=dict.fromkeys(spaces, reason))
    whole = bind_whole_heads(twin, bound)
    readers = _reading(twin, bound, reader, bindings)
    summed = summed_axes(twin)  # what else reads all heads, such as the mask that Doge makes of their values
    others = [b for b in bindings if b not in readers and (b.template, b.axis) in summed]
    joint += tuple(Reader(other.template, other.axis, other.width) for other in others)
    return Findings((*bindings, *whole), (*readers, *others), inputs, joint)


def _has_slopes(config: PretrainedConfig) -> bool:
    nested = getattr(config, "attn_config", None)
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False) or getattr(nested, "alibi", False))


def _shared_groups(architecture: Architecture) -> dict[str, str]:
    """Why KV groups stay where layers take the keys and values of others: each layer keeps groups of its own choice."""
    if not getattr(architecture.config, KV_SHARED, 0):
        return {}
    widths = (Width.GROUPS,) if architecture.widths.heads_per_group > 1 else HEAD_COUNTS
    return dict.fromkeys(map(str, widths), SHARED)


def _trace_own_heads(twin: Twin) -> Findings:
    """What follows heads that have sizes of their own, as in latent attention, or that differ from layer to layer.

    Where several share their keys and values, these stay, and the same number of heads goes from each.
    """
    architecture = twin.architecture
    is_shared = architecture.widths.heads_per_group > 1
    step = legal_heads(architecture, architecture.widths.num_key_value_heads)[0] if is_shared else 1
    bound = followers_of(twin, Width.HEADS, step)
    if bound is None or not bound.disk:
        return Findings(refused=dict.fromkeys(HEAD_COUNTS, "no tensor axis follows the number of its heads"))
    found = _trace_units(twin, bound, Width.HEADS)
    if found.refused:
        return replace(found, refused=dict.fromkeys(HEAD_COUNTS, found.refused[Width.HEADS]))
    axes = {binding.template: binding.axis for binding in found.bindings}
    names = [name for name in shapes_of(architecture.config).disk if split_name(name)[0] in axes]
    others = [template for name in names if (name, axes[template := split_name(name)[0]]) not in bound.disk]
    if others:
        return Findings(refused=dict.fromkeys(HEAD_COUNTS, f"{others[0]} {OTHERS}"))
    return replace(found, refused={Width.GROUPS: OWN_GROUPS}) if is_shared else found


def _trace_channels(twin: Twin, hidden: Followers | None, taken: set[Place]) -> Findings:
    """What follows the hidden size.

    Args:
        hidden: the axes whose size does.
        taken: axes that other units are bound to.
    """
    width = "hidden_size"
    if hidden is None:
        return Findings(refused={width: own_rule(twin, width)})
    if not hidden.disk:
        return Findings(refused={width: f"no tensor axis of {twin.architecture.config.model_type} follows it"})
    inner = _trace_units(twin, within_layers(hidden, taken), width)
    taken = taken | {(binding.template, binding.axis) for binding in inner.bindings}
    bindings, reason = bind_channels(hidden, taken, twin.architecture)
    if inner.refused or reason:
        return Findings(refused=inner.refused or {width: reason})
    return Findings((*inner.bindings, *bindings), inner.readers)


def _inputs(
    twin: Twin, readers: Sequence[Place], width: str, component: int = 0
) -> tuple[tuple[Reader, ...], tuple[Reader, ...]]:
    """The weight that can make up for units, or else those that cannot.

    What several weights read, none of them can make up for alone.
    """
    places = [template_place(place) for place in readers]
    found = tuple(Reader(*place, width, component) for place in places)
    is_alone = len(places) == 1 and places[0] in summed_axes(twin)
    return (found, ()) if is_alone else ((), found)


def _reading(twin: Twin, bound: Followers, reader: Place, bindings: list[Binding]) -> list[Binding]:
    """Those bindings whose axis on disk is the reader's."""
    marked = reader_on_disk(twin, bound, template_place(reader), torch.arange)
    places = {(split_name(name)[0], axis) for name, axis in marked}
    return [binding for binding in bindings if (binding.template, binding.axis) in places]


def _head_spaces(widths: Widths) -> dict[str, int]:
    return {name: getattr(widths, name) for name in HEAD_COUNTS if getattr(widths, name)}


def _why_head_dim_stays(architecture: Architecture) -> str:
    if architecture.hidden_follows_heads:
        return "it follows the hidden size"
    if not getattr(architecture.config, "rope_parameters", None):
        return UNROTATED
    return ROTARY if rotary_fraction(architecture.config) == 1 else PARTLY_ROTARY


def _scored(twin: Twin) -> frozenset[str]:
    """Templates of the tensors that count in importance: weights of linear maps and of LayerNorm, as in torch-pruning.

    Biases, RMSNorm and embeddings do not count; an embedding that is tied to the output projection does, as the latter.
    """
    kinds: dict[int, bool] = {}
    for module in twin.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            counts = parameter.ndim >= 2 or (isinstance(module, nn.LayerNorm) and name == "weight")
            counts = counts and not isinstance(module, nn.Embedding) and not name.endswith("bias")
            kinds[id(parameter)] = kinds.get(id(parameter), False) or counts
    marked = {
        name: torch.full_like(parameter, float(kinds[id(parameter)])).detach()
        for name, parameter in twin.model.named_parameters()
    }
    return frozenset(split_name(name)[0] for name, mark in on_disk(twin.model, marked).items() if mark.flatten()[0] > 0)
