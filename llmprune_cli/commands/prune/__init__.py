"""`prune`: plan, choose, repair, write and judge; every process of a run takes the same steps.

What only one may do, such as writing, the first process does, while the others wait for what it says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from llmprune_cli.apply.proven_widths import check_proof
from llmprune_cli.apply.pruned_folder import make_manifest, write_pruned
from llmprune_cli.choose.selection import Selection, select, target_of
from llmprune_cli.choose.targets.speed import SpeedLimit
from llmprune_cli.commands.prune.decision import (
    Decided,
    check_export_fits,
    counted_size,
    decide,
    layered,
    rotate_model,
    settle,
    write_own_text,
)
from llmprune_cli.commands.prune.estimate import estimate_prune, going_on, most_bytes
from llmprune_cli.commands.prune.outcome import Outcome, answer_both, evaluate_both, options_said, report
from llmprune_cli.commands.prune.vocabulary import (
    rank_vocabularies,
    read_token_text,
    told_of_tokens,
    warn_of_lost_tokens,
)
from llmprune_cli.commands.recipe import recipe_of, save_recipe
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.family.architecture import with_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.integrity import list_files
from llmprune_cli.folder.manifest import Numbers, write_manifest
from llmprune_cli.folder.scratch import check_folder, scratch_folder
from llmprune_cli.folder.shards import warn_of_large_shards
from llmprune_cli.folder.staging import Claim, check_target, claimed
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.formats.registry import load_format
from llmprune_cli.journal.journal import Journal, kept_folder
from llmprune_cli.journal.keys import run_key, weights_sample
from llmprune_cli.options import Choice
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.predict import predict
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.processes import ALONE, Processes, join
from llmprune_cli.progress import Estimate, Listener
from llmprune_cli.repair.layer_refit import LayerRepair
from llmprune_cli.repair.refit import repair
from llmprune_cli.report.chart import check_chart_target, draw_chart
from llmprune_cli.report.json_results import CalibrationResult, PruneResult
from llmprune_cli.report.model_card import write_card
from llmprune_cli.report.model_perplexity import EvalText, prepare_text
from llmprune_cli.report.report_card import report_card
from llmprune_cli.report.runtimes import runtime_fits
from llmprune_cli.report.summary import summarize
from llmprune_cli.run.calibration import warn_of_shared_text
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.opening import open_checkpoint, part_to_write, source_folder
from llmprune_cli.startup.remembered import statistics_folder


def prune(request: PruneRequest, listener: Listener) -> PruneResult | None:
    """Plan, and unless it is a dry run, write; then evaluate both models if asked.

    Whatever can be refused is refused before any weight is read. Of several processes the first one gives the result.

    Raises:
        LlmpruneError: see there.
    """
    started, processes, delivery = time.perf_counter(), join(request.model.device), request.delivery
    if request.keeps_measurements:
        request = replace(request, scratch=replace(request.scratch, statistics=statistics_folder()))
    if processes.is_first and delivery.report is not None:
        check_chart_target(delivery.report, delivery.output)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(
            open_checkpoint(request.model, request.needs_weights, request.vocabulary.may_go)
        )
        checkpoint = part_to_write(checkpoint, delivery.text_only, request.model.dtype)
        output = delivery.output
        if processes.is_first and output is None and request.writes:
            output = stack.enter_context(scratch_folder()) / "pruned"
        with _claimed(request, checkpoint, output, processes) as claim:
            outcome = _run(request, checkpoint, claim, processes, listener, started)
        if outcome is None:
            return None
        evaluated = evaluate_both(request, checkpoint, output, outcome, listener)
        result = report(request, checkpoint, outcome, evaluated, time.perf_counter() - started)
    if delivery.report is not None and outcome.card is not None:
        draw_chart(result, outcome.card, delivery.report)
    return result


@contextmanager
def _claimed(
    request: PruneRequest, checkpoint: Checkpoint, output: Path | None, processes: Processes
) -> Iterator[Claim | None]:
    """The right to write the output, and proof that the user's folders can be written, in the first process.

    Raises:
        OutputError: one of them cannot be written.
    """
    overwrite, source = request.delivery.overwrite, source_folder(request.model, checkpoint)
    folders = ((request.scratch.statistics, "--statistics"), (request.scratch.offload_dir, "--offload-dir"))
    with ExitStack() as stack:
        claim = None
        if processes.is_first and output is not None and not request.writes:
            check_target(output, overwrite, source)
        elif processes.is_first and output is not None:
            claim = stack.enter_context(claimed(output, overwrite, source))
        for folder, option in folders:
            if folder is not None and (processes.is_first or option == "--offload-dir"):
                check_folder(folder, option)
        yield claim


def _run(
    request: PruneRequest,
    checkpoint: Checkpoint,
    claim: Claim | None,
    processes: Processes,
    listener: Listener,
    started: float,
) -> Outcome | None:
    """All steps up to the written folder; None in processes that do not report.

    Args:
        started: by `time.perf_counter`, when the command began.
    """
    decided = decide(request, understand(checkpoint, processes), listener)
    subject = decided.subject
    evaluation = request.evaluation
    evaluated = None
    if processes.is_first and evaluation is not None:
        evaluated = prepare_text(checkpoint, request.model.device, evaluation, listener)
    choice, text = settle(request, subject, processes, listener)
    if text is None and not processes.is_first:
        return None
    if text is None:
        subject = replace(subject, processes=ALONE)  # the others have nothing to do
    elif processes.is_first and evaluated is not None:
        warn_of_shared_text(text.corpus, evaluated.corpus, listener.warn)
    with ExitStack() as stack:
        bench = Workbench(layered(subject, request, choice), text, listener, Journal(subject.processes))
        bench = replace(bench, offload_dir=request.scratch.offload_dir)
        if decided.stream is not None and text is not None:
            turned = stack.enter_context(scratch_folder())
            rotated = rotate_model(bench, text, decided.stream, turned)
            bench = replace(bench, model=layered(rotated, request, choice))
        decided = _with_token_text(request, decided, bench)
        journal = stack.enter_context(_journal(request, choice, claim, decided, bench))
        bench = replace(bench, journal=journal)
        estimate = None
        if processes.is_first:
            estimate = _expect(replace(request, choice=choice), decided, bench, started)
        outcome = choose_and_write(request, choice, claim.staged if claim else None, decided, bench, evaluated)
        if outcome is None or estimate is None:
            return outcome
        limit = most_bytes(decided)
        if request.delivery.dry_run and limit is not None:
            estimate = going_on(estimate, limit, outcome.after)
        return replace(outcome, estimate=estimate)


def _with_token_text(request: PruneRequest, decided: Decided, bench: Workbench) -> Decided:
    """With the text by which the first process will rank tokens, if any go and no plan says which."""
    own = decided.vocabulary
    if own is None or decided.plan is not None or not request.needs_weights or not bench.model.processes.is_first:
        return decided
    write = partial(write_own_text, request, bench.model.subject, bench.listener)
    text = read_token_text(request, own.width.rows, bench, write)
    return replace(decided, vocabulary=replace(own, text=text))


def _expect(request: PruneRequest, decided: Decided, bench: Workbench, started: float) -> Estimate | None:
    """What the run will take, which is told where it begins now."""
    estimate = estimate_prune(request, decided, bench, started)
    if estimate is not None and (request.needs_weights or not request.delivery.dry_run):
        bench.listener.expect(estimate)
    return estimate


def choose_and_write(
    request: PruneRequest,
    choice: Choice,
    staged: Callable[[], AbstractContextManager[Path]] | None,
    decided: Decided,
    bench: Workbench,
    evaluated: EvalText | None = None,
    bound: Target | None = None,
) -> Outcome | None:
    """Choose what stays, repair, write and judge; None in processes that do not report.

    Args:
        choice: see `settle`.
        staged: opens the folder to write into; None where nothing is written.
        bound: see `search_widths`.
    """
    subject, is_first = bench.model.subject, bench.model.subject.processes.is_first
    selection = _choose(request, choice, decided, bench, bound)
    target = target_of(selection.plan) if selection is not None else decided.target
    if is_first and target.layers != decided.target.layers:
        check_proof(subject, target)
    check_export_fits(request, subject, target)
    speed = decided.limit.race.finish(target) if isinstance(decided.limit, SpeedLimit) and is_first else None
    target = _tell(request, choice, selection, decided, target, bench)
    repairs: tuple[LayerRepair, ...] = ()
    repaired = subject
    plan = selection.plan if selection is not None else None
    vocabulary = plan.vocabulary if plan is not None else None
    only_tokens_go = vocabulary is not None and not target.widths.changed_from(subject.widths)
    if selection is not None and request.writes and not only_tokens_go:
        repaired, repairs = repair(bench, selection.plan, choice.refit or "")
    if not is_first:
        return None
    tensors = _left_by(subject, decided, target, selection)
    cached = subject.architecture.cached_numbers(target.widths, target.layers)
    after = summarize((*tensors, *subject.surroundings), target.widths, cached)
    outcome = Outcome(
        subject=subject,
        choice=choice,
        target=target,
        before=decided.before,
        after=after,
        plan=plan,
        candidates=selection.candidates if selection else (),
        card=None,
        evaluated=evaluated,
        vocabulary=None if bench.serves_several else told_of_tokens(request, subject, decided.vocabulary, plan),
        vocabularies=selection.vocabularies if selection else (),
        speed=speed,
        counted=counted_size(request, decided, target, vocabulary),
    )
    if staged is None or selection is None:
        return outcome
    with staged() as staging:
        return replace(outcome, card=_fill(staging, request, outcome, selection.plan, repaired, repairs, bench))


def _left_by(
    subject: Subject, decided: Decided, target: Target, selection: Selection | None
) -> tuple[TensorEntry, ...]:
    """The tensors that a target leaves, with the rows of the tokens that stay."""
    tensors, known, own = decided.tensors, decided.target, decided.vocabulary
    is_known = (target.widths, target.layers) == (known.widths, known.layers)
    if not is_known or decided.stream is not None or own is not None:
        tensors = predict(subject, target)
    kept = selection.plan.vocabulary if selection is not None else None
    return own.cut(tensors, kept) if own is not None and (selection is None or kept is not None) else tensors


def _choose(
    request: PruneRequest, choice: Choice, decided: Decided, bench: Workbench, bound: Target | None
) -> Selection | None:
    """What stays; None where headers alone do not say."""
    if decided.plan is not None:
        return Selection(decided.plan)
    if not request.needs_weights:
        return None
    sized = rank_vocabularies(decided.vocabulary, bench)
    selection = select(bench, decided.target, choice, decided.limit, bound, sized)
    warn_of_lost_tokens(selection.plan, decided.vocabulary, bench)
    return selection


@contextmanager
def _journal(
    request: PruneRequest, choice: Choice, claim: Claim | None, decided: Decided, bench: Workbench
) -> Iterator[Journal]:
    """What the run remembers: in the first process a folder beside its output, and that of the user."""
    journal, text = bench.journal, bench.text
    with ExitStack() as stack:
        if journal.processes.is_first:
            journal = replace(journal, statistics=request.scratch.statistics)
        if claim is not None and text is not None:
            windows, own = (text.fitted, text.held_out), decided.vocabulary
            tokens = own.identity if own is not None else None
            key = run_key(bench.model.subject, choice, decided.plan, windows, bench.model.device, tokens)
            may_go_on = request.delivery.output is not None
            folder = stack.enter_context(kept_folder(claim, key, request.scratch.resume, may_go_on))
            journal = replace(journal, folder=folder)
        yield journal


def _tell(
    request: PruneRequest,
    choice: Choice,
    selection: Selection | None,
    decided: Decided,
    target: Target,
    bench: Workbench,
) -> Target:
    """Say where the widths differ from what was asked for, and keep what the user wants to keep of the decision."""
    if decided.untied:
        text = f"The output projection is the embedding no longer, which adds {decided.untied:,} parameters."
        target = replace(target, deviations=(*target.deviations, text))
    if not bench.model.processes.is_first:
        return target
    for deviation in target.deviations:
        bench.listener.warn(deviation)
    if request.delivery.save_plan is not None and selection is not None:
        own = decided.plan or replace(selection.plan, weights=weights_sample(decided.subject.checkpoint))
        own.save(request.delivery.save_plan)
    if request.delivery.save_config is not None:
        save_recipe(recipe_of(request, choice, bench.text), request.delivery.save_config)
    return target


def _fill(
    staging: Path,
    request: PruneRequest,
    outcome: Outcome,
    plan: Plan,
    repaired: Subject,
    repairs: tuple[LayerRepair, ...],
    bench: Workbench,
) -> CalibrationResult | None:
    """Write the folder and judge it."""
    subject, listener = outcome.subject, bench.listener
    most = parse_size(request.delivery.max_shard_size)
    recipe = recipe_of(request, outcome.choice, bench.text)
    before, after = outcome.before, outcome.after
    parameters, sizes = Numbers(before.parameters, after.parameters), Numbers(before.size_bytes, after.size_bytes)
    manifest = make_manifest(subject.checkpoint, plan, parameters, sizes, options_said(request, outcome), recipe)
    checksums = write_pruned(repaired, plan, staging, manifest, most, listener)
    warn_of_large_shards(staging, most, listener.warn)
    card = None
    if bench.text is not None:
        split, was_searched = request.text.calibration_split, outcome.choice.budget is not None
        card = report_card(bench, staging, plan, repairs, split, outcome.choice.seed, was_searched)
        if bench.shows_answers:
            card = replace(card, answers=answer_both(subject.checkpoint, staging, bench))
        manifest = replace(manifest, calibration=asdict(card))
    config = with_widths(subject.architecture, plan.after, plan.layers)
    write_card(staging, subject.checkpoint, manifest, load_format("safetensors"), runtime_fits(config))
    write_manifest(staging, replace(manifest, files=list_files(staging, checksums)))
    return card
