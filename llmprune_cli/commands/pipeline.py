"""One straight-line function per command. No printing: progress goes to a callback, results are dataclasses."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from llmprune_cli.apply.proof import prove
from llmprune_cli.apply.pruned_folder import make_manifest, prune_twin, write_pruned
from llmprune_cli.apply.second_opinion import hold_against_torch_pruning
from llmprune_cli.choose.search import Candidate
from llmprune_cli.choose.selection import first_target, select, stored_plan, target_of
from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.errors import CheckpointError, UnsupportedError, VerificationError
from llmprune_cli.export import FORMATS
from llmprune_cli.export.formats import ExportOptions, Fit
from llmprune_cli.export.verification import PROMPTS, missing_memory, missing_runtime, verify
from llmprune_cli.family.architecture import with_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.integrity import check_files, list_files
from llmprune_cli.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from llmprune_cli.folder.scratch import check_folder, scratch_folder
from llmprune_cli.folder.staging import check_target, claimed
from llmprune_cli.journal.identity import versions
from llmprune_cli.journal.sharedwork import SharedWork
from llmprune_cli.journal.workfolder import kept_work, run_key
from llmprune_cli.options import EvalOptions, Listener, PruneOptions
from llmprune_cli.plan.target import Plan, WidthRequest, legal_values, resolve, save_plan
from llmprune_cli.processes import ALONE, Processes, join
from llmprune_cli.repair.refit import repair
from llmprune_cli.repair.residual_stream import ResidualStream, find_residual_stream
from llmprune_cli.repair.rotation import principal_components, rotate, untie
from llmprune_cli.report.chart import check_chart_target, draw_chart
from llmprune_cli.report.eval_report import prepare_text, report_perplexity
from llmprune_cli.report.model_card import write_card
from llmprune_cli.report.report_card import report_card
from llmprune_cli.report.results import (
    SCHEMA_VERSION,
    CalibrationResult,
    CandidateResult,
    EvalReport,
    ExportResult,
    InspectResult,
    PruneResult,
    VerifyResult,
    summarize,
)
from llmprune_cli.report.runtimes import runtime_fits
from llmprune_cli.run.calibration import CalibrationText, prepare_calibration, warn_of_shared_text
from llmprune_cli.run.layered_model import BATCH_TOKENS, windows_together
from llmprune_cli.source.opening import ModelReference, open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer

# --- inspect -------------------------------------------------------------------------------------------------------


def inspect(reference: ModelReference, request: WidthRequest) -> InspectResult:
    """Describe a model from headers and configuration, and what a request would make of it."""
    with open_checkpoint(reference, need_weights=False) as checkpoint:
        subject = understand(checkpoint)
        target = None if request.is_empty else resolve(subject.architecture, subject.trace.refused, request)
        after, config = None, checkpoint.config
        if target is not None:
            subject.require(target.widths)
            after = summarize(subject.predict(target), target.widths)
            config = with_widths(subject.architecture, target.widths, target.layers)
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
            runtimes=runtime_fits(config),
        )


def verify_folder(folder: Path) -> VerifyResult:
    """Hold a folder that `prune` or `export` wrote against the checksums in its manifest.

    Raises:
        CheckpointError, VerificationError: see `check_files`.
    """
    found = check_files(folder)
    return VerifyResult(SCHEMA_VERSION, str(folder), found.files, found.size_bytes, found.parameters)


# --- prune ---------------------------------------------------------------------------------------------------------


def prune(
    reference: ModelReference, options: PruneOptions, evaluation: EvalOptions | None, listener: Listener
) -> PruneResult | None:
    """Plan, and unless it is a dry run, write; then evaluate both models if asked.

    Whatever can be refused is refused before any weight is read. Of several processes the first one gives the result.
    """
    started, processes = time.perf_counter(), join(options.calibration.device)
    if not processes.is_first:
        writes = not options.dry_run and (options.output is not None or evaluation is not None)
        _assist(reference, options, writes, processes, listener)
        return None
    if options.report is not None:
        check_chart_target(options.report, options.output)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(reference, options.needs_weights))
        source, output = _source_folder(reference, checkpoint), options.output
        if output is None and not options.dry_run and evaluation is not None:
            output = stack.enter_context(scratch_folder()) / "pruned"
        kept, claim = stack.enter_context(ExitStack()), None
        if output is not None and options.dry_run:
            check_target(output, options.overwrite, source)
        elif output is not None:
            claim = kept.enter_context(claimed(output, options.overwrite, source))
        for folder, option in ((options.statistics, "--statistics"), (options.offload_dir, "--offload-dir")):
            if folder is not None:
                check_folder(folder, option)
        subject = understand(checkpoint, processes)
        before = summarize(checkpoint.entries, subject.widths)
        stream, untied = None, 0
        if options.rotate:
            subject, untied = untie(subject)
            stream = find_residual_stream(subject.architecture, subject.trace)
        plan = stored_plan(subject, options.plan) if options.plan else None
        target = target_of(plan) if plan is not None else first_target(subject, options)
        subject.require(target.widths)
        after = summarize(subject.predict(target), target.widths)
        text = prepare_text(checkpoint, evaluation, listener) if evaluation else None
        options, calibration = _prepare_calibration(subject, options, listener)
        processes.broadcast(calibration.without_corpus if calibration else None)
        if calibration is None:
            subject = replace(subject, processes=ALONE)  # the others have nothing to do
        else:
            _warn_of_idle_processes(calibration, processes, listener)
        if calibration is not None and text is not None:
            warn_of_shared_text(calibration.corpus, text.corpus, listener.warn)
        prove(subject.architecture, subject.trace, target.widths.changed_from(subject.widths), prune_twin)
        hold_against_torch_pruning(subject.architecture, subject.trace)
        if stream is not None and calibration is not None:
            turned = stack.enter_context(scratch_folder())
            subject = _rotate(subject, stream, calibration, options, turned, listener)
        work = None
        if claim is not None and calibration is not None:
            key, may_go_on = run_key(subject, options, plan, calibration), options.output is not None
            own = kept.enter_context(kept_work(claim, key, options.resume, may_go_on, listener.warn))
            work = SharedWork(own, processes)
        candidates: tuple[Candidate, ...] = ()
        if plan is None and options.needs_weights:
            plan, candidates = select(subject, target, options, calibration, work, listener)
            target = target_of(plan)
            after = summarize(subject.predict(target), target.widths)
        if untied:
            text_untied = f"The output projection is the embedding no longer, which adds {untied:,} parameters."
            target = replace(target, deviations=(*target.deviations, text_untied))
        for deviation in target.deviations:
            listener.warn(deviation)
        if options.save_plan is not None and plan is not None:
            save_plan(plan, options.save_plan)
        card, report = None, None
        if claim is not None and plan is not None:
            manifest = make_manifest(reference, checkpoint, plan, options, before, after)
            with claim.staged() as staging:
                card = _fill(staging, subject, plan, manifest, options, calibration, work, listener)
            kept.close()
            if evaluation is not None and text is not None:
                pruned = ModelReference(str(output), None, reference.trust_remote_code, reference.dtype)
                name = str(options.output) if options.output else f"{checkpoint.source} (pruned)"
                written = replace(stack.enter_context(open_checkpoint(pruned, need_weights=True)), source=name)
                sides = [(checkpoint, text), (written, text)]
                report = report_perplexity(sides, evaluation, listener)
        result = PruneResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            revision=checkpoint.revision,
            output=None if options.dry_run or options.output is None else str(options.output),
            target=str(options.budget) if options.budget else None,
            protected_layers=target.protected,
            importance=plan.importance if plan else options.importance,
            refit=options.refit,
            seed=plan.seed if plan else options.seed,
            before=before,
            after=after,
            deviations=target.deviations,
            runtimes=runtime_fits(with_widths(subject.architecture, target.widths, target.layers)),
            candidates=tuple(CandidateResult(c.target.widths, c.target.layers, c.parameters, c.kl) for c in candidates),
            seconds=time.perf_counter() - started,
            calibration=card,
            evaluation=report,
        )
    if options.report is not None and card is not None:
        draw_chart(result, card, options.report)
    return result


def _assist(
    reference: ModelReference, options: PruneOptions, writes: bool, processes: Processes, listener: Listener
) -> None:
    """What every process but the first does of `prune`: run its share of the calibration text.

    Args:
        writes: whether a model is written.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(reference, options.needs_weights))
        subject = understand(checkpoint, processes)
        if options.rotate:
            subject, _ = untie(subject)
            stream = find_residual_stream(subject.architecture, subject.trace)
        plan = stored_plan(subject, options.plan) if options.plan else None
        target = target_of(plan) if plan is not None else first_target(subject, options)
        calibration: CalibrationText | None = processes.broadcast(None)
        if calibration is None:
            return
        if options.offload_dir is not None:
            check_folder(options.offload_dir, "--offload-dir")
        if options.rotate:
            subject = _rotate(subject, stream, calibration, options, stack.enter_context(scratch_folder()), listener)
        work = SharedWork(None, processes) if writes else None
        if plan is None:
            plan, _ = select(subject, target, options, calibration, work, listener)
        repair(subject, plan, options, calibration, work, listener)


def _prepare_calibration(
    subject: Subject, options: PruneOptions, listener: Listener
) -> tuple[PruneOptions, CalibrationText | None]:
    """The text to calibrate on; where none can be had and nobody asked for any, options that do without."""
    if not (options.needs_text and options.needs_weights):
        return options, None
    checkpoint = subject.checkpoint
    device = options.layer_device
    longest = getattr(checkpoint.config, "max_position_embeddings", None)
    vocabulary = checkpoint.config.get_text_config().vocab_size
    try:
        tokenizer = load_tokenizer(checkpoint)
        calibration = prepare_calibration(
            options.calibration, tokenizer, vocabulary, longest, options.seed, listener.warn
        )
        if options.left_open:
            subject.layered(device).load_layer(0)
    except (CheckpointError, UnsupportedError) as error:
        if options.without_text.needs_text or options.calibration.dataset is not None:
            raise
        listener.warn(f"{error} So units go by magnitude, and nothing is refitted: expect a model that is much worse.")
        return options.without_text, None
    return options, calibration


def _warn_of_idle_processes(calibration: CalibrationText, processes: Processes, listener: Listener) -> None:
    batches = -(-len(calibration.fitted) // windows_together(calibration.fitted))
    if batches < processes.count:
        listener.warn(
            f"{batches} of {processes.count} processes have text to calibrate on, since batches of {BATCH_TOKENS:,} "
            "tokens stay whole. More --calibration-tokens give the others work."
        )


def _rotate(
    subject: Subject,
    stream: ResidualStream,
    calibration: CalibrationText,
    options: PruneOptions,
    folder: Path,
    listener: Listener,
) -> Subject:
    model = subject.layered(options.layer_device)
    listener.stage("Finding principal components", model.layers)
    components = principal_components(model, calibration.fitted, options.offload_dir, listener.advance)
    listener.stage("Rotating", subject.checkpoint.size_bytes)
    return rotate(subject, stream, components, folder, listener.advance)


def _fill(
    staging: Path,
    subject: Subject,
    plan: Plan,
    manifest: Manifest,
    options: PruneOptions,
    calibration: CalibrationText | None,
    work: SharedWork | None,
    listener: Listener,
) -> CalibrationResult | None:
    """Refit, write and judge."""
    repaired, repairs = repair(subject, plan, options, calibration, work, listener)
    checksums = write_pruned(repaired, plan, staging, manifest, options.max_shard_bytes, listener)
    _warn_of_large_shards(staging, options.max_shard_bytes, listener)
    card = None
    if calibration is not None:
        card = report_card(subject, staging, plan, options, calibration, repairs, listener)
        manifest = replace(manifest, calibration=asdict(card))
    config = with_widths(subject.architecture, plan.after, plan.layers)
    write_card(staging, subject.checkpoint, manifest, "safetensors", runtime_fits(config))
    write_manifest(staging, replace(manifest, files=list_files(staging, checksums)))
    return card


def _source_folder(reference: ModelReference, checkpoint: Checkpoint) -> Path | None:
    """The user's own folder or file that must stay untouched."""
    path = Path(reference.name)
    return path if path.exists() else checkpoint.folder


# --- eval ----------------------------------------------------------------------------------------------------------


def evaluate(
    reference: ModelReference, compare: ModelReference | None, options: EvalOptions, listener: Listener
) -> EvalReport:
    """Perplexity of one model, or of two side by side on the same text and with windows of the same length."""
    with ExitStack() as stack:
        processes = join(options.device)
        checkpoint = stack.enter_context(open_checkpoint(reference, need_weights=True))
        text = prepare_text(checkpoint, options, listener)
        sides = [(checkpoint, text)]
        if compare is not None:
            other = stack.enter_context(open_checkpoint(compare, need_weights=True))
            alike = replace(options, max_seq_len=text.windows.shape[1])
            sides.append((other, prepare_text(other, alike, listener)))
        return report_perplexity(sides, options, listener, processes)


# --- export --------------------------------------------------------------------------------------------------------


def _warn_of_large_shards(folder: Path, most_bytes: int, listener: Listener) -> None:
    large = sum(path.stat().st_size > most_bytes for path in folder.glob("*.safetensors"))
    if large:
        listener.warn(f"Shards larger than --max-shard-size: {large}. Each holds one tensor, which cannot be split.")


def export(
    reference: ModelReference,
    output: Path,
    format_name: str,
    options: ExportOptions,
    overwrite: bool,
    verified: bool | None,
    listener: Listener,
) -> ExportResult:
    """Write a checkpoint in another format, and hold it against transformers in the runtime that reads it.

    Args:
        verified: whether it has to be; None where that is possible.

    Raises:
        UnsupportedError: no runtime of this format takes the model.
        VerificationError: it is not the same model there, or cannot be compared and has to be.
    """
    form = FORMATS[format_name]
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(reference, need_weights=True))
        source = _source_folder(reference, checkpoint)
        claim = stack.enter_context(claimed(output, overwrite, source))
        fit = Fit(loads=True, note=f"by {options.converter}") if options.converter else form.fit(checkpoint.config)
        if not fit.loads:
            raise UnsupportedError(f"{checkpoint.source} cannot be exported as {format_name}: {fit.note}")
        dtype = options.dtype or form.dtype_for(checkpoint)
        reason = "not asked for" if verified is False else missing_runtime(form) or missing_memory(checkpoint)
        if verified and reason:
            raise VerificationError(f"The export cannot be verified: {reason}. Leave out --verify to write it anyway.")
        manifest = source_manifest(checkpoint)
        verification = None
        with claim.staged() as staging:
            listener.stage("Exporting", checkpoint.size_bytes)
            as_asked = options if form.keeps_dtypes else replace(options, dtype=dtype)
            checksums = form.write(checkpoint, staging, as_asked, listener.advance)
            _warn_of_large_shards(staging, options.max_shard_bytes, listener)
            if not reason:
                listener.stage("Verifying", len(PROMPTS))
                verification = verify(checkpoint, form, staging, dtype, listener.advance)
            pruned = manifest if manifest.is_pruned else None
            write_card(staging, checkpoint, pruned, format_name, runtime_fits(checkpoint.config))
            result = asdict(verification) if verification else None
            exported = {"format": format_name, "dtype": dtype, "versions": versions(), "verification": result}
            write_manifest(staging, replace(manifest, export=exported, files=list_files(staging, checksums)))
        files = sorted(path for path in output.rglob("*") if path.is_file())
        return ExportResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            output=str(output),
            format=format_name,
            dtype=dtype,
            parameters=checkpoint.parameter_count,
            size_bytes=sum(path.stat().st_size for path in files),
            files=tuple(str(path.relative_to(output)) for path in files),
            note=fit.note,
            verification=verification,
            unverified=reason or "",
        )


def source_manifest(checkpoint: Checkpoint) -> Manifest:
    """What the source's manifest says of how it was made, or else where it is from."""
    if (checkpoint.companions / MANIFEST_NAME).is_file():
        return read_manifest(checkpoint.companions)
    return Manifest(source=checkpoint.source, revision=checkpoint.revision)
