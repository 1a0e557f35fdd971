"""The plan: how wide every layer becomes and which units stay."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.coupling.trace import Keep, Trace, kept_mask, new_name, renumbered
from llmprune_cli.errors import CheckpointError, PlanError
from llmprune_cli.family.architecture import NEURONS, Architecture, Widths, read_widths, with_widths
from llmprune_cli.family.layers import can_keep_layers
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import read_json, replace_file
from llmprune_cli.folder.tensors import Shape, split_name

if TYPE_CHECKING:
    from llmprune_cli.choose.magnitude import Scores

PLAN_VERSION = 3


@dataclass(frozen=True)
class WidthRequest:
    """The widths that the user asked for; an exact size beats a ratio, a width's own ratio beats `pruning_ratio`."""

    pruning_ratio: float | None = None  # fraction removed of hidden channels, query heads and neurons
    hidden_pruning_ratio: float | None = None
    head_pruning_ratio: float | None = None
    kv_group_pruning_ratio: float | None = None
    intermediate_pruning_ratio: float | None = None  # of every kind of neuron
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    num_experts: int | None = None
    num_hidden_layers: int | None = None  # the deepest go, but for the last
    drop_layers: tuple[int, ...] | None = None  # these go
    round_to: int = 1  # kept channels and neurons that come from a ratio are rounded down to a multiple of this
    keep_layers: tuple[int, ...] = ()  # these stay as they are, whatever else happens; -1 is the last

    @property
    def is_empty(self) -> bool:
        """Whether no width was asked for."""
        conditions = ("round_to", "keep_layers")
        return all(getattr(self, field.name) is None for field in fields(self) if field.name not in conditions)

    @property
    def asks_for_heads(self) -> bool:
        """Whether query heads or KV groups were asked for by name."""
        sizes = (self.num_attention_heads, self.num_key_value_heads)
        return any(value is not None for value in (*sizes, self.head_pruning_ratio, self.kv_group_pruning_ratio))


@dataclass(frozen=True)
class Target:
    """The widths that a request comes to."""

    widths: Widths
    layers: tuple[int, ...]  # numbers of the layers that stay
    deviations: tuple[str, ...]  # where legality moved a width away from what was asked
    protected: tuple[int, ...] = ()  # numbers of the layers among them that no one may change


@dataclass(frozen=True)
class Plan:
    """Everything that surgery needs to know; JSON in, JSON out."""

    fingerprint: str  # SHA-256 of the source's configuration and tensor headers
    before: Widths
    after: Widths
    importance: str
    seed: int
    deviations: tuple[str, ...]
    layers: tuple[int, ...]  # numbers of the layers that stay
    protected: tuple[int, ...]  # numbers of the layers among them that no one may change
    keep: Keep

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the widths that shrink."""
        return self.after.changed_from(self.before)

    def to_json(self) -> dict[str, Any]:
        """A document for `read_plan`."""
        return {"plan_version": PLAN_VERSION, **asdict(self)}


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan.

    Raises:
        OutputError: the file cannot be written.
    """
    replace_file(path, [(json.dumps(plan.to_json()) + "\n").encode()], "Choose another --save-plan.")


def most_plan_bytes(widths: Widths) -> int:
    """How large a plan for a model may be: a number for each unit that can be chosen, and room for the rest."""
    units: int = sum(asdict(widths).values())
    return 2**20 + 12 * units * widths.num_hidden_layers * max(1, widths.num_experts)


def read_plan(path: Path, most_bytes: int | None = None) -> Plan:
    """The plan in a file, checked for consistency.

    Args:
        most_bytes: see `most_plan_bytes`; None for one of a run of its own.

    Raises:
        CheckpointError: not a plan, or one whose counts contradict its indices.
    """
    document = read_json(path, most_bytes)
    if document.pop("plan_version", None) != PLAN_VERSION:
        raise CheckpointError(f"{path} is not a plan of version {PLAN_VERSION}. Make one with --save-plan.")
    try:
        before, after = (Widths(**document.pop(name)) for name in ("before", "after"))
        keep = {
            width: {instance: tuple(units) for instance, units in chosen.items()}
            for width, chosen in document.pop("keep").items()
        }
        deviations = tuple(map(str, document.pop("deviations")))
        layers, protected = tuple(document.pop("layers")), tuple(document.pop("protected"))
        plan = Plan(
            before=before,
            after=after,
            deviations=deviations,
            layers=layers,
            protected=protected,
            keep=keep,
            **document,
        )
        numbers = [
            *layers,
            *protected,
            *(unit for choice in keep.values() for units in choice.values() for unit in units),
        ]
        consistent = all(type(n) is int for n in (*numbers, *asdict(before).values(), *asdict(after).values()))
        consistent &= type(plan.importance) is type(plan.fingerprint) is str and type(plan.seed) is int
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a plan ({error!r}). Make one with --save-plan.") from error
    choices = {(width, instance): kept for width, choice in keep.items() for instance, kept in choice.items()}
    for (width, instance), kept in {**choices, ("num_hidden_layers", ""): layers}.items():
        whole, part = getattr(before, width, 0), getattr(after, width, 0)
        inside = consistent and len(kept) == part and kept == tuple(sorted(set(kept)))
        if not inside or (kept and not 0 <= kept[0] <= kept[-1] < whole):
            raise CheckpointError(f"{path}: the units kept of {width} {instance} do not match its widths.")
    if not set(protected) <= set(layers) or (protected and set(plan.changed) - {"num_hidden_layers"}):
        raise CheckpointError(f"{path}: layers that are protected would change.")
    return plan


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what a plan depends on: the configuration and every tensor's name, shape and dtype."""
    config = {name: value for name, value in checkpoint.config.to_dict().items() if not name.startswith("_")}
    config.pop("transformers_version", None)
    headers = sorted((entry.name, entry.shape, entry.dtype) for entry in checkpoint.entries)
    return hashlib.sha256(json.dumps([config, headers], sort_keys=True, default=str).encode()).hexdigest()


# --- widths --------------------------------------------------------------------------------------------------------


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
    request = _spare_refused(before, refused, request, deviations)
    if architecture.hidden_follows_heads:
        request = _heads_from_hidden(before, request, deviations)
    groups = heads = 0
    if before.num_attention_heads:
        groups = _groups(before, request, deviations)
        heads = _heads(before, groups, request, deviations)
    elif request.asks_for_heads:
        raise PlanError(f"{architecture.config.model_type} has no attention heads. Leave their options out.")
    neurons = {width: _neurons(architecture, width, refused, request, deviations) for width in NEURONS}
    hidden = _size(before.hidden_size, "hidden_size", request.hidden_size, request.hidden_pruning_ratio, request)
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
    return _stepped(architecture, width, _size(whole, width, exact, ratio, request), exact is not None, deviations)


def _stepped(architecture: Architecture, width: str, size: int, exact: bool, deviations: list[str]) -> int:
    """A size moved down to a multiple of the step that kernels for experts want.

    Raises:
        PlanError: an exact size that is none, or nothing left.
    """
    whole, step = getattr(architecture.widths, width), architecture.step_of(width)
    if size == whole or size % step == 0:
        return size
    legal = _near(size, step, whole)
    if exact or legal[0] > size:
        raise PlanError(
            f"{width} = {size} is not legal: the grouped matrix products that run experts want a multiple of {step}. "
            f"Legal values near it: {', '.join(map(str, legal)) or 'none'}."
        )
    deviations.append(f"{width} is {legal[0]} instead of {size}: kernels for experts want a multiple of {step}.")
    return legal[0]


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
            f"{whole}. Legal values: {_listed(legal)}."
        )
    return count


def legal_experts(architecture: Architecture) -> range:
    """The counts of experts that leave the router enough to pick from, evenly in each of its groups."""
    groups = architecture.expert_groups
    picked_groups = getattr(architecture.config, "topk_group", None) or 1
    least = math.ceil(architecture.experts_per_token / (picked_groups if groups > 1 else 1))
    per_group = max(least, 2) if groups > 1 else least  # a group's rank is the sum of its two best
    return range(groups * per_group, architecture.widths.num_experts + 1, groups)


def _listed(values: range) -> str:
    """A range in words: all of a few, the ends of many."""
    if len(values) <= 12:
        return ", ".join(map(str, values)) or "none"
    return f"{values[0]}, {values[1]}, … {values[-1]}"


def protected_layers(before: Widths, request: WidthRequest) -> tuple[int, ...]:
    """The numbers of the layers that may not change, from the first."""
    whole = before.num_hidden_layers
    outside = [layer for layer in request.keep_layers if not -whole <= layer < whole]
    if outside:
        raise PlanError(
            f"Layers {', '.join(map(str, outside))} cannot be kept: the model has layers 0 to {whole - 1}, from the "
            f"end -1 to {-whole}. Choose --keep-layers among these."
        )
    return tuple(sorted({layer % whole for layer in request.keep_layers}))


def _layers(
    architecture: Architecture, request: WidthRequest, protected: tuple[int, ...], deviations: list[str]
) -> tuple[int, ...]:
    """The layers that stay.

    Of a number of layers, the deepest go but for the last, which does other work (Gromov et al., "The Unreasonable
    Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 4.4), and but for those that are protected. Where
    the configuration places its kinds of layers by a rhythm that this would break, the last go.
    """
    whole = architecture.widths.num_hidden_layers
    if request.drop_layers is not None:
        dropped = {layer + whole if layer < 0 else layer for layer in request.drop_layers}
        if not dropped <= set(range(whole)) or len(dropped) == whole:
            raise PlanError(
                f"Layers {', '.join(map(str, request.drop_layers))} cannot be dropped: the model has layers 0 to "
                f"{whole - 1}, and one must stay."
            )
        if both := sorted(dropped & set(protected)):
            raise PlanError(
                f"Layers {', '.join(map(str, both))} are to be kept and to be dropped. Take them out of --keep-layers "
                "or of --drop-layers."
            )
        return tuple(layer for layer in range(whole) if layer not in dropped)
    if request.num_hidden_layers is None:
        return tuple(range(whole))
    count = _exact("num_hidden_layers", request.num_hidden_layers, whole)
    deepest_first = [layer for layer in (*reversed(range(whole - 1)), whole - 1) if layer not in protected]
    if whole - count > len(deepest_first):
        raise PlanError(
            f"--layers {count} is too few: {len(protected)} layers are protected. Ask for {len(protected)} to {whole}, "
            "or protect fewer with --keep-layers."
        )
    dropped = set(deepest_first[: whole - count])
    kept = tuple(layer for layer in range(whole) if layer not in dropped)
    if not can_keep_layers(architecture.config, kept) and set(protected) <= set(range(count)):
        family = architecture.config.model_type
        deviations.append(f"The last {whole - count} layers go, so that {family} keeps its rhythm of layers.")
        return tuple(range(count))
    return kept


def _groups(before: Widths, request: WidthRequest, deviations: list[str]) -> int:
    whole = before.num_key_value_heads
    if request.num_key_value_heads is not None:
        return _exact("num_key_value_heads", request.num_key_value_heads, whole)
    ratio = request.kv_group_pruning_ratio
    if before.heads_per_group == 1:  # every query head has a KV head of its own: they go together
        if request.num_attention_heads is not None:
            return _exact("num_attention_heads", request.num_attention_heads, whole)
        ratios = (ratio, request.head_pruning_ratio, request.pruning_ratio)
        ratio = next((r for r in ratios if r is not None), None)
    if ratio is None:
        return whole
    return _at_least_one("KV groups", whole - math.ceil(ratio * whole), deviations)


def _heads(before: Widths, groups: int, request: WidthRequest, deviations: list[str]) -> int:
    whole, per_group = before.num_attention_heads, before.heads_per_group
    legal = [groups * count for count in range(1, per_group + 1)]
    if request.num_attention_heads is not None:
        _exact("num_attention_heads", request.num_attention_heads, whole)
        if request.num_attention_heads not in legal:
            raise PlanError(
                f"{request.num_attention_heads} query heads cannot be shared evenly by {groups} KV groups that have "
                f"{per_group} each. Legal values: {', '.join(map(str, legal))}."
            )
        return request.num_attention_heads
    ratio = request.pruning_ratio if request.head_pruning_ratio is None else request.head_pruning_ratio
    if ratio is None or per_group == 1:
        return legal[-1]
    removed = math.ceil(math.ceil(ratio * whole) / before.num_key_value_heads)
    return groups * _at_least_one("query heads in a KV group", per_group - removed, deviations)


def _size(whole: int, width: str, exact: int | None, ratio: float | None, request: WidthRequest) -> int:
    if exact is not None:
        return _exact(width, exact, whole)
    ratio = request.pruning_ratio if ratio is None else ratio
    if not ratio:
        return whole
    kept = int(whole * (1 - ratio))
    rounded = kept - kept % request.round_to
    if rounded < 1:
        raise PlanError(
            f"{width} = {whole} at pruning ratio {ratio:g} leaves {kept}, which no multiple of {request.round_to} fits."
        )
    return rounded


def _exact(width: str, size: int, whole: int) -> int:
    if not 1 <= size <= whole:
        raise PlanError(f"{width} = {size} is not possible: the model has {whole}. Legal values: 1 to {whole}.")
    return size


def _at_least_one(what: str, count: int, deviations: list[str]) -> int:
    if count < 1:
        deviations.append(f"One of the {what} stays, although the ratio asks for none.")
    return max(1, count)


def _heads_from_hidden(before: Widths, request: WidthRequest, deviations: list[str]) -> WidthRequest:
    """Where the hidden size is query heads times head dim, a request for the hidden size alone is one for the heads."""
    if request.asks_for_heads or request.pruning_ratio is not None:
        return request
    if request.hidden_size is None and request.hidden_pruning_ratio is None:
        return request
    hidden = _size(before.hidden_size, "hidden_size", request.hidden_size, request.hidden_pruning_ratio, request)
    groups = before.num_key_value_heads if before.heads_per_group > 1 else 1
    step = groups * before.head_dim
    if request.hidden_size is not None and hidden % step:
        raise PlanError(
            f"hidden_size must be a multiple of {step} here (query heads × head dim). "
            f"Legal values near {hidden}: {', '.join(map(str, _near(hidden, step, before.hidden_size)))}."
        )
    heads = min(_near(hidden, step, before.hidden_size), key=lambda size: abs(size - hidden)) // before.head_dim
    deviations.append(f"The hidden size is query heads × head dim in this family, so {heads} query heads stay.")
    return replace(request, num_attention_heads=heads, hidden_size=None, hidden_pruning_ratio=0.0)


def _legal_hidden(
    architecture: Architecture, heads: int, hidden: int, request: WidthRequest, deviations: list[str]
) -> int:
    before = architecture.widths
    if architecture.hidden_follows_heads:
        legal, rule = [heads * before.head_dim], "query heads × head dim"
    elif architecture.hidden_multiple_of_heads:
        step = math.lcm(heads, request.round_to) if request.hidden_size is None else heads
        step = step if step <= hidden else heads
        legal, rule = _near(hidden, step, before.hidden_size), "a multiple of the query heads"
    else:
        return _stepped(architecture, "hidden_size", hidden, request.hidden_size is not None, deviations)
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


def _near(size: int, step: int, whole: int) -> list[int]:
    """The multiples of `step` on both sides of `size` that lie in 1 … whole."""
    below = size - size % step
    return [multiple for multiple in (below, below + step) if 1 <= multiple <= whole]


def legal_values(architecture: Architecture, trace: Trace) -> dict[str, str]:
    """For each prunable width, the sizes that it can have, in words; for a refused width, the reason."""
    widths = architecture.widths
    groups, per_group = widths.num_key_value_heads, widths.heads_per_group

    def up_to(width: str) -> str:
        step, whole = architecture.step_of(width), getattr(widths, width)
        return f"{step} to {whole}, multiples of {step}" if step > 1 else f"1 to {whole}"

    hidden = up_to("hidden_size")
    if architecture.hidden_follows_heads:
        hidden = f"query heads × {widths.head_dim}"
    elif architecture.hidden_multiple_of_heads:
        hidden += ", multiples of the query heads"
    heads = ", ".join(str(groups * count) for count in range(1, per_group + 1))
    together = f"1 to {groups}, query and KV heads together"
    by_head = {
        "num_attention_heads": together if per_group == 1 else heads,
        "num_key_value_heads": together if per_group == 1 else f"1 to {groups}, each with its query heads",
        "head_dim": "",
    }
    texts = {
        "hidden_size": hidden,
        **(by_head if widths.num_attention_heads else {}),
        **{width: up_to(width) for width in NEURONS if getattr(widths, width)},
        **({"num_experts": _listed(legal_experts(architecture))} if widths.num_experts else {}),
        "num_hidden_layers": f"1 to {widths.num_hidden_layers}",
    }
    return {width: f"no: {trace.refused[width]}" if width in trace.refused else text for width, text in texts.items()}


# --- units ---------------------------------------------------------------------------------------------------------


def choose(scores: Scores, architecture: Architecture, after: Widths) -> Keep:
    """The units that stay, each width ranked on its own: `torch.topk(…, largest=False)` names those to remove.

    Under grouped-query attention KV groups are chosen first, then query heads within every group that stays. Experts
    are chosen evenly within the groups that a router ranks.
    """
    keep: Keep = {}
    before = architecture.widths
    changed = after.changed_from(before)
    for width in ("hidden_size", *NEURONS):
        if width in changed:
            keep[width] = {i: _best(score, getattr(after, width)) for i, score in scores.get(width, {}).items()}
    if "num_experts" in changed:
        groups = architecture.expert_groups
        by_layer = scores.get("num_experts", {})
        keep["num_experts"] = {i: _best_evenly(score, groups, after.num_experts) for i, score in by_layer.items()}
    if "num_attention_heads" not in changed:
        return keep
    width = "num_attention_heads"
    keep[width], keep["num_key_value_heads"] = {}, {}
    for instance, by_head in scores[width].items():
        per_group = by_head.view(before.num_key_value_heads, -1)
        by_group = scores["num_key_value_heads"][instance] if before.heads_per_group > 1 else by_head
        groups_kept = _best(by_group, after.num_key_value_heads)
        heads = [
            group * before.heads_per_group + head
            for group in groups_kept
            for head in _best(per_group[group], after.heads_per_group)
        ]
        keep[width][instance], keep["num_key_value_heads"][instance] = tuple(heads), groups_kept
    return keep


def _best_evenly(score: torch.Tensor, groups: int, count: int) -> tuple[int, ...]:
    size = len(score) // groups
    chosen = [_best(part, count // groups) for part in score.view(groups, size)]
    return tuple(group * size + unit for group, units in enumerate(chosen) for unit in units)


def _best(score: torch.Tensor, count: int) -> tuple[int, ...]:
    removed = torch.topk(score, len(score) - count, largest=False).indices
    mask = torch.ones(len(score), dtype=torch.bool)
    mask[removed] = False
    return tuple(mask.nonzero().flatten().tolist())


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
        for width in ("hidden_size", "num_key_value_heads", "num_experts", *NEURONS)
    }
    chosen["num_attention_heads"] = heads
    keep: Keep = {width: _Everywhere(units) for width, units in chosen.items()}
    counts: dict[str, dict[int, int]] = {}
    result = {}
    layers, first_experts = renumbered(target.layers), renumbered(chosen["num_experts"])
    experts = {str(layer): first_experts for layer in target.layers}
    for name, shape in shapes.items():
        new = new_name(name, trace, layers, experts)
        if new is None:
            continue
        template, numbers = split_name(name)
        if template not in counts:
            axes = {binding.axis for binding in trace.on(template)}
            counts[template] = {
                axis: int(kept_mask(trace, template, axis, numbers, keep, before).sum()) for axis in axes
            }
        result[new] = tuple(counts[template].get(axis, size) for axis, size in enumerate(shape))
    return result


class _Everywhere(dict[str, tuple[int, ...]]):
    """The same units for every instance."""

    def __init__(self, units: tuple[int, ...]) -> None:
        self._units = units

    def get(self, instance: str, default: Any = None) -> Any:
        return self._units
