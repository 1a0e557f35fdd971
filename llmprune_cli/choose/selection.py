"""The choice of what stays: from a request, or a budget, over scores to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import count

import torch

from llmprune_cli.choose.importances import IMPORTANCES, LAYER_IMPORTANCES, needs_activity, ranks_layers, reads_text
from llmprune_cli.choose.magnitude import check_scores, instances
from llmprune_cli.choose.measuring import Activity, Measuring
from llmprune_cli.choose.targets.limits import Limit
from llmprune_cli.choose.targets.search import (
    Candidate,
    conditions_of,
    in_words,
    least_target,
    most_candidates,
    search_widths,
)
from llmprune_cli.choose.targets.speed import Remembered, SpeedLimit
from llmprune_cli.choose.targets.vocabulary import SizedVocabulary, TryOut, settle_vocabulary
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.errors import PlanError
from llmprune_cli.family.kept_layers import remain_alike
from llmprune_cli.family.widths import Width, Widths
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.journal.forms import Json
from llmprune_cli.options import Choice
from llmprune_cli.plan.document import Plan, fingerprint
from llmprune_cli.plan.requested_widths import Target, resolve
from llmprune_cli.plan.units import Scores, choose
from llmprune_cli.progress import Listener
from llmprune_cli.repair.dense_goals import Streams, walk_dense
from llmprune_cli.repair.layer_refit import LayerRefit
from llmprune_cli.repair.refit import Refitter, refit
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.run.divergence import Side, compare
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.vocabulary.figures import TriedVocabulary

SEARCH_TOKENS = 4096  # of calibration text on which a candidate is refitted; half as many are held out to judge it


@dataclass(frozen=True)
class Selection:
    """What was chosen, and what it was chosen from."""

    plan: Plan
    candidates: tuple[Candidate, ...] = ()  # best first; empty where the widths were given
    vocabularies: tuple[TriedVocabulary, ...] = ()  # best first; empty where their size was not searched


def target_of(plan: Plan) -> Target:
    """The widths that a plan comes to."""
    return Target(plan.after, plan.layers, plan.deviations, plan.protected)


def first_target(subject: Subject, choice: Choice, limit: Limit | None) -> Target:
    """The widths asked for; with a limit, the least that the search reaches.

    Raises:
        PlanError: no legal widths come of the request.
    """
    if limit is not None:
        least = least_target(subject, conditions_of(subject, choice.widths, choice.budget))
        limit.check(least, "protect fewer layers" if choice.widths.keep_layers else "give the widths yourself")
        return least
    return resolve(subject.architecture, subject.trace.refused, choice.widths)


def select(
    bench: Workbench,
    target: Target,
    choice: Choice,
    limit: Limit | None,
    bound: Target | None = None,
    sized: Sequence[SizedVocabulary] = (),
) -> Selection:
    """Choose the units that stay, with a limit the widths as well.

    All processes of a run come to the same selection; what was chosen before this run was cut short is not chosen anew.

    Args:
        target: of `first_target`.
        bound: see `search_widths`.
        sized: vocabularies that the model may have, the largest first; none where all tokens stay.
    """

    def make() -> Selection:
        if limit is not None and bench.text is not None:
            return search_plan(bench, bench.text, choice, limit, bound, sized)
        plan = make_plan(bench, target, choice)
        return Selection(replace(plan, vocabulary=sized[0].cut) if sized else plan)

    return bench.journal.recall("choice", Json(Selection), make)


def make_plan(bench: Workbench, target: Target, choice: Choice) -> Plan:
    """Score all units on the unpruned model and choose those that stay; where none goes, nothing is measured."""
    subject = bench.model.subject
    changes = bool(target.widths.changed_from(subject.widths))
    measuring = Measuring(bench, bench.text.fitted) if bench.text is not None and changes else None
    activity = measure_units(measuring, choice)
    if measuring is not None and ranks_layers(choice):
        target = _without_least_layers(subject, target, choice, score_layers(measuring, choice, activity))
    plan = None
    if subject.processes.is_first:
        scores = _score_units(subject, target, choice, activity, bench.listener)
        plan = _plan_of(subject, target, choice, scores)
    return _of_first(subject, plan)


def plan_each(
    bench: Workbench, targets: dict[str, Target], choice: Choice
) -> tuple[dict[str, Plan], tuple[float, ...] | None]:
    """A plan for each of several targets that keep all layers, by the same scores.

    Returns:
        The plans by the names of the targets, and how far each layer turns the residual stream (`block_influence`), as
        far as that is measured with the units.
    """
    subject, text = bench.model.subject, bench.text
    activity = measure_units(Measuring(bench, text.fitted) if text is not None else None, choice)
    smallest = {
        field.name: min(getattr(target.widths, field.name) for target in targets.values())
        for field in fields(subject.widths)
    }
    every = Target(Widths(**smallest), tuple(range(subject.widths.num_hidden_layers)), ())
    scores = _score_units(subject, every, choice, activity, bench.listener)
    plans = {name: _of_first(subject, _plan_of(subject, own, choice, scores)) for name, own in targets.items()}
    return plans, activity.influence if activity is not None else None


def make_random_plan(subject: Subject, target: Target, listener: Listener) -> Plan:
    """Choose the units that stay by chance, from headers alone."""
    choice = Choice(importance="random", refit="none")
    return _plan_of(subject, target, choice, _score_units(subject, target, choice, None, listener))


def _of_first(subject: Subject, plan: Plan | None) -> Plan:
    """The plan of the first process, whatever machines the others are."""
    chosen = subject.processes.broadcast(plan)
    assert chosen is not None
    return chosen


def _plan_of(subject: Subject, target: Target, choice: Choice, scores: Scores) -> Plan:
    before = subject.widths
    stays = {None, *target.layers}
    scores = {width: {place: own for place, own in by.items() if place.layer in stays} for width, by in scores.items()}
    if choice.rotate:  # channels are principal components, those with most energy first
        scores[Width.HIDDEN] = {Instance(): torch.arange(before.hidden_size, 0, -1)}
    keep = choose(scores, subject.architecture, target.widths)
    mark = fingerprint(subject.checkpoint)
    return Plan(
        fingerprint=mark,
        before=before,
        after=target.widths,
        importance=choice.settled.importance or "",
        seed=choice.seed,
        deviations=target.deviations,
        layers=target.layers,
        protected=target.protected,
        keep=keep,
    )


def search_plan(
    bench: Workbench,
    text: CalibrationText,
    choice: Choice,
    limit: Limit,
    bound: Target | None = None,
    sized: Sequence[SizedVocabulary] = (),
) -> Selection:
    """The plan that diverges least from the dense model among those that fit a limit, and the candidates it beat.

    Activity is measured once; each candidate is refitted on a part of the text and judged on what is held out. The
    vocabulary is settled first: as every size of it has its own tokens, by bits per byte.

    Args:
        bound: see `search_widths`.
        sized: see `select`.
    """
    subject = bench.model.subject
    if isinstance(limit, SpeedLimit):
        limit = Remembered(limit, bench.journal)
    measuring = Measuring(bench, text.fitted)
    activity = measure_units(measuring, choice)
    conditions = conditions_of(subject, choice.widths, choice.budget)
    least = least_target(subject, conditions)
    every = replace(least, layers=tuple(range(subject.widths.num_hidden_layers)))
    scores = _score_units(subject, every, choice, activity, bench.listener)
    layer_scores = score_layers(measuring, choice, activity)
    numbers, most = count(1), most_candidates(subject, choice.widths.keep_layers)

    def follow(target: Target) -> Plan:
        return _of_first(subject, _plan_of(subject, target, choice, scores))

    def judge(target: Target) -> float:
        """How far a candidate diverges, as remembered or after a short refit."""
        mark = sha256(repr(target).encode()).hexdigest()[:16]
        name = f"Trying {next(numbers)} of at most {most}: {in_words(subject, target)}"

        def refit_and_compare() -> float:
            return try_plan(bench, text, follow(target), choice.settled.refit or "", name)

        return bench.journal.recall(f"judged-{mark}", Json(float), refit_and_compare)

    chosen: SizedVocabulary | None = None
    tried: tuple[TriedVocabulary, ...] = ()
    if sized:
        fitted, method = text.fitted[: _windows_of(SEARCH_TOKENS, text)], choice.settled.refit or ""
        try_out = TryOut(bench, fitted, method, limit, conditions, layer_scores, follow)
        chosen, tried = settle_vocabulary(try_out, sized)
        limit = limit.sparing(chosen.spared)
    candidates = search_widths(subject, limit, layer_scores, judge, conditions, bound)
    best = follow(candidates[0].target)
    return Selection(replace(best, vocabulary=chosen.cut) if chosen is not None else best, candidates, tried)


def try_plan(
    bench: Workbench,
    text: CalibrationText,
    plan: Plan,
    method: str,
    name: str,
    refitter: Refitter = LayerRefit,
) -> float:
    """How far the model diverges on held-out text when a plan is followed and some text refitted, nats per token.

    Args:
        name: of the stage.
        refitter: see `refit`.
    """
    model = bench.model
    fitted = model.share(text.fitted[: _windows_of(SEARCH_TOKENS, text)])
    judged = model.share(text.held_out[: judged_windows(text)])
    with torch.inference_mode():
        windows = torch.cat([fitted, judged])
        walks = model.device == "cpu" and bench.tried.covering(windows) is None
        bench.listener.stage(name, model.layers * (2 if walks else 1))
        kept = walk_dense(model, windows, bench.tried, bench.listener.advance)
        start = model.embed(windows)
        streams = Streams.of(model, start, len(fitted), kept=kept)
        refit(model, plan, streams, method, bench.listener.advance, with_errors=False, refitter=refitter)
        ends = model.load_ends(exact=True)
        items = model.load_layer(0).returned_items(start)
        dense, pruned = (Side(ends, states[len(fitted) :], items) for states in (streams.dense, streams.pruned))
        return compare(dense, pruned, judged, model.processes).kl


def judged_windows(text: CalibrationText) -> int:
    """How many of the windows that are held out judge the candidates of a search."""
    return _windows_of(SEARCH_TOKENS // 2, text)


def _windows_of(tokens: int, text: CalibrationText) -> int:
    """How many windows have so many tokens, one at least."""
    return max(1, tokens // text.fitted.shape[1])


def _completed(subject: Subject, target: Target, scores: Scores, listener: Listener) -> Scores:
    """The scores with those by magnitude of widths that several weights read together, which no activity ranks."""
    changed = tuple(width for width in target.widths.changed_from(subject.widths) if width != Width.LAYERS)
    needed = instances(subject.checkpoint, subject.trace.limited_to(changed))
    missing = {width for width, instance in needed if instance not in scores.get(width, {})}
    if not missing:
        return scores
    listener.warn(f"No activity ranks {', '.join(sorted(missing))} in all layers; magnitude does.")
    return {
        **scores,
        **{w: s for w, s in score_weights(subject, target, "magnitude", 0, listener).items() if w in missing},
    }


def score_weights(subject: Subject, target: Target, importance: str, seed: int, listener: Listener) -> Scores:
    """Scores of the units of all widths that change, from weights alone or by chance."""
    changed = target.widths.changed_from(subject.widths)
    scored = tuple(width for width in changed if width != Width.LAYERS)
    if not scored:
        return {}
    stays = [split_name(entry.name)[1][:1] for entry in subject.checkpoint.entries]
    entries = [e for e, layer in zip(subject.checkpoint.entries, stays, strict=True) if {*layer} <= {*target.layers}]
    checkpoint = replace(subject.checkpoint, entries=tuple(entries))
    listener.stage("Scoring", checkpoint.size_bytes)
    score = IMPORTANCES[importance].load()
    scores: Scores = score(checkpoint, subject.trace.limited_to(scored), subject.widths, seed, listener.advance)
    check_scores(scores)
    return scores


def _score_units(
    subject: Subject, target: Target, choice: Choice, activity: Activity | None, listener: Listener
) -> Scores:
    if activity is not None and reads_text(choice):
        return _completed(subject, target, activity.scores, listener)
    return score_weights(subject, target, choice.settled.importance or "", choice.seed, listener)


def measure_units(measuring: Measuring | None, choice: Choice) -> Activity | None:
    """What the unpruned model does on text, if units or layers are ranked by that."""
    if measuring is None or not needs_activity(choice):
        return None
    importance = choice.settled.importance if reads_text(choice) else "range"
    activity: Activity = IMPORTANCES[importance or ""].load()(measuring)
    return activity


def score_layers(measuring: Measuring, choice: Choice, activity: Activity | None) -> tuple[float, ...]:
    """A score for each layer; those with the least go first."""
    name = choice.layer_importance or ("influence" if activity is not None else "loss")
    scores: tuple[float, ...] = LAYER_IMPORTANCES[name].load()(measuring, activity)
    return scores


def _without_least_layers(subject: Subject, target: Target, choice: Choice, layer_scores: tuple[float, ...]) -> Target:
    """The target with as many layers, but without those of the least scores; protected ones stay."""
    count = choice.widths.num_hidden_layers
    if count is None or count == subject.widths.num_hidden_layers:
        return target
    free = [layer for layer in range(len(layer_scores)) if layer not in target.protected]
    order = sorted(free, key=layer_scores.__getitem__)
    dropped = tuple(sorted(order[: subject.widths.num_hidden_layers - count]))
    request = replace(choice.widths, num_hidden_layers=None, drop_layers=dropped)
    try:
        found = resolve(subject.architecture, subject.trace.refused, request)
    except PlanError:  # these layers cannot go together; those of the target can
        return target
    return found if remain_alike(subject.architecture.config, found.layers) else target
