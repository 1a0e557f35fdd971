"""Which sizes an architecture can have."""

from __future__ import annotations

import math

from llmprune_cli.coupling.trace import Trace
from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import Architecture, legal_heads
from llmprune_cli.family.widths import NEURONS


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
    heads = ", ".join(map(str, legal_heads(architecture, groups)))
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
        **({"num_experts": listed(legal_experts(architecture))} if widths.num_experts else {}),
        "num_hidden_layers": f"1 to {widths.num_hidden_layers}",
    }
    return {width: f"no: {trace.refused[width]}" if width in trace.refused else text for width, text in texts.items()}


def legal_experts(architecture: Architecture) -> range:
    """The counts of experts that leave the router enough to pick from, evenly in each of its groups."""
    groups = architecture.expert_groups
    picked_groups = getattr(architecture.config, "topk_group", None) or 1
    least = math.ceil(architecture.experts_per_token / (picked_groups if groups > 1 else 1))
    per_group = max(least, 2) if groups > 1 else least  # a group's rank is the sum of its two best
    return range(groups * per_group, architecture.widths.num_experts + 1, groups)


def stepped(architecture: Architecture, width: str, size: int, exact: bool, deviations: list[str]) -> int:
    """A size moved down to a multiple of the step that kernels for experts want.

    Raises:
        PlanError: an exact size that is none, or nothing left.
    """
    whole, step = getattr(architecture.widths, width), architecture.step_of(width)
    if size == whole or size % step == 0:
        return size
    legal = near(size, step, whole)
    if exact or legal[0] > size:
        raise PlanError(
            f"{width} = {size} is not legal: the grouped matrix products that run experts want a multiple of {step}. "
            f"Legal values near it: {', '.join(map(str, legal)) or 'none'}."
        )
    deviations.append(f"{width} is {legal[0]} instead of {size}: kernels for experts want a multiple of {step}.")
    return legal[0]


def within(width: str, size: int, whole: int) -> int:
    """The size itself.

    Raises:
        PlanError: the model has no units, or not that many.
    """
    if not 1 <= size <= whole:
        raise PlanError(f"{width} = {size} is not possible: the model has {whole}. Legal values: 1 to {whole}.")
    return size


def near(size: int, step: int, whole: int) -> list[int]:
    """The multiples of `step` on both sides of `size` that lie in 1 … whole."""
    below = size - size % step
    return [multiple for multiple in (below, below + step) if 1 <= multiple <= whole]


def listed(values: range) -> str:
    """A range in words: all of a few, the ends of many."""
    if len(values) <= 12:
        return ", ".join(map(str, values)) or "none"
    return f"{values[0]}, {values[1]}, … {values[-1]}"
