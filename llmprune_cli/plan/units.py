"""Which units stay: the best of each choice by its scores."""

from __future__ import annotations

import torch

from llmprune_cli.coupling.trace import Instance, Keep
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.family.widths import NEURONS, Width, Widths

Scores = dict[str, dict[Instance, torch.Tensor]]  # width → instance → score of each unit, float32 [units]


def choose(scores: Scores, architecture: Architecture, after: Widths) -> Keep:
    """The units that stay, each width ranked on its own: `torch.topk(…, largest=False)` names those to remove.

    Under grouped-query attention KV groups are chosen first, then query heads within every group that stays. Experts
    are chosen evenly within the groups that a router ranks.
    """
    keep: Keep = {}
    before = architecture.widths
    changed = after.changed_from(before)
    for width in (Width.HIDDEN, *NEURONS):
        if width in changed:
            keep[width] = {i: _best(score, getattr(after, width)) for i, score in scores.get(width, {}).items()}
    if Width.EXPERTS in changed:
        groups = architecture.expert_groups
        by_layer = scores.get(Width.EXPERTS, {})
        keep[Width.EXPERTS] = {i: _best_evenly(score, groups, after.num_experts) for i, score in by_layer.items()}
    if Width.HEADS not in changed:
        return keep
    keep[Width.HEADS], keep[Width.GROUPS] = {}, {}
    for instance, by_head in scores.get(Width.HEADS, {}).items():
        if architecture.kv_heads:  # which all stay
            groups = architecture.kv_heads_in(instance.layer)
            keep[Width.HEADS][instance] = _best_evenly(by_head, groups, after.num_attention_heads)
            continue
        per_group = by_head.view(before.num_key_value_heads, -1)
        by_group = scores[Width.GROUPS][instance] if before.heads_per_group > 1 else by_head
        groups_kept = _best(by_group, after.num_key_value_heads)
        heads = [
            group * before.heads_per_group + head
            for group in groups_kept
            for head in _best(per_group[group], after.heads_per_group)
        ]
        keep[Width.HEADS][instance], keep[Width.GROUPS][instance] = tuple(heads), groups_kept
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
