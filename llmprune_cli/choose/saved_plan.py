"""A plan that was saved, held against the model that it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.family.widths import Width
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import place_of
from llmprune_cli.journal.keys import weights_sample
from llmprune_cli.plan.document import Plan, fingerprint, most_plan_bytes, read_plan
from llmprune_cli.plan.stored import MAKE_ONE


def stored_plan(subject: Subject, path: Path) -> Plan:
    """A saved plan.

    Raises:
        PlanError: it was made for another model, or is not a plan.
    """
    plan = read_plan(path, most_plan_bytes(subject.widths, int(subject.architecture.config.vocab_size)))
    if plan.fingerprint != fingerprint(subject.checkpoint) or plan.before != subject.widths:
        raise PlanError(
            f"{path} was made for another model. Make a plan for {subject.checkpoint.source} with --save-plan."
        )
    for place in _uneven(plan, subject.architecture):
        raise PlanError(f"{path} contradicts itself: {place} must name as many of each group. {MAKE_ONE}")
    return plan


def warn_of_other_weights(plan: Plan, path: Path, checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
    """Say so where a plan fits a model whose weights are not those that its units were chosen by."""
    own = weights_sample(checkpoint) if plan.weights is not None else None
    if own is not None and own != plan.weights:
        warn(
            f"{path} was made for other weights than those of {checkpoint.source}, though of the same shapes: the "
            "units that stay did well there. Make a plan for these weights with --save-plan."
        )


def _uneven(plan: Plan, architecture: Architecture) -> Iterator[str]:
    """Where experts that stay are not spread evenly over the groups of a router, or query heads over KV heads."""
    for width, whole in ((Width.EXPERTS, plan.before.num_experts), (Width.HEADS, plan.before.num_attention_heads)):
        for instance, kept in plan.keep.get(width, {}).items():
            shared = architecture.kv_heads_in(instance.layer) if architecture.kv_heads else 1
            groups = architecture.expert_groups if width == Width.EXPERTS else shared
            if Counter(unit * groups // whole for unit in kept) != Counter(list(range(groups)) * (len(kept) // groups)):
                yield place_of("keep", width, str(instance))
