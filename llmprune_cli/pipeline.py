"""One straight-line function per command. No printing: progress goes to a callback, results are dataclasses."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli import __version__
from llmprune_cli.activations import CALIBRATED, Activity, measure_activity
from llmprune_cli.architecture import Architecture, read_widths, with_widths
from llmprune_cli.calibration import CalibrationOptions, CalibrationText, prepare_calibration
from llmprune_cli.checkpoint import Checkpoint, read_index
from llmprune_cli.corpus import Corpus, cut_windows, load_corpus
from llmprune_cli.dependency import hold_against_torch_pruning
from llmprune_cli.divergence import Side, compare, measure_divergence
from llmprune_cli.errors import PlanError, VerificationError
from llmprune_cli.evaluation import RunningPerplexity, evaluate_perplexity, peak_memory_bytes
from llmprune_cli.export import FORMATS, ExportOptions
from llmprune_cli.groups import Keep, Trace
from llmprune_cli.layerwise import LayeredModel
from llmprune_cli.loading import (
    ModelReference,
    copy_companions,
    load_model,
    load_tokenizer,
    open_checkpoint,
    pick_device,
)
from llmprune_cli.names import split_name
from llmprune_cli.plan import (
    Plan,
    Target,
    WidthRequest,
    choose,
    fingerprint,
    legal_values,
    read_plan,
    resolve,
    save_plan,
)
from llmprune_cli.proof import prove
from llmprune_cli.reconstruction import LayerRepair, Streams, refit
from llmprune_cli.results import (
    SCHEMA_VERSION,
    CalibrationResult,
    CandidateResult,
    EvalReport,
    EvalResult,
    ExportResult,
    InspectResult,
    ModelSummary,
    PruneResult,
    summarize,
)
from llmprune_cli.scoring import IMPORTANCES, Scores, instances
from llmprune_cli.search import Budget, Candidate, choose_candidate, find_candidates, least_target
from llmprune_cli.subject import Subject, understand
from llmprune_cli.surgery import pruned_entries, pruned_tensors
from llmprune_cli.writer import check_target, staged_folder, write_json, write_shards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SEARCH_WINDOWS = 8  # of calibration text on which a candidate is refitted; half as many are held out to judge it
MANIFEST_NAME = "llmprune.json"
LONG_WINDOW = 8192  # tokens; longer windows by default deserve a warning
FALLBACK_WINDOW = 2048  # tokens, for models that state no maximum


@dataclass(frozen=True)
class Listener:
    """Where a run reports to."""

    stage: Callable[[str, int], None]  # a stage begins: its name, and its length in bytes or windows
    advance: Callable[[int], None]  # more of it is done
    warn: Callable[[str], None]
    perplexity: Callable[[str, RunningPerplexity], None]  # model, where its evaluation stands


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate."""

    dataset: str = "wikitext2"
    split: str = "test"
    max_seq_len: int | None = None  # None: the model's maximum
    limit: int | None = None  # windows
    batch_size: int = 1
    device: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class PruneOptions:
    """What to prune and where to."""

    request: WidthRequest
    budget: Budget | None = None
    importance: str = "magnitude"
    refit: str = "none"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    seed: int = 0
    plan: Path | None = None
    save_plan: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    max_shard_bytes: int = 5 * 10**9

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        return self.refit != "none" or self.budget is not None or (self.importance in CALIBRATED and not self.plan)


# --- inspect -------------------------------------------------------------------------------------------------------


def inspect(reference: ModelReference, request: WidthRequest) -> InspectResult:
    """Describe a model from headers and configuration, and what a request would make of it."""
    with open_checkpoint(reference, need_weights=False) as checkpoint:
        subject = understand(checkpoint)
        target = None if request.is_empty else resolve(subject.architecture, subject.trace.refused, request)
        after = None
        if target is not None:
            subject.require(target.widths)
            after = summarize(subject.predict(target), target.widths)
        return InspectResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            revision=checkpoint.revision,
            model_type=checkpoint.config.model_type,
            has_weights=checkpoint.has_weights,
            tied_embeddings=bool(getattr(checkpoint.config, "tie_word_embeddings", False)),
            prunable=legal_values(subject.architecture, subject.trace),
            dropped=checkpoint.dropped,
            renamed=checkpoint.renamed,
            before=summarize(checkpoint.entries, subject.widths),
            after=after,
            deviations=target.deviations if target else (),
        )


# --- prune ---------------------------------------------------------------------------------------------------------


def prune(
    reference: ModelReference, options: PruneOptions, evaluation: EvalOptions | None, listener: Listener
) -> PruneResult:
    """Plan, and unless it is a dry run, write; then evaluate both models if asked.

    Whatever can be refused is refused before any weight is read.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        need_weights = not options.dry_run or options.save_plan is not None or options.budget is not None
        checkpoint = stack.enter_context(open_checkpoint(reference, need_weights))
        output = options.output
        if output is None and not options.dry_run and evaluation is not None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmprune-")), "pruned")
        if output is not None:
            check_target(output, options.overwrite, _source_folder(reference, checkpoint))
        subject = understand(checkpoint)
        before = summarize(checkpoint.entries, subject.widths)
        plan = _stored_plan(subject, options.plan) if options.plan else None
        if plan is not None:
            target = Target(plan.after, plan.layers, plan.deviations)
        elif options.budget is None:
            target = resolve(subject.architecture, subject.trace.refused, options.request)
        else:
            target = least_target(subject)
        subject.require(target.widths)
        after = summarize(subject.predict(target), target.widths)
        text = _prepare_text(checkpoint, reference, evaluation, listener) if evaluation else None
        calibration = _prepare_calibration(checkpoint, reference, options, listener) if need_weights else None
        prove(subject.architecture, subject.trace, target.widths.changed_from(subject.widths), _prune_twin)
        hold_against_torch_pruning(subject.architecture, subject.trace)
        candidates: tuple[Candidate, ...] = ()
        if options.budget is not None and calibration is not None:
            plan, candidates = search_plan(subject, options.budget, options, calibration, listener)
        elif need_weights and plan is None:
            plan = make_plan(subject, target, options, calibration, listener)
        if plan is not None:
            target = Target(plan.after, plan.layers, plan.deviations)
            after = summarize(subject.predict(target), target.widths)
        for deviation in target.deviations:
            listener.warn(deviation)
        if options.save_plan is not None and plan is not None:
            save_plan(plan, options.save_plan)
        report, card = None, None
        if output is not None and plan is not None and not options.dry_run:
            manifest = _manifest(reference, checkpoint, plan, options, before, after)
            with staged_folder(output, options.overwrite, _source_folder(reference, checkpoint)) as staging:
                with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f".{output.name}.llmprune-") as work:
                    repaired, repairs = _repair(subject, plan, options, calibration, Path(work), listener)
                    write_pruned(repaired, plan, staging, manifest, options.max_shard_bytes, listener)
                if calibration is not None:
                    card = _report_card(subject, staging, options, calibration, repairs, listener)
                    write_json(staging / MANIFEST_NAME, {**manifest, "calibration": asdict(card)})
            if evaluation is not None and text is not None:
                pruned = ModelReference(str(output), None, reference.trust_remote_code, reference.dtype)
                name = str(options.output) if options.output else f"{checkpoint.source} (pruned)"
                with open_checkpoint(pruned, need_weights=True) as opened:
                    result = replace(opened, source=name)
                    sides = [(reference, checkpoint, text), (pruned, result, text)]
                    report = _evaluate(sides, evaluation, listener)
        return PruneResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            revision=checkpoint.revision,
            output=None if options.dry_run or options.output is None else str(options.output),
            importance=plan.importance if plan else options.importance,
            refit=options.refit,
            seed=plan.seed if plan else options.seed,
            before=before,
            after=after,
            deviations=target.deviations,
            candidates=tuple(CandidateResult(c.target.widths, c.target.layers, c.parameters, c.kl) for c in candidates),
            seconds=time.perf_counter() - started,
            calibration=card,
            evaluation=report,
        )


def _prepare_calibration(
    checkpoint: Checkpoint, reference: ModelReference, options: PruneOptions, listener: Listener
) -> CalibrationText | None:
    if not options.needs_text:
        return None
    pick_device(options.calibration.device)
    longest = getattr(checkpoint.config, "max_position_embeddings", None)
    tokenizer = load_tokenizer(checkpoint, reference.trust_remote_code)
    return prepare_calibration(options.calibration, tokenizer, longest, options.seed, listener.warn)


def _layer_device(options: PruneOptions) -> str:
    """Where one layer at a time runs."""
    place = pick_device(options.calibration.device)
    return "cuda" if place == "auto" else place


def _repair(
    subject: Subject,
    plan: Plan,
    options: PruneOptions,
    calibration: CalibrationText | None,
    work: Path,
    listener: Listener,
) -> tuple[Subject, tuple[LayerRepair, ...]]:
    """The subject with weights that make up for what the plan removes."""
    import torch

    if options.refit == "none" or calibration is None:
        return subject, ()
    if "hidden_size" in plan.changed:
        listener.warn("The channels that go are cut after the refit, which does not make up for them.")
    model = subject.layered(_layer_device(options))
    listener.stage(f"Refitting ({options.refit})", subject.widths.num_hidden_layers)
    with torch.inference_mode():
        start = model.embed(calibration.fitted)
        streams = Streams(start, start.clone(), len(start))
        checkpoint, repairs = refit(model, subject.trace, plan, streams, options.refit, work, listener.advance)
    return replace(subject, checkpoint=checkpoint), repairs


def _report_card(
    subject: Subject,
    folder: Path,
    options: PruneOptions,
    calibration: CalibrationText,
    repairs: tuple[LayerRepair, ...],
    listener: Listener,
) -> CalibrationResult:
    """What a pruned checkpoint does on text that neither fitted it nor, where there is enough, chose it."""
    import torch

    chosen_on = SEARCH_WINDOWS // 2 if options.budget else 0
    windows = calibration.held_out[chosen_on:] if len(calibration.held_out) > chosen_on else calibration.held_out
    reference, device = ModelReference(str(folder)), _layer_device(options)
    with open_checkpoint(reference, need_weights=True) as checkpoint, torch.inference_mode():
        pruned = replace(subject.architecture, config=checkpoint.config, widths=read_widths(checkpoint.config))
        layers = subject.widths.num_hidden_layers + pruned.widths.num_hidden_layers
        listener.stage("Judging on held-out text", layers)
        divergence = measure_divergence(
            subject.layered(device), LayeredModel(checkpoint, pruned, device), windows, listener.advance
        )
    return CalibrationResult(
        dataset=calibration.corpus.name,
        origin=calibration.corpus.origin,
        split=options.calibration.split,
        tokens=calibration.fitted.numel(),
        seq_len=calibration.fitted.shape[1],
        seed=options.seed,
        held_out_tokens=divergence.tokens,
        perplexity_before=divergence.perplexity_before,
        perplexity_after=divergence.perplexity_after,
        kl=divergence.kl,
        layers=repairs,
    )


def _source_folder(reference: ModelReference, checkpoint: Checkpoint) -> Path | None:
    """The user's own folder or file that must stay untouched."""
    path = Path(reference.name)
    return path if path.exists() else checkpoint.folder


def _stored_plan(subject: Subject, path: Path) -> Plan:
    plan = read_plan(path)
    if plan.fingerprint != fingerprint(subject.checkpoint) or plan.before != subject.widths:
        raise PlanError(
            f"{path} was made for another model. Make a plan for {subject.checkpoint.source} with --save-plan."
        )
    return plan


def make_plan(
    subject: Subject, target: Target, options: PruneOptions, calibration: CalibrationText | None, listener: Listener
) -> Plan:
    """Score all units on the unpruned model and choose those that stay."""
    if options.importance in CALIBRATED and calibration is not None:
        activity = _measure(subject, options, calibration, listener)
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
    subject: Subject, budget: Budget, options: PruneOptions, calibration: CalibrationText, listener: Listener
) -> tuple[Plan, tuple[Candidate, ...]]:
    """The plan that diverges least from the dense model among those that fit a budget, and the candidates it beat.

    Activity is measured once; each candidate is refitted on a part of the text and judged on what is held out.
    """
    import torch

    activity = _measure(subject, options, calibration, listener)
    least = least_target(subject)
    every = replace(least, layers=tuple(range(subject.widths.num_hidden_layers)))
    if options.importance in CALIBRATED:
        scores = _completed(subject, every, activity.scores, listener)
    else:
        scores = _score_weights(subject, every, options.importance, options.seed, listener)
    found = find_candidates(subject, budget, activity.influence)
    model = subject.layered(_layer_device(options))
    fitted, judged = calibration.fitted[:SEARCH_WINDOWS], calibration.held_out[: SEARCH_WINDOWS // 2]

    def judge(target: Target) -> float:
        plan = _plan_of(subject, target, options, scores)
        listener.stage(f"Trying {_in_words(target)}", subject.widths.num_hidden_layers)
        with torch.inference_mode():
            start = model.embed(torch.cat([fitted, judged]))
            streams = Streams(start, start.clone(), len(fitted))
            refit(model, subject.trace, plan, streams, options.refit, None, listener.advance)
            ends = model.load_ends(exact=True)
            items = model.load_layer(0).returned_items(start)
            dense, pruned = (Side(ends, states[len(fitted) :], items) for states in (streams.dense, streams.pruned))
            return compare(dense, pruned, judged).kl

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


def _measure(subject: Subject, options: PruneOptions, calibration: CalibrationText, listener: Listener) -> Activity:
    import torch

    model = subject.layered(_layer_device(options))
    listener.stage("Measuring activity", subject.widths.num_hidden_layers)
    with torch.inference_mode():
        stream = model.embed(calibration.fitted)
        return measure_activity(model, subject.trace, stream, options.importance, listener.advance)


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


def write_pruned(
    subject: Subject,
    plan: Plan,
    folder: Path,
    manifest: dict[str, Any],
    max_shard_bytes: int,
    listener: Listener,
) -> None:
    """Stream every tensor through the plan into a folder, with everything a stock loader needs beside it.

    Raises:
        VerificationError: what was written is not what the plan predicts.
    """
    checkpoint = subject.checkpoint
    entries = pruned_entries(checkpoint, subject.trace, plan)
    listener.stage("Writing", checkpoint.size_bytes)
    tensors = pruned_tensors(checkpoint, subject.trace, plan, listener.advance)
    write_shards(folder, entries, tensors, max_shard_bytes)
    with_widths(subject.architecture, plan.after, plan.layers).save_pretrained(folder)
    copy_companions(checkpoint, folder)
    write_json(folder / MANIFEST_NAME, manifest)
    written = {entry.name: entry.shape for entry in read_index(folder)}
    if written != {entry.name: entry.shape for entry in entries}:
        raise VerificationError("The written headers differ from the plan. Nothing was kept; please report this.")


def _manifest(
    reference: ModelReference,
    checkpoint: Checkpoint,
    plan: Plan,
    options: PruneOptions,
    before: ModelSummary,
    after: ModelSummary,
) -> dict[str, Any]:
    packages = ("torch", "transformers", "safetensors")
    return {
        "schema_version": SCHEMA_VERSION,
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "source_fingerprint": plan.fingerprint,
        "versions": {"llmprune": __version__, **{name: version(name) for name in packages}},
        "options": {
            **asdict(options.request),
            "target": asdict(options.budget) if options.budget else None,
            "importance": plan.importance,
            "refit": options.refit,
            "seed": plan.seed,
            "plan": str(options.plan) if options.plan else None,
            "dtype": reference.dtype,
        },
        "widths": {"before": asdict(before.widths), "after": asdict(after.widths)},
        "layers": list(plan.layers),
        "parameters": {"before": before.parameters, "after": after.parameters},
        "size_bytes": {"before": before.size_bytes, "after": after.size_bytes},
        "deviations": list(plan.deviations),
        "dropped_tensors": list(checkpoint.dropped),
        "renamed_tensors": dict(checkpoint.renamed),
    }


def _prune_twin(source: Path, target: Path, traced: Trace, architecture: Architecture, cut: Target) -> Keep:
    """Prune a saved twin as a user's model is pruned, at random."""
    quiet = Listener(lambda *_: None, lambda *_: None, lambda *_: None, lambda *_: None)
    checkpoint = Checkpoint(source, "twin", None, architecture.config, read_index(source), True, source)
    subject = Subject(checkpoint, architecture, traced)
    plan = make_plan(subject, cut, PruneOptions(WidthRequest(), importance="random"), None, quiet)
    write_pruned(subject, plan, target, {}, 2**62, quiet)
    return plan.keep


# --- eval ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalText:
    """A corpus cut into one model's windows."""

    corpus: Corpus
    windows: torch.Tensor  # token ids, [N, T]


def evaluate(
    reference: ModelReference, compare: ModelReference | None, options: EvalOptions, listener: Listener
) -> EvalReport:
    """Perplexity of one model, or of two side by side on the same text and with windows of the same length."""
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(reference, need_weights=True))
        text = _prepare_text(checkpoint, reference, options, listener)
        sides = [(reference, checkpoint, text)]
        if compare is not None:
            other = stack.enter_context(open_checkpoint(compare, need_weights=True))
            alike = replace(options, max_seq_len=text.windows.shape[1])
            sides.append((compare, other, _prepare_text(other, compare, alike, listener)))
        return _evaluate(sides, options, listener)


def _prepare_text(
    checkpoint: Checkpoint, reference: ModelReference, options: EvalOptions, listener: Listener
) -> EvalText:
    pick_device(options.device)
    corpus = load_corpus(options.dataset, options.split)
    tokenizer = load_tokenizer(checkpoint, reference.trust_remote_code)
    window = _window_tokens(checkpoint, options, listener)
    return EvalText(corpus, cut_windows(corpus, tokenizer, window, options.limit))


def _evaluate(
    sides: list[tuple[ModelReference, Checkpoint, EvalText]], options: EvalOptions, listener: Listener
) -> EvalReport:
    results = []
    for reference, checkpoint, text in sides:
        listener.stage(f"Evaluating {checkpoint.source}", len(text.windows))
        model = load_model(checkpoint, options.device, options.dtype, reference.trust_remote_code)
        final = evaluate_perplexity(
            model,
            text.windows,
            options.batch_size,
            lambda state, name=checkpoint.source: listener.perplexity(name, state),  # type: ignore[misc]
        )
        results.append(_eval_result(checkpoint, model, final, text.windows.shape[1]))
        del model
    origin = sides[0][2].corpus.origin
    return EvalReport(SCHEMA_VERSION, options.dataset, origin, options.split, tuple(results))


def _window_tokens(checkpoint: Checkpoint, options: EvalOptions, listener: Listener) -> int:
    longest = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if options.max_seq_len is None:
        window = longest or FALLBACK_WINDOW
        if window > LONG_WINDOW:
            listener.warn(f"Windows have the model's maximum of {window} tokens. --max-seq-len makes them shorter.")
        return int(window)
    if longest and options.max_seq_len > longest:
        listener.warn(f"--max-seq-len {options.max_seq_len} is more than the model's maximum of {longest} positions.")
    return options.max_seq_len


def _eval_result(checkpoint: Checkpoint, model: PreTrainedModel, state: RunningPerplexity, window: int) -> EvalResult:
    return EvalResult(
        model=checkpoint.source,
        perplexity=state.perplexity,
        mean_nll=state.mean_nll,
        windows=state.windows,
        tokens=state.tokens,
        max_seq_len=window,
        seconds=state.seconds,
        tokens_per_second=state.tokens / max(state.seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(model.device.type),
        parameters=checkpoint.parameter_count,
        size_bytes=checkpoint.size_bytes,
    )


# --- export --------------------------------------------------------------------------------------------------------


def export(
    reference: ModelReference,
    output: Path,
    format_name: str,
    options: ExportOptions,
    overwrite: bool,
    listener: Listener,
) -> ExportResult:
    """Write a checkpoint in another format."""
    with open_checkpoint(reference, need_weights=True) as checkpoint:
        source = _source_folder(reference, checkpoint)
        check_target(output, overwrite, source)
        with staged_folder(output, overwrite, source) as staging:
            listener.stage("Exporting", checkpoint.size_bytes)
            FORMATS[format_name](checkpoint, staging, options, listener.advance)
            manifest = checkpoint.companions / MANIFEST_NAME
            if manifest.is_file():
                write_json(staging / MANIFEST_NAME, json.loads(manifest.read_text(encoding="utf-8")))
        entries = read_index(output)
        return ExportResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            output=str(output),
            format=format_name,
            dtype=max(entries, key=lambda entry: entry.numel).dtype,
            parameters=sum(entry.numel for entry in entries),
            size_bytes=sum(entry.size_bytes for entry in entries),
            files=tuple(sorted(path.name for path in output.iterdir())),
        )
