"""How many units a ratio leaves, as the reference counts them, and what that is rounded to."""

from __future__ import annotations

import math

from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import Architecture, legal_heads, most_heads
from llmprune_cli.family.widths import Widths
from llmprune_cli.options import WidthRequest
from llmprune_cli.plan.legal import within

WORTH_SAYING = 0.005  # of a width, that more goes than was asked for
WHOLE_BLOCKS = 256  # weights that K-quants pack together; groups of 128 share a scale elsewhere
COARSEST = 22  # steps in the whole width, at least, where a ratio decides: MLPs are often 11 · 2^n wide


def check_heads_agree(before: Widths, request: WidthRequest) -> None:
    """Where every query head has a KV head of its own, make sure that nobody asks for two numbers of them.

    Raises:
        PlanError: see above.
    """
    if before.heads_per_group > 1 or not before.num_attention_heads:
        return
    whole = before.num_attention_heads
    asked = (
        (request.num_attention_heads, request.head_pruning_ratio),
        (request.num_key_value_heads, request.kv_group_pruning_ratio),
    )
    heads, groups = (
        max(1, whole - math.ceil(_exact(ratio * whole))) if exact is None and ratio is not None else exact
        for exact, ratio in asked
    )
    if heads is not None and groups is not None and heads != groups:
        raise PlanError(
            f"{heads} query heads and {groups} KV groups are asked for, and every query head of this model has a KV "
            "head of its own, so that there are as many of both. Ask for query heads alone."
        )


def count_groups(before: Widths, request: WidthRequest, deviations: list[str]) -> int:
    """KV groups that stay: K − ceil(r·K); where each query head has its own, heads and groups go alike."""
    whole = before.num_key_value_heads
    if request.num_key_value_heads is not None:
        return within("num_key_value_heads", request.num_key_value_heads, whole)
    ratio = own = request.kv_group_pruning_ratio
    if before.heads_per_group == 1:  # every query head has a KV head of its own: they go together
        if request.num_attention_heads is not None:
            return within("num_attention_heads", request.num_attention_heads, whole)
        own = request.head_pruning_ratio if ratio is None else ratio
        ratio = request.pruning_ratio if own is None else own
    if ratio is None:
        return whole
    kept = _at_least_one("KV groups", whole - math.ceil(_exact(ratio * whole)), deviations)
    _tell_more(f"{whole - kept} of {whole} KV groups", 1 - kept / whole, own, "only whole ones do", deviations)
    return kept


def count_heads(architecture: Architecture, groups: int, request: WidthRequest, deviations: list[str]) -> int:
    """Query heads that stay: every KV group loses ceil(ceil(r·H)/K) of them.

    Raises:
        PlanError: an exact number that the KV groups cannot share evenly.
    """
    before = architecture.widths
    whole, per_group, legal = before.num_attention_heads, before.heads_per_group, legal_heads(architecture, groups)
    if request.num_attention_heads is not None:
        within("num_attention_heads", request.num_attention_heads, whole)
        if request.num_attention_heads not in legal:
            raise PlanError(
                f"{request.num_attention_heads} query heads cannot be shared evenly by {groups} KV groups that have "
                f"{per_group} each. Legal values: {', '.join(map(str, legal))}."
            )
        return request.num_attention_heads
    ratio = request.pruning_ratio if request.head_pruning_ratio is None else request.head_pruning_ratio
    if ratio is None or per_group == 1:
        return legal[-1]
    removed = math.ceil(math.ceil(_exact(ratio * whole)) / before.num_key_value_heads)
    kept = groups * _at_least_one("query heads in a KV group", per_group - removed, deviations)
    heads = most_heads(architecture, groups, kept)
    if heads != kept:
        deviations.append(f"{heads} query heads stay instead of {kept}, which KV heads of every layer share evenly.")
    elif groups == before.num_key_value_heads:
        gone, own = f"{whole - heads} of {whole} query heads", request.head_pruning_ratio
        _tell_more(gone, 1 - heads / whole, own, "every KV group loses as many", deviations)
    return heads


def count_units(
    whole: int, width: str, exact: int | None, ratio: float | None, request: WidthRequest, usual_step: int = 1
) -> int:
    """Channels or neurons that stay: int(N·(1−r)), rounded down to a multiple.

    Args:
        usual_step: what it is a multiple of where the request leaves that open.

    Raises:
        PlanError: nothing is left, or an exact size that is none.
    """
    if exact is not None:
        return within(width, exact, whole)
    ratio = request.pruning_ratio if ratio is None else ratio
    if not ratio:
        return whole
    kept = int(_exact(whole * (1 - ratio)))
    step = request.round_to or (usual_step if kept >= usual_step else 1)
    rounded = kept - kept % step
    if rounded < 1:
        raise PlanError(
            f"{width} = {whole} at pruning ratio {ratio:g} leaves {kept}, which no multiple of {step} fits."
        )
    return rounded


def usual_step(whole: int, steps: int = COARSEST) -> int:
    """What numbers of neurons are a multiple of: what products of matrices, and blocks of weights in 4 bits, come in.

    Args:
        steps: as many as the MLP has, at least. It is 256, or the largest power of two that leaves so many.
    """
    return int(min(WHOLE_BLOCKS, 2 ** max(0, (whole // steps).bit_length() - 1)))


def _exact(units: float) -> float:
    """Of 25 heads 28% are 7, though floating point makes 7.000000000000001 of it, and a whole step more would go."""
    return round(units, 6)


def _at_least_one(what: str, count: int, deviations: list[str]) -> int:
    if count < 1:
        deviations.append(f"One of the {what} stays, although the ratio asks for none.")
    return max(1, count)


def _tell_more(gone: str, share: float, asked: float | None, why: str, deviations: list[str]) -> None:
    """Say that a ratio came to clearly more than it asks for.

    Args:
        gone: what goes, and of how many.
        share: that this is of the whole.
        asked: None where no ratio asks for this width by name.
    """
    if asked is not None and share - asked >= WORTH_SAYING:
        deviations.append(f"{gone} go, {100 * share:.0f}% instead of {100 * asked:g}%: {why}.")
