"""One straight-line function per command. No printing: progress goes to a callback, results are dataclasses."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli import __version__
from llmprune_cli.architecture import Architecture, Shape, Widths, discover, expected_index, split_name, with_widths
from llmprune_cli.checkpoint import Checkpoint, TensorEntry, read_index
from llmprune_cli.corpus import cut_windows, load_corpus
from llmprune_cli.errors import PlanError, UnsupportedError, VerificationError
from llmprune_cli.evaluation import RunningPerplexity, evaluate_perplexity, peak_memory_bytes
from llmprune_cli.export import FORMATS, ExportOptions
from llmprune_cli.groups import Trace
from llmprune_cli.loading import ModelReference, copy_companions, load_model, load_tokenizer, open_checkpoint
from llmprune_cli.plan import (
    Plan,
    WidthRequest,
    choose,
    fingerprint,
    legal_values,
    predicted_shapes,
    read_plan,
    resolve,
    save_plan,
)
from llmprune_cli.scoring import IMPORTANCES
from llmprune_cli.surgery import pruned_entries, pruned_tensors
from llmprune_cli.twin import prove, trace
from llmprune_cli.writer import check_target, staged_folder, write_json, write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA_VERSION = 1
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
class TensorRow:
    """Tensors of one template and shape, folded over layers."""

    template: str  # tensor name with {} for numbers
    layers: str  # which, "0-31" for example; empty for tensors outside the layers
    count: int
    shape: Shape
    dtype: str
    parameters: int  # of all `count` tensors together


@dataclass(frozen=True)
class ModelSummary:
    """One state of a model, before or after pruning."""

    widths: Widths
    parameters: int
    size_bytes: int
    kv_cache_bytes_per_token: int  # at the checkpoint's dtype, all layers, keys and values
    tensors: tuple[TensorRow, ...]


@dataclass(frozen=True)
class InspectResult:
    """What `inspect` reports."""

    schema_version: int
    model: str
    revision: str | None
    model_type: str
    has_weights: bool
    tied_embeddings: bool
    prunable: dict[str, str]  # width → legal values, or "no: reason"
    dropped: tuple[str, ...]  # stored tensors that the model does not use
    before: ModelSummary
    after: ModelSummary | None
    deviations: tuple[str, ...]


@dataclass(frozen=True)
class EvalResult:
    """Perplexity of one model."""

    model: str
    perplexity: float
    mean_nll: float  # nats per token
    windows: int
    tokens: int
    max_seq_len: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int  # of this process, on CUDA of the device
    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class EvalReport:
    """What `eval` reports."""

    schema_version: int
    dataset: str
    origin: str
    split: str
    results: tuple[EvalResult, ...]


@dataclass(frozen=True)
class PruneResult:
    """What `prune` reports."""

    schema_version: int
    model: str
    revision: str | None
    output: str | None  # None for a dry run, or where the result was temporary
    importance: str
    seed: int
    before: ModelSummary
    after: ModelSummary
    deviations: tuple[str, ...]
    seconds: float
    evaluation: EvalReport | None


@dataclass(frozen=True)
class ExportResult:
    """What `export` reports."""

    schema_version: int
    model: str
    output: str
    format: str
    dtype: str
    parameters: int
    size_bytes: int
    files: tuple[str, ...]


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
    importance: str = "magnitude"
    seed: int = 0
    plan: Path | None = None
    save_plan: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    max_shard_bytes: int = 5 * 10**9


# --- inspect -------------------------------------------------------------------------------------------------------


def inspect(reference: ModelReference, request: WidthRequest) -> InspectResult:
    """Describe a model from headers and configuration, and what a request would make of it."""
    with open_checkpoint(reference, need_weights=False) as checkpoint:
        architecture, traced = _understand(checkpoint)
        target = None if request.is_empty else resolve(architecture, request)
        after = None
        if target is not None:
            _require(traced, target.widths.changed_from(architecture.widths), architecture)
            after = _predict(checkpoint, architecture, traced, target.widths)
        return InspectResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            revision=checkpoint.revision,
            model_type=checkpoint.config.model_type,
            has_weights=checkpoint.has_weights,
            tied_embeddings=bool(getattr(checkpoint.config, "tie_word_embeddings", False)),
            prunable=legal_values(architecture, traced),
            dropped=checkpoint.dropped,
            before=summarize(checkpoint.entries, architecture.widths),
            after=after,
            deviations=target.deviations if target else (),
        )


def _understand(checkpoint: Checkpoint) -> tuple[Architecture, Trace]:
    architecture = discover(checkpoint.config)
    traced = trace(architecture)
    traced.check({entry.name: entry.shape for entry in checkpoint.entries}, architecture.widths)
    return architecture, traced


def _require(traced: Trace, changed: tuple[str, ...], architecture: Architecture) -> None:
    for width in changed:
        if width in traced.refused:
            raise UnsupportedError(
                f"{architecture.config.model_type} cannot be pruned in {width}: {traced.refused[width]}."
            )


def _predict(checkpoint: Checkpoint, architecture: Architecture, traced: Trace, widths: Widths) -> ModelSummary:
    """The summary after pruning, and the Counting oracle: shapes by plan must equal shapes by configuration.

    Raises:
        VerificationError: they differ.
    """
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    after = predicted_shapes(shapes, traced, architecture.widths, widths)
    expected = expected_index(with_widths(architecture, widths))
    wrong = [name for name in after if after[name] != expected.get(name)] + sorted(expected.keys() - after.keys())
    if wrong:
        raise VerificationError(
            f"{wrong[0]} would become {after.get(wrong[0])}, but the new config makes it {expected.get(wrong[0])}."
        )
    entries = [TensorEntry(entry.name, after[entry.name], entry.dtype, None) for entry in checkpoint.entries]
    return summarize(entries, widths)


def summarize(entries: tuple[TensorEntry, ...] | list[TensorEntry], widths: Widths) -> ModelSummary:
    """Fold tensors over layers and add them up."""
    folded: dict[tuple[str, Shape, str], list[TensorEntry]] = {}
    for entry in entries:
        folded.setdefault((split_name(entry.name)[0], entry.shape, entry.dtype), []).append(entry)
    rows = tuple(
        TensorRow(template, _ranges(members), len(members), shape, dtype, sum(e.numel for e in members))
        for (template, shape, dtype), members in folded.items()
    )
    widest = max(entries, key=lambda entry: entry.numel)
    kv_elements = 2 * widths.num_hidden_layers * widths.num_key_value_heads * widths.head_dim
    return ModelSummary(
        widths=widths,
        parameters=sum(entry.numel for entry in entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
        kv_cache_bytes_per_token=kv_elements * widest.size_bytes // widest.numel,
        tensors=rows,
    )


def _ranges(entries: list[TensorEntry]) -> str:
    numbers = sorted({found[0] for found in (split_name(entry.name)[1] for entry in entries) if found})
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


# --- prune ---------------------------------------------------------------------------------------------------------


def prune(
    reference: ModelReference, options: PruneOptions, evaluation: EvalOptions | None, listener: Listener
) -> PruneResult:
    """Plan, and unless it is a dry run, write; then evaluate both models if asked."""
    started = time.perf_counter()
    with ExitStack() as stack:
        need_weights = not options.dry_run or options.save_plan is not None
        checkpoint = stack.enter_context(open_checkpoint(reference, need_weights))
        output = options.output
        if output is None and not options.dry_run and evaluation is not None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmprune-")), "pruned")
        if output is not None:
            check_target(output, options.overwrite, _source_folder(reference, checkpoint))
        architecture, traced = _understand(checkpoint)
        if options.plan is not None:
            plan, widths, deviations = _stored_plan(checkpoint, architecture, options.plan)
        else:
            target = resolve(architecture, options.request)
            plan, widths, deviations = None, target.widths, target.deviations
        changed = widths.changed_from(architecture.widths)
        _require(traced, changed, architecture)
        before = summarize(checkpoint.entries, architecture.widths)
        after = _predict(checkpoint, architecture, traced, widths)
        for deviation in deviations:
            listener.warn(deviation)
        if changed:
            prove(architecture, traced, changed, _prune_twin)
        if need_weights and plan is None:
            plan = make_plan(checkpoint, architecture, traced, widths, deviations, options, listener)
        if options.save_plan is not None and plan is not None:
            save_plan(plan, options.save_plan)
        report = None
        if output is not None and plan is not None and not options.dry_run:
            manifest = _manifest(reference, checkpoint, plan, options, before, after)
            with staged_folder(output, options.overwrite, _source_folder(reference, checkpoint)) as staging:
                write_pruned(
                    checkpoint, architecture, traced, plan, staging, manifest, options.max_shard_bytes, listener
                )
            if evaluation is not None:
                pruned = ModelReference(str(output), None, reference.trust_remote_code, reference.dtype)
                report = _evaluate(checkpoint, reference, pruned, evaluation, listener)
        return PruneResult(
            schema_version=SCHEMA_VERSION,
            model=checkpoint.source,
            revision=checkpoint.revision,
            output=None if options.dry_run or options.output is None else str(options.output),
            importance=plan.importance if plan else options.importance,
            seed=plan.seed if plan else options.seed,
            before=before,
            after=after,
            deviations=deviations,
            seconds=time.perf_counter() - started,
            evaluation=report,
        )


def _source_folder(reference: ModelReference, checkpoint: Checkpoint) -> Path | None:
    """The user's own folder or file that must stay untouched."""
    path = Path(reference.name)
    return path if path.exists() else checkpoint.folder


def _stored_plan(
    checkpoint: Checkpoint, architecture: Architecture, path: Path
) -> tuple[Plan, Widths, tuple[str, ...]]:
    plan = read_plan(path)
    if plan.fingerprint != fingerprint(checkpoint) or plan.before != architecture.widths:
        raise PlanError(f"{path} was made for another model. Make a plan for {checkpoint.source} with --save-plan.")
    return plan, plan.after, plan.deviations


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    traced: Trace,
    widths: Widths,
    deviations: tuple[str, ...],
    options: PruneOptions,
    listener: Listener,
) -> Plan:
    """Score all units on the unpruned model and choose those that stay."""
    before, changed = architecture.widths, widths.changed_from(architecture.widths)
    scores = {}
    if changed:
        listener.stage("Scoring", checkpoint.size_bytes)
        importance = IMPORTANCES[options.importance]
        scores = importance(checkpoint, traced, before, options.seed, listener.advance)
    keep = choose(scores, before, widths)
    return Plan(fingerprint(checkpoint), before, widths, options.importance, options.seed, deviations, keep)


def write_pruned(
    checkpoint: Checkpoint,
    architecture: Architecture,
    traced: Trace,
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
    entries = pruned_entries(checkpoint, traced, plan)
    listener.stage("Writing", checkpoint.size_bytes)
    write_shards(folder, entries, pruned_tensors(checkpoint, traced, plan, listener.advance), max_shard_bytes)
    with_widths(architecture, plan.after).save_pretrained(folder)
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
            "importance": plan.importance,
            "seed": plan.seed,
            "plan": str(options.plan) if options.plan else None,
            "dtype": reference.dtype,
        },
        "widths": {"before": asdict(before.widths), "after": asdict(after.widths)},
        "parameters": {"before": before.parameters, "after": after.parameters},
        "size_bytes": {"before": before.size_bytes, "after": after.size_bytes},
        "deviations": list(plan.deviations),
        "dropped_tensors": list(checkpoint.dropped),
    }


def _prune_twin(
    source: Path, target: Path, traced: Trace, architecture: Architecture, widths: Widths
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Prune a saved twin as a user's model is pruned, at random."""
    quiet = Listener(lambda *_: None, lambda *_: None, lambda *_: None, lambda *_: None)
    checkpoint = Checkpoint(source, "twin", None, architecture.config, read_index(source), True, source)
    options = PruneOptions(WidthRequest(), importance="random")
    plan = make_plan(checkpoint, architecture, traced, widths, (), options, quiet)
    write_pruned(checkpoint, architecture, traced, plan, target, {}, 2**62, quiet)
    return plan.keep


# --- eval ----------------------------------------------------------------------------------------------------------


def evaluate(
    reference: ModelReference, compare: ModelReference | None, options: EvalOptions, listener: Listener
) -> EvalReport:
    """Perplexity of one model, or of two side by side on the same text."""
    with open_checkpoint(reference, need_weights=True) as checkpoint:
        return _evaluate(checkpoint, reference, compare, options, listener)


def _evaluate(
    checkpoint: Checkpoint,
    reference: ModelReference,
    compare: ModelReference | None,
    options: EvalOptions,
    listener: Listener,
) -> EvalReport:
    corpus = load_corpus(options.dataset, options.split)
    window = _window_tokens(checkpoint, options, listener)
    results = []
    with ExitStack() as stack:
        pairs = [(reference, checkpoint)]
        if compare is not None:
            pairs.append((compare, stack.enter_context(open_checkpoint(compare, need_weights=True))))
        for model_reference, opened in pairs:
            tokenizer = load_tokenizer(opened, model_reference.trust_remote_code)
            windows = cut_windows(corpus, tokenizer, window, options.limit)
            model = load_model(opened, options.device, options.dtype, model_reference.trust_remote_code)
            listener.stage(f"Evaluating {opened.source}", len(windows))
            final = evaluate_perplexity(
                model,
                windows,
                options.batch_size,
                lambda state, name=opened.source: listener.perplexity(name, state),  # type: ignore[misc]
            )
            results.append(_eval_result(opened, model, final, window))
            del model
    return EvalReport(SCHEMA_VERSION, options.dataset, corpus.origin, options.split, tuple(results))


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
