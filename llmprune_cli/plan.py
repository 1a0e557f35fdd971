"""The plan: how wide every layer becomes and which units stay."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.architecture import Architecture, Shape, Widths, read_widths, split_name, with_widths
from llmprune_cli.checkpoint import Checkpoint, read_json
from llmprune_cli.errors import CheckpointError, OutputError, PlanError
from llmprune_cli.groups import Keep, Trace, kept_mask

if TYPE_CHECKING:
    import torch

    from llmprune_cli.scoring import Scores

PLAN_VERSION = 1


@dataclass(frozen=True)
class WidthRequest:
    """The widths that the user asked for; an exact size beats a ratio, a width's own ratio beats `pruning_ratio`."""

    pruning_ratio: float | None = None  # fraction removed of hidden channels, query heads and neurons
    hidden_pruning_ratio: float | None = None
    head_pruning_ratio: float | None = None
    kv_group_pruning_ratio: float | None = None
    intermediate_pruning_ratio: float | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    round_to: int = 1  # kept channels and neurons that come from a ratio are rounded down to a multiple of this

    @property
    def is_empty(self) -> bool:
        """Whether no width was asked for."""
        return all(getattr(self, field.name) is None for field in fields(self) if field.name != "round_to")


@dataclass(frozen=True)
class Target:
    """The widths that a request comes to."""

    widths: Widths
    deviations: tuple[str, ...]  # where legality moved a width away from what was asked


@dataclass(frozen=True)
class Plan:
    """Everything that surgery needs to know; JSON in, JSON out."""

    fingerprint: str  # SHA-256 of the source's configuration and tensor headers
    before: Widths
    after: Widths
    importance: str
    seed: int
    deviations: tuple[str, ...]
    keep: Keep

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the widths that shrink."""
        return self.after.changed_from(self.before)

    def to_json(self) -> dict[str, Any]:
        """A document for `read_plan`."""
        return {"plan_version": PLAN_VERSION, **asdict(self)}


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan, by temporary file and rename.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.llmprune")
    try:
        temporary.write_text(json.dumps(plan.to_json()) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"The plan cannot be written to {path}: {reason}. Choose another --save-plan.") from error


def read_plan(path: Path) -> Plan:
    """The plan in a file, checked for consistency.

    Raises:
        CheckpointError: not a plan, or one whose counts contradict its indices.
    """
    document = read_json(path)
    if document.pop("plan_version", None) != PLAN_VERSION:
        raise CheckpointError(f"{path} is not a plan of version {PLAN_VERSION}. Make one with --save-plan.")
    try:
        before, after = (Widths(**document.pop(name)) for name in ("before", "after"))
        keep = {
            width: {instance: tuple(units) for instance, units in chosen.items()}
            for width, chosen in document.pop("keep").items()
        }
        deviations = tuple(map(str, document.pop("deviations")))
        plan = Plan(before=before, after=after, deviations=deviations, keep=keep, **document)
        consistent = all(
            type(unit) is int for choice in plan.keep.values() for units in choice.values() for unit in units
        ) and all(type(size) is int for size in (*asdict(before).values(), *asdict(after).values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a plan ({error!r}). Make one with --save-plan.") from error
    for width, choice in plan.keep.items():
        for instance, kept in choice.items():
            whole, part = getattr(before, width, 0), getattr(after, width, 0)
            inside = (
                consistent and len(kept) == part and kept == tuple(sorted(set(kept))) and set(kept) <= set(range(whole))
            )
            if not inside:
                raise CheckpointError(f"{path}: the units kept of {width} {instance} do not match its widths.")
    return plan


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what a plan depends on: the configuration and every tensor's name, shape and dtype."""
    config = {name: value for name, value in checkpoint.config.to_dict().items() if not name.startswith("_")}
    config.pop("transformers_version", None)
    headers = sorted((entry.name, entry.shape, entry.dtype) for entry in checkpoint.entries)
    return hashlib.sha256(json.dumps([config, headers], sort_keys=True, default=str).encode()).hexdigest()


# --- widths --------------------------------------------------------------------------------------------------------


def resolve(architecture: Architecture, request: WidthRequest) -> Target:
    """The legal widths nearest to a request, counted as the reference counts them.

    Channels and neurons kept: `int(N·(1−r))`. Query heads removed: `ceil(r·H)`, under grouped-query attention
    `ceil(ceil(r·H)/K)` in every KV group. Heads are fixed first; where the family ties the hidden size to them, it goes
    to the nearest legal value.

    Raises:
        PlanError: widths that the architecture cannot have, naming those that it can.
    """
    deviations: list[str] = []
    before = architecture.widths
    if not architecture.explicit_head_dim:
        request = _heads_from_hidden(before, request, deviations)
    groups = _groups(before, request, deviations)
    heads = _heads(before, groups, request, deviations)
    neurons = _size(
        before.intermediate_size,
        "intermediate_size",
        request.intermediate_size,
        request.intermediate_pruning_ratio,
        request,
    )
    hidden = _size(before.hidden_size, "hidden_size", request.hidden_size, request.hidden_pruning_ratio, request)
    hidden = _legal_hidden(architecture, heads, hidden, request, deviations)
    widths = replace(
        before,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=neurons,
    )
    try:
        if read_widths(with_widths(architecture, widths)) != widths:
            raise ValueError("the configuration does not keep them")
    except ValueError as error:
        raise PlanError(f"{architecture.config.model_type} refuses these widths: {error}") from error
    return Target(widths, tuple(deviations))


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
    asked_heads = (request.num_attention_heads, request.num_key_value_heads, request.head_pruning_ratio)
    if any(value is not None for value in (*asked_heads, request.kv_group_pruning_ratio, request.pruning_ratio)):
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
    if not architecture.explicit_head_dim:
        legal, rule = [heads * before.head_dim], "query heads × head dim"
    elif architecture.hidden_multiple_of_heads:
        step = math.lcm(heads, request.round_to) if request.hidden_size is None else heads
        step = step if step <= hidden else heads
        legal, rule = _near(hidden, step, before.hidden_size), "a multiple of the query heads"
    else:
        return hidden
    if hidden in legal:
        return hidden
    if not legal or (request.hidden_size is not None and architecture.explicit_head_dim):
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
    hidden = f"1 to {widths.hidden_size}"
    if not architecture.explicit_head_dim:
        hidden = f"query heads × {widths.head_dim}"
    elif architecture.hidden_multiple_of_heads:
        hidden += ", multiples of the query heads"
    heads = ", ".join(str(groups * count) for count in range(1, per_group + 1))
    together = f"1 to {groups}, query and KV heads together"
    texts = {
        "hidden_size": hidden,
        "num_attention_heads": together if per_group == 1 else heads,
        "num_key_value_heads": together if per_group == 1 else f"1 to {groups}, each with its query heads",
        "intermediate_size": f"1 to {widths.intermediate_size}",
    }
    return {width: f"no: {trace.refused[width]}" if width in trace.refused else text for width, text in texts.items()}


# --- units ---------------------------------------------------------------------------------------------------------


def choose(scores: Scores, before: Widths, after: Widths) -> Keep:
    """The units that stay, each width ranked on its own: `torch.topk(…, largest=False)` names those to remove.

    Under grouped-query attention KV groups are chosen first, then query heads within every group that stays.
    """
    keep: Keep = {}
    changed = after.changed_from(before)
    for width in ("hidden_size", "intermediate_size"):
        if width in changed:
            keep[width] = {i: _best(score, getattr(after, width)) for i, score in scores[width].items()}
    if "num_attention_heads" not in changed:
        return keep
    width = "num_attention_heads"
    keep[width], keep["num_key_value_heads"] = {}, {}
    for instance, by_head in scores[width].items():
        per_group = by_head.view(before.num_key_value_heads, -1)
        by_group = scores["num_key_value_heads"][instance] if before.heads_per_group > 1 else by_head
        groups = _best(by_group, after.num_key_value_heads)
        heads = [
            group * before.heads_per_group + head
            for group in groups
            for head in _best(per_group[group], after.heads_per_group)
        ]
        keep[width][instance], keep["num_key_value_heads"][instance] = tuple(heads), groups
    return keep


def _best(score: torch.Tensor, count: int) -> tuple[int, ...]:
    import torch

    removed = torch.topk(score, len(score) - count, largest=False).indices
    mask = torch.ones(len(score), dtype=torch.bool)
    mask[removed] = False
    return tuple(mask.nonzero().flatten().tolist())


def predicted_shapes(shapes: dict[str, Shape], trace: Trace, before: Widths, after: Widths) -> dict[str, Shape]:
    """Shapes after pruning, from the widths alone."""
    heads = tuple(
        group * before.heads_per_group + head
        for group in range(after.num_key_value_heads)
        for head in range(after.heads_per_group)
    )
    first = {
        width: tuple(range(getattr(after, width)))
        for width in ("hidden_size", "intermediate_size", "num_key_value_heads")
    }
    chosen = {**first, "num_attention_heads": heads}
    counts: dict[str, dict[int, int]] = {}
    result = {}
    for name, shape in shapes.items():
        template, _ = split_name(name)
        if template not in counts:
            axes = {binding.axis for binding in trace.on(template)}
            counts[template] = {axis: int(kept_mask(trace, template, axis, chosen, before).sum()) for axis in axes}
        result[name] = tuple(counts[template].get(axis, size) for axis, size in enumerate(shape))
    return result
