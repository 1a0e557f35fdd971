"""The choice of what stays: from a request, or a budget, over scores to a plan."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from llmprune_cli.choose.ablation import ABLATION_TOKENS, ablate_layers
from llmprune_cli.choose.activity import CALIBRATED, Activity, measure_activity
from llmprune_cli.choose.consensus import GRADIENT_SHARE_TOKENS, agree
from llmprune_cli.choose.gradients import measure_gradients
from llmprune_cli.choose.magnitude import IMPORTANCES, Scores, check_scores, instances
from llmprune_cli.choose.search import Budget, Candidate, least_target, search_widths
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import PlanError
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.journal.sharedwork import SharedWork
from llmprune_cli.journal.statistics_store import StatisticsStore, statistics_key
from llmprune_cli.options import Listener, PruneOptions
from llmprune_cli.plan.target import (
    Plan,
    Target,
    WidthRequest,
    choose,
    fingerprint,
    most_plan_bytes,
    read_plan,
    resolve,
)
from llmprune_cli.repair.refit import Streams, refit
from llmprune_cli.run.calibration import CalibrationText, spread_windows
from llmprune_cli.run.divergence import Side, compare

SEARCH_WINDOWS = 8  # of calibration text on which a candidate is refitted; half as many are held out to judge it


def stored_plan(subject: Subject, path: Path) -> Plan:
    """A saved plan.

    Raises:
        PlanError: it was made for another model, or is not a plan.
    """
    plan = read_plan(path, most_plan_bytes(subject.widths))
    if plan.fingerprint != fingerprint(subject.checkpoint) or plan.before != subject.widths:
        raise PlanError(
            f"{path} was made for another model. Make a plan for {subject.checkpoint.source} with --save-plan."
        )
    return plan


def target_of(plan: Plan) -> Target:
    """The widths that a plan comes to."""
    return Target(plan.after, plan.layers, plan.deviations, plan.protected)


def first_target(subject: Subject, options: PruneOptions) -> Target:
    """The widths asked for; with a budget, the least that the search reaches.

    Raises:
        PlanError: no legal widths come of the request.
    """
    if options.budget is not None:
        return least_target(subject, options.request.keep_layers)
    return resolve(subject.architecture, subject.trace.refused, options.request)


def select(
    subject: Subject,
    target: Target,
    options: PruneOptions,
    calibration: CalibrationText | None,
    work: SharedWork | None,
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
    work: SharedWork | None = None,
) -> Plan:
    """Score all units on the unpruned model and choose those that stay."""
    activity = _measure(subject, options, calibration, work, listener)
    if calibration is not None and options.ranks_layers:
        layer_scores = _score_layers(subject, options, calibration, activity, listener)
        target = _without_least_layers(subject, target, options.request, layer_scores)
    plan = None
    if subject.processes.is_first:
        plan = _plan_of(subject, target, options, _score_units(subject, target, options, activity, listener))
    return _of_first(subject, plan)


def _of_first(subject: Subject, plan: Plan | None) -> Plan:
    """The plan of the first process, whatever machines the others are."""
    chosen = subject.processes.broadcast(plan)
    assert chosen is not None
    return chosen


def _plan_of(subject: Subject, target: Target, options: PruneOptions, scores: Scores) -> Plan:
    before = subject.widths
    stays = {str(layer) for layer in target.layers}
    scores = {
        width: {name: own for name, own in by.items() if not name or re.split("[.#]", name)[0] in stays}
        for width, by in scores.items()
    }
    if options.rotate:  # channels are principal components, those with most energy first
        scores["hidden_size"] = {"": torch.arange(before.hidden_size, 0, -1)}
    keep = choose(scores, subject.architecture, target.widths)
    mark = fingerprint(subject.checkpoint)
    return Plan(
        fingerprint=mark,
        before=before,
        after=target.widths,
        importance=options.importance,
        seed=options.seed,
        deviations=target.deviations,
        layers=target.layers,
        protected=target.protected,
        keep=keep,
    )


def search_plan(
    subject: Subject,
    budget: Budget,
    options: PruneOptions,
    calibration: CalibrationText,
    work: SharedWork | None,
    listener: Listener,
) -> tuple[Plan, tuple[Candidate, ...]]:
    """The plan that diverges least from the dense model among those that fit a budget, and the candidates it beat.

    Activity is measured once; each candidate is refitted on a part of the text and judged on what is held out.
    """
    activity = _measure(subject, options, calibration, work, listener)
    keep_layers = options.request.keep_layers
    least = least_target(subject, keep_layers)
    every = replace(least, layers=tuple(range(subject.widths.num_hidden_layers)))
    scores = _score_units(subject, every, options, activity, listener)
    layer_scores = _score_layers(subject, options, calibration, activity, listener)
    model = subject.layered(options.layer_device)
    fitted = model.share(calibration.fitted[:SEARCH_WINDOWS])
    judged = model.share(calibration.held_out[: SEARCH_WINDOWS // 2])

    def judge(target: Target) -> float:
        """How far a candidate diverges, as remembered or after a short refit."""
        known = work.judged(target) if work is not None else None
        if known is not None:
            return known
        plan = _of_first(subject, _plan_of(subject, target, options, scores))
        listener.stage(f"Trying {_in_words(target)}", subject.widths.num_hidden_layers)
        with torch.inference_mode():
            start = model.embed(torch.cat([fitted, judged]))
            streams = Streams(start, start.clone(), len(fitted))
            refit(model, subject.trace, plan, streams, options.refit, None, listener.advance)
            ends = model.load_ends(exact=True)
            items = model.load_layer(0).returned_items(start)
            dense, pruned = (Side(ends, states[len(fitted) :], items) for states in (streams.dense, streams.pruned))
            kl = compare(dense, pruned, judged, model.processes).kl
        if work is not None:
            work.save_judged(target, kl)
        return kl

    candidates = search_widths(subject, budget, layer_scores, judge, keep_layers)
    return _of_first(subject, _plan_of(subject, candidates[0].target, options, scores)), candidates


def _in_words(target: Target) -> str:
    widths = target.widths
    shapes = {
        "layers": len(target.layers),
        "KV groups": widths.num_key_value_heads,
        "heads": widths.num_attention_heads,
        "neurons": widths.intermediate_size or widths.moe_intermediate_size,
        "experts": widths.num_experts,
    }
    return ", ".join(f"{count} {name}" for name, count in shapes.items() if count)


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
    scores = score(checkpoint, subject.trace.limited_to(scored), subject.widths, seed, listener.advance)
    check_scores(scores)
    return scores


def _score_units(
    subject: Subject, target: Target, options: PruneOptions, activity: Activity | None, listener: Listener
) -> Scores:
    if activity is not None and options.importance in CALIBRATED:
        return _completed(subject, target, activity.scores, listener)
    return _score_weights(subject, target, options.importance, options.seed, listener)


def _measure(
    subject: Subject,
    options: PruneOptions,
    calibration: CalibrationText | None,
    work: SharedWork | None,
    listener: Listener,
) -> Activity | None:
    if calibration is None or not options.needs_activity:
        return None
    remembered = options.statistics or (work.statistics if work is not None else None)
    processes = subject.processes

    def measured(kind: str, windows: torch.Tensor) -> Activity:
        """What the first process remembers of these windows, or what all processes measure together."""

        def measure() -> Activity:
            processes.broadcast(None)  # it is not known yet
            return _measure_once(subject, kind, windows, options, listener)

        if processes.is_first and remembered is None:
            return processes.broadcast(measure())
        if processes.is_first and remembered is not None:
            key = statistics_key(subject.checkpoint, windows, options.layer_device)
            store = StatisticsStore(remembered, key, listener.warn)
            return processes.broadcast(store.recall(kind, measure))
        nothing: Activity | None = None
        found = processes.broadcast(nothing)
        if found is None:
            _measure_once(subject, kind, windows, options, listener)
            found = processes.broadcast(nothing)
        assert found is not None
        return found

    if options.importance == "consensus":
        some = spread_windows(calibration.fitted, GRADIENT_SHARE_TOKENS)
        return agree(measured("range", calibration.fitted), measured("taylor", some))
    return measured(options.importance, calibration.fitted)


def _measure_once(
    subject: Subject, kind: str, windows: torch.Tensor, options: PruneOptions, listener: Listener
) -> Activity:
    model, folder = subject.layered(options.layer_device), options.offload_dir
    if kind == "taylor":
        listener.stage("Measuring gradients", 2 * model.layers)
        activity = measure_gradients(model, subject.trace, windows, _states_folder(options), listener.advance)
    else:
        listener.stage("Measuring activity", model.layers)
        with torch.inference_mode():
            stream = model.embed(model.share(windows), folder)
            activity = measure_activity(model, subject.trace, stream, kind, listener.advance, folder)
    check_scores(activity.scores)
    return activity


def _states_folder(options: PruneOptions) -> Path:
    """Where the hidden states of all layers lie, which are too many for memory."""
    return options.offload_dir or Path(tempfile.gettempdir())


def _score_layers(
    subject: Subject,
    options: PruneOptions,
    calibration: CalibrationText,
    activity: Activity | None,
    listener: Listener,
) -> tuple[float, ...]:
    """A score for each layer; those with the least go first."""
    if activity is not None and options.layer_importance != "loss":
        return activity.influence
    model = subject.layered(options.layer_device)
    windows = spread_windows(calibration.fitted, ABLATION_TOKENS)
    listener.stage("Leaving out each layer", model.layers * (model.layers + 1) // 2)
    with torch.inference_mode():
        return ablate_layers(model, windows, _states_folder(options), listener.advance)


def _without_least_layers(
    subject: Subject, target: Target, request: WidthRequest, layer_scores: tuple[float, ...]
) -> Target:
    """The target with as many layers, but without those of the least scores; protected ones stay."""
    count = request.num_hidden_layers
    if count is None or count == subject.widths.num_hidden_layers:
        return target
    free = [layer for layer in range(len(layer_scores)) if layer not in target.protected]
    order = sorted(free, key=layer_scores.__getitem__)
    dropped = tuple(sorted(order[: subject.widths.num_hidden_layers - count]))
    chosen = replace(request, num_hidden_layers=None, drop_layers=dropped)
    try:
        return resolve(subject.architecture, subject.trace.refused, chosen)
    except PlanError:  # these layers cannot go together; those of the target can
        return target
