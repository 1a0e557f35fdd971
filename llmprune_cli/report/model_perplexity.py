"""Perplexity and bits per byte of models side by side on one text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import psutil
import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.options import Evaluation, ModelReference
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import SCHEMA_VERSION, EvalReport, EvalResult
from llmprune_cli.run.perplexity import (
    FirstModel,
    RunningPerplexity,
    bits_per_byte,
    evaluate_perplexity,
    largest_batch,
    peak_memory_bytes,
)
from llmprune_cli.run.precision import native_dtype
from llmprune_cli.run.questions.figures import TaskResult
from llmprune_cli.run.questions.tasks import Tasks, ask
from llmprune_cli.source.full_model import load_model, own_device, pick_device
from llmprune_cli.source.tokenizer import load_tokenizer, longest_text, model_reader, warn_of_other_reading
from llmprune_cli.text.conversations import Speller
from llmprune_cli.text.corpus import Corpus, load_corpus, load_usual_corpus
from llmprune_cli.text.names import KNOWN
from llmprune_cli.text.reading import Reading
from llmprune_cli.text.windows import Reader, read_corpus, windows_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG_WINDOW = 8192  # tokens; longer windows by default deserve a warning
MOST_OF_MEMORY = 0.5  # that is free, for weights in a wider dtype than the stored one
POSITIONS_AHEAD = 2  # rows that some tables of learned positions have more, such as OPT's
FALLBACK_WINDOW = 2048  # tokens, for models that state no maximum


@dataclass(frozen=True)
class EvalText:
    """A corpus cut into one model's windows."""

    corpus: Corpus
    windows: torch.Tensor  # token ids, [N, T]
    tail: torch.Tensor  # token ids, [T'], that fill no window and yet belong to the text that is compared; often none
    characters: int  # of text in the windows
    bytes: int  # of text, in UTF-8, in the tokens that are predicted


def prepare_text(
    checkpoint: Checkpoint, device: str, options: Evaluation, listener: Listener, first: EvalText | None = None
) -> EvalText:
    """Cut a corpus into the windows of one model.

    Args:
        first: the text of the model that this one is held against; where this one reads it as other tokens, it gets
            the same part of the text in windows of the same length.

    Raises:
        CheckpointError: no such device, text or tokenizer, or too little text.
    """
    if first is not None:
        options = replace(options, dataset=first.corpus.name, max_seq_len=first.windows.shape[1])
    pick_device(device)
    reader = model_reader(checkpoint)
    warn_of_other_reading(checkpoint, reader.tokenizer, listener.warn)
    if options.dataset is None:
        corpus = load_usual_corpus(options.split, Evaluation.split, listener.warn, "--dataset")
    else:
        column = None if options.dataset in KNOWN else options.text_column
        corpus = load_corpus(options.dataset, options.split, column, Speller(reader.tokenizer))
    window = _window_tokens(checkpoint, options, listener)
    reading = read_corpus(corpus, reader)
    if first is not None:
        return _same_text(first, corpus, reading, reader)
    windows = windows_in(reading.tokens, window, options.limit, corpus.origin)
    return _eval_text(corpus, reading, windows, windows.new_empty(0))


def _same_text(first: EvalText, corpus: Corpus, reading: Reading, reader: Reader) -> EvalText:
    """The text of the first model's windows in the tokens of another, which may fill one shorter window only.

    Args:
        reading: of the whole corpus.
    """
    window = first.windows.shape[1]
    if torch.equal(reading.tokens[: first.windows.numel()], first.windows.flatten()):
        return _eval_text(corpus, reading, first.windows, first.tail)
    reading = read_corpus(replace(corpus, text=corpus.text[: first.characters]), reader)
    tokens, whole = reading.tokens, len(reading.tokens) // window * window
    if len(tokens) < 2:
        raise CheckpointError(f"{corpus.origin} has too little text to compare by. Give more, or larger --max-seq-len.")
    if not whole:
        return _eval_text(corpus, reading, tokens[None], tokens[:0])
    return _eval_text(corpus, reading, tokens[:whole].view(-1, window), tokens[whole:])


def _eval_text(corpus: Corpus, reading: Reading, windows: torch.Tensor, tail: torch.Tensor) -> EvalText:
    count = windows.numel()
    ends = [*range(windows.shape[1], count + 1, windows.shape[1]), *([count + len(tail)] if len(tail) else [])]
    return EvalText(corpus, windows, tail, reading.characters(count), reading.predicted_bytes(ends))


def report_perplexity(
    sides: list[tuple[Checkpoint, EvalText]],
    reference: ModelReference,
    options: Evaluation,
    listener: Listener,
    processes: Processes = ALONE,
    tasks: Tasks | None = None,
) -> EvalReport:
    """Evaluate models one after the other, each on its own windows of the same text; the others against the first.

    What does not fit into the memory of the devices lies in a folder while it is evaluated.

    Args:
        reference: that says how they are loaded, and where they run.
        tasks: that all of them are asked, in the first process.

    Raises:
        CheckpointError: one cannot be loaded.
    """
    results = []
    if reference.dtype is None:
        reference = replace(reference, dtype=_fast_dtype([own for own, _ in sides], reference.device, processes))
    with scratch_folder() as states:
        first = FirstModel(states) if len(sides) > 1 else None
        for number, side in enumerate(sides):
            alike = number == 0 or torch.equal(side[1].windows, sides[0][1].windows)
            if not alike:
                listener.warn(
                    f"{side[0].source} has another tokenizer, so its perplexity is of other tokens. Compare bits per "
                    "byte, which are of the same text."
                )
            against = first if alike else None
            result = _evaluate(side, reference, options, listener, processes, against, number == 0, tasks)
            results.append(replace(result, same_tokens=alike))
            if not math.isfinite(result.perplexity):
                listener.warn(
                    f"{side[0].source} turns text into NaN, or has no chance left for a token of it: its weights are "
                    "damaged, or --dtype is too narrow for it."
                )
    corpus = sides[0][1].corpus
    return EvalReport(SCHEMA_VERSION, corpus.name, corpus.origin, options.split, tuple(results))


def _fast_dtype(checkpoints: list[Checkpoint], device: str, processes: Processes) -> str | None:
    """What all are loaded in: None, as stored; or float32 where half precision is emulated, if memory allows that."""
    place = pick_device(device)
    kind = torch.device("cuda" if place == "auto" else place)
    emulated = [
        own
        for own in checkpoints
        if own.stored_dtype.itemsize == 2 and native_dtype(own.stored_dtype, kind).itemsize > 2
    ]
    size_bytes = max((4 * own.parameter_count for own in emulated), default=0)
    room = MOST_OF_MEMORY * psutil.virtual_memory().available / processes.count
    return processes.broadcast("float32" if emulated and size_bytes < room else None)


def _evaluate(
    side: tuple[Checkpoint, EvalText],
    reference: ModelReference,
    options: Evaluation,
    listener: Listener,
    processes: Processes,
    first: FirstModel | None,
    is_first: bool,
    tasks: Tasks | None,
) -> EvalResult:
    """Load a model and evaluate it."""
    checkpoint, text = side
    device = own_device(reference.device, processes)
    with scratch_folder() as folder:
        listener.stage(f"Loading {checkpoint.source}", 1)
        model = load_model(checkpoint, device, reference.dtype, folder)
        listener.advance(1)
        answers: tuple[TaskResult, ...] = ()
        if tasks is not None and processes.is_first:  # before anything of the model goes
            asked = model, load_tokenizer(checkpoint)
            answers = ask(checkpoint.source, *asked, tasks, options.limit, options.batch_size, listener)
        batch = options.batch_size or min(processes.gather(_batch_size(model, text.windows)))
        listener.stage(f"Evaluating {checkpoint.source}", len(processes.share(text.windows, batch)))
        tell = partial(_tell, listener)
        final = evaluate_perplexity(model, text.windows, batch, tell, processes, first, is_first)
        nats = final.mean_nll * text.windows[:, 1:].numel()
        if len(text.tail) > 1:
            more = evaluate_perplexity(model, text.tail[None], 1, lambda state: None, processes)
            nats += more.mean_nll * (len(text.tail) - 1)
        peak = max(processes.gather(peak_memory_bytes(model)))
        dtype = str(model.dtype).removeprefix("torch.")
        result = _eval_result(checkpoint, final, text, bits_per_byte(nats, text.bytes), peak, dtype)
        return replace(result, tasks=answers)


def _batch_size(model: PreTrainedModel, windows: torch.Tensor) -> int:
    """How many windows are evaluated at a time; one on the CPU, which several make no faster."""
    on_accelerator = any(parameter.device.type in ("cuda", "mps") for parameter in model.parameters())
    return largest_batch(model, windows) if on_accelerator else 1


def _tell(listener: Listener, state: RunningPerplexity) -> None:
    shown = f"{state.perplexity:,.2f}" if state.perplexity < 1e9 else f"{state.perplexity:.3g}"
    listener.stand_at(
        state.windows_done, f"perplexity {shown}, {state.tokens / max(state.seconds, 1e-9):,.0f} tokens/s"
    )


def _window_tokens(checkpoint: Checkpoint, options: Evaluation, listener: Listener) -> int:
    longest = longest_text(checkpoint)
    if options.max_seq_len is None:
        window = longest or FALLBACK_WINDOW
        if window > LONG_WINDOW:
            listener.warn(f"Windows have the model's maximum of {window} tokens. --max-seq-len makes them shorter.")
        return int(window)
    if longest and options.max_seq_len > longest:
        if _learns_positions(checkpoint, longest):
            raise CheckpointError(
                f"{checkpoint.source} has {longest} learned positions, too few for windows of {options.max_seq_len} "
                f"tokens. Give --max-seq-len {longest}."
            )
        listener.warn(f"--max-seq-len {options.max_seq_len} is more than the model's maximum of {longest} positions.")
    return options.max_seq_len


def _learns_positions(checkpoint: Checkpoint, longest: int) -> bool:
    """Whether a position beyond the last is not computed, but looked up in a table that has no row for it."""
    tables = (
        own.shape[0] for own in checkpoint.entries if own.shape and ("wpe." in own.name or "position" in own.name)
    )
    return any(0 <= rows - longest <= POSITIONS_AHEAD for rows in tables)


def _eval_result(
    checkpoint: Checkpoint, state: RunningPerplexity, text: EvalText, bits: float, peak: int, dtype: str
) -> EvalResult:
    entries = (*checkpoint.entries, *checkpoint.surroundings)
    return EvalResult(
        model=checkpoint.source,
        perplexity=state.perplexity,
        mean_nll=state.mean_nll,
        bits_per_byte=bits,
        bytes=text.bytes,
        same_tokens=True,
        kl=state.kl,
        windows=state.windows,
        tokens=state.tokens + len(text.tail),
        max_seq_len=text.windows.shape[1],
        seconds=state.seconds,
        tokens_per_second=state.tokens / max(state.seconds, 1e-9),
        peak_memory_bytes=peak,
        parameters=sum(entry.numel for entry in entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
        dtype=dtype,
    )
