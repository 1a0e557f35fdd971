"""Which widths a family can really lose: those that are offered are proven on the twin, together or one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune_cli.apply.proof import OTHERS, DifferingError, compare, prove_target
from llmprune_cli.apply.pruned_folder import prune_twin
from llmprune_cli.apply.second_opinion import disagreements, hold_against_torch_pruning
from llmprune_cli.coupling.subject import Subject, known_architecture
from llmprune_cli.coupling.twin import NoLogitsError, one_thread
from llmprune_cli.errors import LlmpruneError, UnsupportedError
from llmprune_cli.family.widths import HEAD_COUNTS, Width
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.startup.remembered import recall, remember


@dataclass(frozen=True)
class Unproven:
    """What the proof refuses, as it is remembered."""

    reasons: dict[str, str]  # width → why


def check_proof(subject: Subject, target: Target) -> None:
    """Prove a change of widths, and hold what was found out about them against torch-pruning.

    Raises:
        PlanError: one of the widths cannot be pruned at all.
        UnsupportedError: all of them together cannot.
    """
    with one_thread():
        try:
            prove_target(subject, target, prune_twin)
        except NoLogitsError:
            raise
        except UnsupportedError:
            leave_unproven(subject).require(target.widths)
            raise
        changed = target.widths.changed_from(subject.widths)
        hold_against_torch_pruning(subject.architecture, subject.trace.limited_to(changed))


def leave_unproven(subject: Subject) -> Subject:
    """The same subject, which refuses the widths that its twin does not prove."""
    return refusing(subject, unproven(subject))


def refusing(subject: Subject, reasons: dict[str, str]) -> Subject:
    """The same subject, which refuses more widths."""
    refused = {**reasons, **subject.trace.refused}
    return replace(subject, trace=replace(subject.trace, refused=refused))


def unproven(subject: Subject) -> dict[str, str]:
    """The widths that the twin does not prove, and why: as remembered, or found out now.

    Raises:
        NoLogitsError: see `find_unproven`.
    """
    place = known_architecture("proof", subject.architecture, *sorted(subject.trace.refused))
    known = recall(place, Unproven)
    if known is None:
        with one_thread():
            known = Unproven(find_unproven(subject))
        remember(place, known)
    return known.reasons


def find_unproven(subject: Subject) -> dict[str, str]:
    """The widths that are offered and for which the proof fails, with the reason; all at once where they all hold.

    Raises:
        NoLogitsError: a small model of this configuration gives nothing that could be compared.
    """
    parts = _parts(subject)
    offered = tuple(width for part in parts for width in part)
    try:
        disputed = disagreements(subject.architecture, subject.trace.limited_to(offered))
    except LlmpruneError as error:
        return dict.fromkeys(offered, str(error).rstrip("."))
    if not disputed and _why_not(subject, offered) is None:
        return {}
    reasons: dict[str, str] = {}
    for part in parts:
        reason = next((disputed[width] for width in part if width in disputed), None) or _why_not(subject, part)
        if reason is not None:
            reasons |= dict.fromkeys(part, reason.rstrip("."))
    return reasons


def _parts(subject: Subject) -> list[tuple[str, ...]]:
    """What is offered, widths that go together in one part."""
    architecture = subject.architecture
    offered = {binding.width for binding in subject.trace.bindings} | {str(Width.LAYERS)}
    offered -= subject.trace.refused.keys()
    is_offered = not offered.isdisjoint(HEAD_COUNTS)
    heads = tuple(str(width) for width in HEAD_COUNTS if is_offered and width not in subject.trace.refused)
    if heads and architecture.hidden_follows_heads:
        heads = (*heads, str(Width.HIDDEN))
    return [*([heads] if heads else []), *((width,) for width in sorted(offered - {*heads}))]


def _why_not(subject: Subject, widths: tuple[str, ...]) -> str | None:
    """Why a change of these widths is not proven; None where it is."""
    try:
        compare(subject.architecture, subject.trace, widths, prune_twin)
    except NoLogitsError:
        raise
    except LlmpruneError as error:
        if Width.LAYERS not in widths or not _last_layers_go(subject, widths):
            return f"{error} {OTHERS}" if isinstance(error, DifferingError) else str(error)
    return None


def _last_layers_go(subject: Subject, widths: tuple[str, ...]) -> bool:
    """Whether layers can go from the end, so that none that stays gets another number."""
    try:
        compare(subject.architecture, subject.trace, widths, prune_twin, False)
    except LlmpruneError:
        return False
    return True
