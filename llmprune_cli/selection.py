"""The choice of what stays: from a request, or a budget, over scores to a plan."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llmprune_cli.activations import CALIBRATED, Activity, measure_activity
from llmprune_cli.calibration import CalibrationText
from llmprune_cli.divergence import Side, compare
from llmprune_cli.errors import PlanError
from llmprune_cli.names import split_name
from llmprune_cli.options import Listener, PruneOptions
from llmprune_cli.plan import Plan, Target, WidthRequest, choose, fingerprint, read_plan, resolve
from llmprune_cli.reconstruction import Streams, refit
from llmprune_cli.scoring import IMPORTANCES, Scores, instances
from llmprune_cli.search import Budget, Candidate, choose_candidate, find_candidates, least_target
from llmprune_cli.statistics_store import StatisticsStore, statistics_key
from llmprune_cli.subject import Subject
from llmprune_cli.workfolder import WorkFolder

SEARCH_WINDOWS = 8  # of calibration text on which a candidate is refitted; half as many are held out to judge it


def stored_plan(subject: Subject, path: Path) -> Plan:
    """A saved plan.

    Raises:
        PlanError: it was made for another model, or is not a plan.
    """
    plan = read_plan(path)
    if plan.fingerprint != fingerprint(subject.checkpoint) or plan.before != subject.widths:
        raise PlanError(
            f"{path} was made for another model. Make a plan for {subject.checkpoint.source} with --save-plan."
        )
    return plan


def target_of(plan: Plan) -> Target:
    """The widths that a plan comes to."""
    return Target(plan.after, plan.layers, plan.deviations)


def first_target(subject: Subject, options: PruneOptions) -> Target:
    """The widths asked for; with a budget, the least that the search reaches.

    Raises:
        PlanError: no legal widths come of the request.
    """
    if options.budget is not None:
        return least_target(subject)
    return resolve(subject.architecture, subject.trace.refused, options.request)


def select(
    subject: Subject,
    target: Target,
    options: PruneOptions,
    calibration: CalibrationText | None,
    work: WorkFolder | None,
    listener: Listener,
) -> tuple[Plan, tuple[Candidate, ...]]:
    """Choose the units that stay, with a budget the widths as well; and the candidates among these, best first.

    Args:
        work: that remembers what was chosen.
    """
    chosen = work.choice() if work is not None else None
    if chosen is not None:
        return chosen
    if options.budget is not None and calibration is not None:
        chosen = search_plan(subject, options.budget, options, calibration, work, listener)
    else:
        chosen = make_plan(subject, target, options, calibration, listener, work), ()
    if work is not None:
        work.save_choice(*chosen)
    return chosen


def make_plan(
    subject: Subject,
    target: Target,
    options: PruneOptions,
    calibration: CalibrationText | None,
    listener: Listener,
    work: WorkFolder | None = None,
) -> Plan:
    """Score all units on the unpruned model and choose those that stay."""
    if options.importance in CALIBRATED and calibration is not None:
        activity = _measure(subject, options, calibration, work, listener)
        target = _without_least_influence(subject, target, options.request, activity)
        scores = _completed(subject, target, activity.scores, listener)
    else:
        scores = _score_weights(subject, target, options.importance, options.seed, listener)
    return _plan_of(subject, target, options, scores)


def _plan_of(subject: Subject, target: Target, options: PruneOptions, scores: Scores) -> Plan:
    before = subject.widths
    stays = {str(layer) for layer in target.layers}
    scores = {
        width: {name: own for name, own in by.items() if not name or re.split("[.#]", name)[0] in stays}
        for width, by in scores.items()
    }
    keep = choose(scores, subject.architecture, target.widths)
    mark = fingerprint(subject.checkpoint)
    return Plan(mark, before, target.widths, options.importance, options.seed, target.deviations, target.layers, keep)


def search_plan(
    subject: Subject,
    budget: Budget,
    options: PruneOptions,
    calibration: CalibrationText,
    work: WorkFolder | None,
    listener: Listener,
) -> tuple[Plan, tuple[Candidate, ...]]:
    """The plan that diverges least from the dense model among those that fit a budget, and the candidates it beat.

    Activity is measured once; each candidate is refitted on a part of the text and judged on what is held out.
    """
    import torch

    activity = _measure(subject, options, calibration, work, listener)
    least = least_target(subject)
    every = replace(least, layers=tuple(range(subject.widths.num_hidden_layers)))
    if options.importance in CALIBRATED:
        scores = _completed(subject, every, activity.scores, listener)
    else:
        scores = _score_weights(subject, every, options.importance, options.seed, listener)
    found = find_candidates(subject, budget, activity.influence)
    model = subject.layered(options.layer_device)
    fitted, judged = calibration.fitted[:SEARCH_WINDOWS], calibration.held_out[: SEARCH_WINDOWS // 2]

    def judge(target: Target) -> float:
        known = work.judged(target) if work is not None else None
        if known is not None:
            return known
        plan = _plan_of(subject, target, options, scores)
        listener.stage(f"Trying {_in_words(target)}", subject.widths.num_hidden_layers)
        with torch.inference_mode():
            start = model.embed(torch.cat([fitted, judged]))
            streams = Streams(start, start.clone(), len(fitted))
            refit(model, subject.trace, plan, streams, options.refit, None, listener.advance)
            ends = model.load_ends(exact=True)
            items = model.load_layer(0).returned_items(start)
            dense, pruned = (Side(ends, states[len(fitted) :], items) for states in (streams.dense, streams.pruned))
            kl = compare(dense, pruned, judged).kl
        if work is not None:
            work.save_judged(target, kl)
        return kl

    judged_candidates = choose_candidate(found, judge) if len(found) > 1 else tuple(found)
    return _plan_of(subject, judged_candidates[0].target, options, scores), judged_candidates


def _in_words(target: Target) -> str:
    widths = target.widths
    return f"{len(target.layers)} layers, {widths.num_key_value_heads} KV groups, {widths.intermediate_size} neurons"


def _completed(subject: Subject, target: Target, scores: Scores, listener: Listener) -> Scores:
    """The scores with those by magnitude of widths that several weights read together, which no activity ranks."""
    changed = target.widths.changed_from(subject.widths)
    needed = instances(subject.checkpoint, subject.trace.limited_to(changed))
    missing = {width for width, name in needed if name not in scores.get(width, {})}
    if not missing:
        return scores
    listener.warn(f"No activity ranks {', '.join(sorted(missing))} in all layers; magnitude does.")
    return {
        **scores,
        **{w: s for w, s in _score_weights(subject, target, "magnitude", 0, listener).items() if w in missing},
    }


def _score_weights(subject: Subject, target: Target, importance: str, seed: int, listener: Listener) -> Scores:
    changed = target.widths.changed_from(subject.widths)
    scored = tuple(width for width in changed if width != "num_hidden_layers")
    if not scored:
        return {}
    stays = [split_name(entry.name)[1][:1] for entry in subject.checkpoint.entries]
    entries = [e for e, layer in zip(subject.checkpoint.entries, stays, strict=True) if {*layer} <= {*target.layers}]
    checkpoint = replace(subject.checkpoint, entries=tuple(entries))
    listener.stage("Scoring", checkpoint.size_bytes)
    score = IMPORTANCES[importance]
    return score(checkpoint, subject.trace.limited_to(scored), subject.widths, seed, listener.advance)


def _measure(
    subject: Subject,
    options: PruneOptions,
    calibration: CalibrationText,
    work: WorkFolder | None,
    listener: Listener,
) -> Activity:
    import torch

    def measure() -> Activity:
        model, folder = subject.layered(options.layer_device), options.offload_dir
        listener.stage("Measuring activity", model.layers)
        with torch.inference_mode():
            stream = model.embed(calibration.fitted, folder)
            return measure_activity(model, subject.trace, stream, options.importance, listener.advance, folder)

    folder = options.statistics or (work.statistics if work is not None else None)
    if folder is None:
        return measure()
    key = statistics_key(subject.checkpoint, calibration.fitted, options.layer_device)
    return StatisticsStore(folder, key, listener.warn).recall(options.importance, measure)


def _without_least_influence(subject: Subject, target: Target, request: WidthRequest, activity: Activity) -> Target:
    """The target with as many layers, but without those that turn the residual stream least."""
    count = request.num_hidden_layers
    if count is None or count == subject.widths.num_hidden_layers:
        return target
    order = sorted(range(len(activity.influence)), key=activity.influence.__getitem__)
    dropped = tuple(sorted(order[: len(order) - count]))
    chosen = replace(request, num_hidden_layers=None, drop_layers=dropped)
    try:
        return resolve(subject.architecture, subject.trace.refused, chosen)
    except PlanError:  # these layers cannot go together; those of the target can
        return target
