"""The first steps of `prune`: the widths, the method, the text that it is calibrated on, and the model that is cut."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llmprune_cli.apply.proven_widths import check_proof, refusing, unproven
from llmprune_cli.apply.vocabulary.proof import prove_rows
from llmprune_cli.choose.importances import needs_text
from llmprune_cli.choose.saved_plan import stored_plan, warn_of_other_weights
from llmprune_cli.choose.selection import first_target, target_of
from llmprune_cli.choose.targets.limits import Limit, SizeLimit, size_limit, whole_target
from llmprune_cli.choose.targets.speed import Race, SpeedLimit, work_of
from llmprune_cli.commands.prune.vocabulary import DecidedVocabulary, decide_vocabulary
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.twin import NoLogitsError
from llmprune_cli.errors import CheckpointError, MissingPackageError, PlanError, UnsupportedError
from llmprune_cli.family.architecture import with_widths
from llmprune_cli.folder.staging import check_room
from llmprune_cli.folder.tensors import BY_NAME, TensorEntry
from llmprune_cli.formats.registry import load_format
from llmprune_cli.options import Choice
from llmprune_cli.plan.document import Plan, Vocabulary
from llmprune_cli.plan.predict import predict, predicted_tensors
from llmprune_cli.plan.requested_widths import Target, refuse_copy
from llmprune_cli.processes import Processes
from llmprune_cli.progress import Listener
from llmprune_cli.repair.residual_stream import ResidualStream, find_residual_stream
from llmprune_cli.repair.rotation import principal_components, rotate, untie
from llmprune_cli.report.json_results import CountedSize, ModelSummary
from llmprune_cli.report.summary import summarize
from llmprune_cli.run.calibration import CalibrationText, prepare_calibration, window_tokens
from llmprune_cli.run.layer import BATCH_TOKENS, windows_together
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.precision import native_dtype
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.full_model import pick_device
from llmprune_cli.source.own_text import Place, warn_of_no_conversations, write_text
from llmprune_cli.source.tokenizer import load_tokenizer, longest_text, model_reader, warn_of_other_reading
from llmprune_cli.text.corpus import Corpus, own_corpus
from llmprune_cli.vocabulary.request import resolve_size


@dataclass(frozen=True)
class Decided:
    """What follows from headers and options alone."""

    subject: Subject
    plan: Plan | None  # that is replayed
    target: Target  # with a budget, the least that the search reaches
    tensors: tuple[TensorEntry, ...]  # what the target leaves of the language model's
    before: ModelSummary
    stream: ResidualStream | None  # that is to be rotated
    untied: int  # parameters that this adds
    limit: Limit | None  # that the widths are searched for
    vocabulary: DecidedVocabulary | None  # None: all tokens stay


def decide(request: PruneRequest, subject: Subject, listener: Listener) -> Decided:
    """The widths, and the proof that this family can have them.

    Raises:
        PlanError, UnsupportedError: it cannot.
    """
    cached = subject.architecture.cached_numbers(subject.widths, whole_target(subject).layers)
    before = summarize((*subject.checkpoint.entries, *subject.surroundings), subject.widths, cached)
    stream, untied = None, 0
    if request.choice.rotate:
        subject, untied = untie(subject)
        stream = find_residual_stream(subject.architecture, subject.trace)
    plan, path = None, request.delivery.plan
    if path is not None:
        plan = stored_plan(subject, path)
        if subject.processes.is_first:
            warn_of_other_weights(plan, path, subject.checkpoint, listener.warn)
    limit = least = limit_of(request, subject, listener)
    vocabulary = decide_vocabulary(request, subject, plan, limit)
    if vocabulary is not None and subject.processes.is_first:
        prove_rows(subject)
    if vocabulary is not None and limit is not None:
        least = limit.sparing(vocabulary.spared(vocabulary.sizes[-1]))
    subject, target, tensors = _proven(request, subject, plan, least)
    if vocabulary is not None:
        tensors = vocabulary.cut(tensors, plan.vocabulary if plan is not None else None)
    size_bytes = sum(entry.size_bytes for entry in tensors)
    if request.writes and subject.processes.is_first:
        check_room(request.delivery.output or Path(tempfile.gettempdir()), size_bytes)
    check_export_fits(request, subject, target)
    _check_tokens_fit(request, subject)
    return Decided(subject, plan, target, tensors, before, stream, untied, limit, vocabulary)


def limit_of(request: PruneRequest, subject: Subject, listener: Listener) -> Limit | None:
    """What the widths of a target must not exceed; None where they are given.

    Raises:
        PlanError: more text is to be timed than the model can attend to.
    """
    budget = request.choice.budget
    if budget is None:
        return None
    if budget.kind == "speedup":
        work, asked = work_of(subject, request.choice.batch, budget.context), request.vocabulary.number
        tokens = resolve_size(asked, int(subject.architecture.config.vocab_size)) if asked is not None else None
        return SpeedLimit(budget.amount, Race(subject, work, layer_device(request.model.device), listener, tokens))
    return size_limit(subject, budget, partial(_weigh, subject, budget.dtype) if budget.dtype is not None else None)


def counted_size(
    request: PruneRequest, decided: Decided, target: Target, vocabulary: Vocabulary | None
) -> CountedSize | None:
    """Sizes as the target counts them; None where it counts them as they are stored.

    Args:
        vocabulary: tokens that stay; None: all.
    """
    budget, limit = request.choice.budget, decided.limit
    if budget is None or not budget.counted or not isinstance(limit, SizeLimit):
        return None
    if decided.vocabulary is not None and vocabulary is not None:
        limit = limit.sparing(decided.vocabulary.spared(len(vocabulary.kept)))
    before, after = limit.of(limit.whole), limit.left_of(target)
    return CountedSize(budget.dtype, budget.context, int(before), int(after))


def _weigh(subject: Subject, dtype: str, target: Target) -> int:
    """Bytes of a target's weights in a GGUF file.

    Raises:
        UnsupportedError: see `weights_bytes`.
    """
    from llmprune_cli.formats.gguf.writing import weights_bytes

    entries = subject.checkpoint.entries
    shapes = {entry.name: entry.shape for entry in entries}
    after = predicted_tensors(shapes, subject.trace, subject.widths, target)
    stored = entries[0].dtype  # of which nothing here depends
    config = with_widths(subject.architecture, target.widths, target.layers)
    return weights_bytes([TensorEntry(name, shape, stored, None) for name, shape in after.items()], config, dtype)


def check_export_fits(request: PruneRequest, subject: Subject, target: Target) -> None:
    """Refuse widths in which what comes afterwards does not take the model.

    Raises:
        UnsupportedError: see above.
    """
    if request.export is None:
        return
    fit = load_format(request.export[0].format).fit(with_widths(subject.architecture, target.widths, target.layers))
    if not fit.loads:
        raise UnsupportedError(f"The pruned model cannot be exported: {fit.note}. Leave out --gguf.")


def _check_tokens_fit(request: PruneRequest, subject: Subject) -> None:
    """Refuse a tokenizer that what comes afterwards does not take, or cannot do without.

    Raises:
        UnsupportedError, CheckpointError: see `load_tokenizer` and `read_vocabulary`.
    """
    if (request.export, request.recover) == (None, None) or not subject.processes.is_first:
        return
    checkpoint = subject.checkpoint
    tokenizer = load_tokenizer(checkpoint)
    if request.export is None:
        return
    from llmprune_cli.formats.gguf.vocabulary import read_vocabulary

    try:
        read_vocabulary(tokenizer, int(checkpoint.config.vocab_size))
    except (UnsupportedError, CheckpointError) as error:
        raise type(error)(f"The pruned model cannot be exported in one go: {error} Leave out --gguf.") from error


def _proven(
    request: PruneRequest, subject: Subject, plan: Plan | None, limit: Limit | None
) -> tuple[Subject, Target, tuple[TensorEntry, ...]]:
    """The widths that are asked for, proven by the first process; of all together, without those that do not hold."""
    target = target_of(plan) if plan is not None else _asked_for(request, subject, limit)
    subject.require(target.widths)
    tensors = predict(subject, target)
    of_all = request.choice.budget is not None or request.choice.widths.pruning_ratio is not None

    def find_faults() -> dict[str, str]:
        try:
            check_proof(subject, target)
        except NoLogitsError:
            raise
        except (PlanError, UnsupportedError):
            faults = unproven(subject) if of_all else {}
            if not faults:
                raise
            return faults
        return {}

    faults = subject.processes.broadcast(find_faults() if subject.processes.is_first else None)
    if not faults:
        return subject, target, tensors
    left = refusing(subject, faults)
    target = _asked_for(request, left, limit)
    left.require(target.widths)
    if left.processes.is_first:
        check_proof(left, target)
    return left, target, predict(left, target)


def _asked_for(request: PruneRequest, subject: Subject, limit: Limit | None) -> Target:
    """See `first_target`.

    Raises:
        PlanError: no legal widths come of the request, or nothing would change.
    """
    choice, delivery = request.choice, request.delivery
    target = first_target(subject, choice, limit)
    changes_more = choice.rotate or delivery.text_only or request.vocabulary.number is not None
    if limit is None and not changes_more:
        refuse_copy(subject.architecture, subject.trace, choice.widths, target)
    return target


def settle(
    request: PruneRequest, subject: Subject, processes: Processes, listener: Listener
) -> tuple[Choice, CalibrationText | None]:
    """The method and the text to calibrate on, prepared by the first process.

    Where no text can be had and nobody asked for any, it is a method that does without.
    """
    settled = replace(request.choice.settled, compute_dtype=_compute_dtype(request, subject))
    if not (request.needs_text and request.needs_weights):
        if request.needs_text and processes.is_first:
            window_tokens(request.text, longest_text(subject.checkpoint), listener.warn)
        return settled, None
    choice, text = settled, None
    if processes.is_first:
        try:
            text = _prepare_text(request, subject, listener)
        except MissingPackageError:
            raise
        except (CheckpointError, UnsupportedError) as error:
            choice = replace(request.choice.without_text, compute_dtype=settled.compute_dtype)
            if needs_text(choice, request.delivery.plan is not None) or request.text.calibration is not None:
                raise
            listener.warn(
                f"{error} So units go by magnitude, and nothing is refitted: expect a model that is much worse."
            )
    told = processes.broadcast((choice, text.without_corpus if text else None))
    if text is not None and processes.is_first:
        _warn_of_idle_processes(text, processes, listener)
    return (choice, text) if processes.is_first else told


def _compute_dtype(request: PruneRequest, subject: Subject) -> str:
    """The dtype of matrix products; where it was left open, what suits weights, device and family."""
    if request.choice.compute_dtype != "auto":
        return request.choice.compute_dtype
    stored = subject.checkpoint.stored_dtype
    device = layer_device(request.model.device)
    dtype = native_dtype(stored, torch.device(device))
    if dtype != torch.float32 and request.needs_text and request.needs_weights:
        dtype = dtype if LayeredModel(subject, device, dtype).runs() else torch.float32
    return str(dtype).removeprefix("torch.")


def layered(subject: Subject, request: PruneRequest, choice: Choice) -> LayeredModel:
    """The model as it is run on calibration text.

    Args:
        choice: see `settle`.
    """
    return LayeredModel(subject, layer_device(request.model.device), BY_NAME[choice.compute_dtype].torch)


def _prepare_text(request: PruneRequest, subject: Subject, listener: Listener) -> CalibrationText:
    checkpoint, choice = subject.checkpoint, request.choice
    device = layer_device(request.model.device)
    reader = model_reader(checkpoint)
    warn_of_other_reading(checkpoint, reader.tokenizer, listener.warn)
    warn_of_no_conversations(request.text.calibration, reader.tokenizer, listener.warn)
    write = partial(write_own_text, request, subject, listener)
    text = prepare_calibration(request.text, reader, choice.seed, listener.warn, write)
    if choice.importance is None or choice.refit is None:
        LayeredModel(subject, device).load_layer(0)  # where that fails, there is a way without
    return text


def write_own_text(request: PruneRequest, subject: Subject, listener: Listener, tokens: int) -> Corpus:
    """Text that the whole model writes itself."""
    checkpoint, device = subject.checkpoint, request.model.device
    place = Place(device, native_dtype(checkpoint.stored_dtype, torch.device(layer_device(device))))
    text = write_text(checkpoint, load_tokenizer(checkpoint), place, tokens, request.choice.seed, listener)
    return own_corpus(text, checkpoint.source)


def _warn_of_idle_processes(text: CalibrationText, processes: Processes, listener: Listener) -> None:
    batches = -(-len(text.fitted) // windows_together(text.fitted))
    if batches < processes.count:
        listener.warn(
            f"{batches} of {processes.count} processes have text to calibrate on, since batches of {BATCH_TOKENS:,} "
            "tokens stay whole. More --calibration-tokens give the others work."
        )


def rotate_model(bench: Workbench, text: CalibrationText, stream: ResidualStream, folder: Path) -> Subject:
    """The model with principal components for channels, written into a folder; see `rotate`."""
    model, listener = bench.model, bench.listener
    listener.stage("Finding principal components", model.layers)
    components = principal_components(model, text.fitted, bench.offload_dir, listener.advance)
    listener.stage("Rotating", model.checkpoint.size_bytes)
    return rotate(model.subject, stream, components, folder, listener.advance)


def layer_device(device: str) -> str:
    """Where one layer at a time runs.

    Raises:
        CheckpointError: the device is not on this machine.
    """
    place = pick_device(device)
    return "cuda" if place == "auto" else place
