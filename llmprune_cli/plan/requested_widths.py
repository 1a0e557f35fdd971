"""The widths, and the layers that stay, that a request comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from llmprune_cli.coupling.trace import Trace
from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import Architecture, has_layers, with_widths
from llmprune_cli.family.kept_layers import remain_alike
from llmprune_cli.family.widths import NEURONS, Widths, read_widths
from llmprune_cli.options import WidthRequest
from llmprune_cli.plan.legal import legal_experts, legal_values, listed, near, stepped, within
from llmprune_cli.plan.rounding import check_heads_agree, count_groups, count_heads, count_units, usual_step


@dataclass(frozen=True)
class Target:
    """The widths that a request comes to."""

    widths: Widths
    layers: tuple[int, ...]  # numbers of the layers that stay
    deviations: tuple[str, ...]  # where legality moved a width away from what was asked
    protected: tuple[int, ...] = ()  # numbers of the layers among them that no one may change


def resolve(architecture: Architecture, refused: dict[str, str], request: WidthRequest) -> Target:
    """The legal widths nearest to a request, counted as the reference counts them.

    Channels and neurons kept: `int(N·(1−r))`. Query heads removed: `ceil(r·H)`, under grouped-query attention
    `ceil(ceil(r·H)/K)` in every KV group. Heads are fixed first; where the family ties the hidden size to them, it goes
    to the nearest legal value. `pruning_ratio` leaves whole what cannot be pruned.

    Args:
        refused: widths that cannot be pruned, with the reason.

    Raises:
        PlanError: widths that the architecture cannot have, naming those that it can.
    """
    deviations: list[str] = []
    before = architecture.widths
    check_heads_agree(before, request)
    request = _spare_refused(before, refused, request, deviations)
    if architecture.hidden_follows_heads:
        request = _heads_from_hidden(before, request, deviations)
    groups = heads = 0
    if before.num_attention_heads:
        groups = count_groups(before, request, deviations)
        heads = count_heads(architecture, groups, request, deviations)
    elif request.asks_for_heads:
        raise PlanError(f"{architecture.config.model_type} has no attention heads. Leave their options out.")
    neurons = {width: _neurons(architecture, width, refused, request, deviations) for width in NEURONS}
    hidden = count_units(before.hidden_size, "hidden_size", request.hidden_size, request.hidden_pruning_ratio, request)
    hidden = _legal_hidden(architecture, heads, hidden, request, deviations)
    protected = protected_layers(before, request)
    layers = _layers(architecture, request, protected, deviations)
    widths = replace(
        before,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_experts=_experts(architecture, request),
        num_hidden_layers=len(layers),
        **neurons,
    )
    shrinking = [width for width in widths.changed_from(before) if width != "num_hidden_layers"]
    if protected and shrinking:
        raise PlanError(
            f"{', '.join(shrinking)} cannot shrink while layers {', '.join(map(str, protected))} are protected: every "
            "layer has the same widths, so these would change too. Beside --keep-layers only layers can go (--layers, "
            "--drop-layers or a target)."
        )
    try:
        if read_widths(with_widths(architecture, widths, layers)) != widths:
            raise ValueError("the configuration does not keep them")
    except ValueError as error:
        raise PlanError(f"{architecture.config.model_type} refuses these widths: {error}") from error
    return Target(widths, layers, tuple(deviations), protected)


def refuse_copy(architecture: Architecture, trace: Trace, request: WidthRequest, target: Target) -> None:
    """Make sure that something goes: nobody wants to wait for a copy.

    Args:
        target: what the request comes to.

    Raises:
        PlanError: nothing goes; why, and what could, is said.
    """
    if target.widths != architecture.widths:
        return
    why = "The fraction is too small to remove a unit." if request.asks_for_a_fraction else "All of it is to stay."
    family, values = architecture.config.model_type, legal_values(architecture, trace)
    can = [f"{width} ({text})" for width, text in values.items() if text and width not in trace.refused]
    raise PlanError(
        f"Nothing would go, and the result would be a copy. {' '.join(target.deviations) or why} {family} can have "
        f"other values of {'; '.join(can)}. Ask for less, or let `llmprune export` write the model as it is."
    )


def _spare_refused(
    before: Widths, refused: dict[str, str], request: WidthRequest, deviations: list[str]
) -> WidthRequest:
    """Where one ratio is asked of everything, heads and channels that cannot be pruned stay, and that is said."""
    if not request.pruning_ratio:
        return request
    spared: dict[str, Any] = {}
    for width, own in (("num_attention_heads", "head_pruning_ratio"), ("hidden_size", "hidden_pruning_ratio")):
        if width in refused and getattr(request, own) is None and getattr(request, width) is None:
            spared[own] = 0.0
            deviations.append(f"{width} stays {getattr(before, width)}: {refused[width]}.")
    return replace(request, **spared)


def _heads_from_hidden(before: Widths, request: WidthRequest, deviations: list[str]) -> WidthRequest:
    """Where the hidden size is query heads times head dim, a request for the hidden size alone is one for the heads."""
    if request.asks_for_heads or request.pruning_ratio is not None:
        return request
    if request.hidden_size is None and request.hidden_pruning_ratio is None:
        return request
    hidden = count_units(before.hidden_size, "hidden_size", request.hidden_size, request.hidden_pruning_ratio, request)
    groups = before.num_key_value_heads if before.heads_per_group > 1 else 1
    step = groups * before.head_dim
    if request.hidden_size is not None and hidden % step:
        raise PlanError(
            f"hidden_size must be a multiple of {step} here (query heads × head dim). "
            f"Legal values near {hidden}: {', '.join(map(str, near(hidden, step, before.hidden_size)))}."
        )
    heads = min(near(hidden, step, before.hidden_size), key=lambda size: abs(size - hidden)) // before.head_dim
    deviations.append(f"The hidden size is query heads × head dim in this family, so {heads} query heads stay.")
    return replace(request, num_attention_heads=heads, hidden_size=None, hidden_pruning_ratio=0.0)


def _neurons(
    architecture: Architecture, width: str, refused: dict[str, str], request: WidthRequest, deviations: list[str]
) -> int:
    whole, exact, ratio = (
        getattr(architecture.widths, width),
        getattr(request, width),
        request.intermediate_pruning_ratio,
    )
    if whole == 0 or (width in refused and exact is None):
        if exact is not None:
            raise PlanError(f"{architecture.config.model_type} has no {width}. Leave the option out.")
        if whole and (ratio or request.pruning_ratio):
            deviations.append(f"{width} stays {whole}: {refused[width]}.")
        return int(whole)
    step = usual_step(whole) if ratio is not None else 1  # `pruning_ratio` alone counts as the reference does
    units = count_units(whole, width, exact, ratio, request, step)
    unrounded = count_units(whole, width, exact, ratio, request)
    if units != unrounded:
        deviations.append(f"{width} is {units} instead of {unrounded}, a multiple of {step}. --round-to 1 keeps all.")
    return stepped(architecture, width, units, exact is not None, deviations)


def _legal_hidden(
    architecture: Architecture, heads: int, hidden: int, request: WidthRequest, deviations: list[str]
) -> int:
    before = architecture.widths
    if architecture.hidden_follows_heads:
        legal, rule = [heads * before.head_dim], "query heads × head dim"
    elif architecture.hidden_multiple_of_heads:
        is_by_ratio = request.hidden_size is None and hidden < before.hidden_size  # else nobody asked to round it
        step = math.lcm(heads, request.round_to or 1) if is_by_ratio else heads
        step = step if step <= hidden else heads
        rule = "a multiple of the query heads" + (f" and of {request.round_to} (--round-to)" if step != heads else "")
        legal = near(hidden, step, before.hidden_size)
    else:
        return stepped(architecture, "hidden_size", hidden, request.hidden_size is not None, deviations)
    if hidden in legal:
        return hidden
    if not legal or (request.hidden_size is not None and not architecture.hidden_follows_heads):
        raise PlanError(
            f"hidden_size = {hidden} is not legal with {heads} query heads: {architecture.config.model_type} needs "
            f"{rule}. Legal values near it: {', '.join(map(str, legal)) or 'none'}."
        )
    if request.hidden_size is not None:
        raise PlanError(f"hidden_size = {hidden} contradicts {heads} query heads: it must be {legal[0]} ({rule}).")
    nearest = min(legal, key=lambda size: abs(size - hidden))
    deviations.append(f"hidden_size is {nearest} instead of {hidden}: with {heads} query heads it must be {rule}.")
    return nearest


def _experts(architecture: Architecture, request: WidthRequest) -> int:
    whole, count = architecture.widths.num_experts, request.num_experts
    if count is None:
        return whole
    legal = legal_experts(architecture)
    if count not in legal:
        family = architecture.config.model_type
        if not whole:
            raise PlanError(f"{family} has no routed experts. Leave --experts out.")
        raise PlanError(
            f"num_experts = {count} is not legal: the router of {family} picks {architecture.experts_per_token} of "
            f"{whole}. Legal values: {listed(legal)}."
        )
    return count


def protected_layers(before: Widths, request: WidthRequest) -> tuple[int, ...]:
    """The numbers of the layers that may not change, from the first."""
    whole = before.num_hidden_layers
    request.check_layer_numbers(whole)
    return tuple(sorted({layer % whole for layer in request.keep_layers}))


def _layers(
    architecture: Architecture, request: WidthRequest, protected: tuple[int, ...], deviations: list[str]
) -> tuple[int, ...]:
    """The layers that stay.

    Of a number of layers, the deepest go but for the last, which does other work (Gromov et al., "The Unreasonable
    Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 4.4), and but for those that are protected. Where
    the configuration places its kinds of layers by a rhythm that this would break, or what a layer computes follows its
    number, the last go.
    """
    whole = architecture.widths.num_hidden_layers
    if request.drop_layers is not None:
        dropped = {layer + whole if layer < 0 else layer for layer in request.drop_layers}
        if both := sorted(dropped & set(protected)):
            raise PlanError(
                f"--keep-layers and --drop-layers both name {', '.join(map(str, both))}. Take that out of one of them."
            )
        return tuple(layer for layer in range(whole) if layer not in dropped)
    if request.num_hidden_layers is None:
        return tuple(range(whole))
    count = within("num_hidden_layers", request.num_hidden_layers, whole)
    deepest_first = [layer for layer in (*reversed(range(whole - 1)), whole - 1) if layer not in protected]
    if whole - count > len(deepest_first):
        raise PlanError(
            f"--layers {count} is too few: {len(protected)} layers are protected. Ask for {len(protected)} to {whole}, "
            "or protect fewer with --keep-layers."
        )
    dropped = set(deepest_first[: whole - count])
    kept, first = tuple(layer for layer in range(whole) if layer not in dropped), tuple(range(count))
    config, family, instead = architecture.config, architecture.config.model_type, f"The last {whole - count} layers go"
    if remain_alike(config, kept) or not set(protected) <= set(first):
        return kept
    if not has_layers(config, kept):
        deviations.append(f"{instead}, so that {family} keeps its rhythm of layers.")
        return first
    if remain_alike(config, first):
        deviations.append(f"{instead}, since what a layer of {family} computes follows its number.")
        return first
    return kept
