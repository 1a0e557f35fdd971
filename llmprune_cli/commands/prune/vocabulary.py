"""What `prune` decides about tokens: how many stay, and which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.apply.vocabulary.proof import unproven_rows
from llmprune_cli.apply.vocabulary.rows import cut_entries
from llmprune_cli.choose.selection import judged_windows
from llmprune_cli.choose.targets.limits import Limit, SizeLimit, measure_size, whole_target
from llmprune_cli.choose.targets.vocabulary import SizedVocabulary, sizes_to_try
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import LlmpruneError, PlanError, UsageError, first_line
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.keys import statistics_key, text_identity
from llmprune_cli.plan.document import Plan, Vocabulary
from llmprune_cli.processes import ALONE
from llmprune_cli.progress import LOGGER
from llmprune_cli.run.calibration import Writer, load_calibration
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.tokenizer import model_reader, vocabulary_files
from llmprune_cli.text.conversations import Speller
from llmprune_cli.text.corpus import Corpus
from llmprune_cli.text.names import parts_of
from llmprune_cli.text.windows import cut_windows, windows_apart
from llmprune_cli.vocabulary.choice import check_size, choose_tokens, rank_tokens
from llmprune_cli.vocabulary.figures import VocabularySummary
from llmprune_cli.vocabulary.request import AUTO, KEEP, VocabularyRequest, resolve_size
from llmprune_cli.vocabulary.rewriting import cut_tokens
from llmprune_cli.vocabulary.size import (
    VocabularyWidth,
    find_width,
    one_of_each_kind,
    rows_weight,
    vocabulary_axes,
)
from llmprune_cli.vocabulary.told import Told, tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_SHARE = 0.1  # of the parameters that rows of tokens are, for a target to be spent on them


@dataclass(frozen=True)
class TokenText:
    """The text by whose use tokens stay."""

    parts: tuple[tuple[torch.Tensor, float], ...]  # windows of each, token ids, [N, T], and what it counts for
    tokens: int  # of it that the model is run on

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other text."""
        windows, shares = zip(*self.parts, strict=True)
        return {"vocabulary text": text_identity(*windows), "its shares": shares, "tokens ranked on": self.tokens}


@dataclass(frozen=True)
class DecidedVocabulary:
    """What is known of a vocabulary that shrinks, or may, before any text is read."""

    width: VocabularyWidth
    sizes: tuple[int, ...]  # that it may have, the largest first: one, or all that a search tries
    weight: tuple[int, int]  # parameters and bytes of the rows of all tokens, these as a target counts them
    text: TokenText | None = None  # by which tokens are ranked, once it is read

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides which tokens stay, beside the weights."""
        stays = hashlib.sha256(repr(sorted(self.width.stays)).encode()).hexdigest()
        own = {"vocab size": self.sizes, "tokens that must stay": stays, "tokenizer": self.width.tokens.identity}
        return own | self.text.identity if self.text is not None else own

    def spared(self, size: int) -> tuple[int, int]:
        """The parameters and bytes of the rows that go."""
        parameters, size_bytes = (count * (self.width.rows - size) // self.width.rows for count in self.weight)
        return parameters, size_bytes

    def cut(self, tensors: Sequence[TensorEntry], vocabulary: Vocabulary | None) -> tuple[TensorEntry, ...]:
        """The tensors with the rows of the tokens that stay, or, before these are chosen, with so many rows."""
        kept = vocabulary.kept if vocabulary is not None else range(self.sizes[0])
        return cut_entries(tensors, self.width.axes, kept)


def decide_vocabulary(
    request: PruneRequest, subject: Subject, plan: Plan | None, limit: Limit | None
) -> DecidedVocabulary | None:
    """The sizes that are asked for, where the tokenizer and the family can have fewer tokens; None where all stay.

    Args:
        limit: what the widths of a target must not exceed.

    Raises:
        PlanError, UnsupportedError: they cannot.
        UsageError: what else is asked for does not go with it.
    """
    asked, checkpoint = request.vocabulary, subject.checkpoint
    stored = plan.vocabulary if plan is not None else None
    is_searched = asked.vocab_size == AUTO or (asked.vocab_size is None and asked.vocab_text is not None)
    if stored is None and asked.number is None and not is_searched:
        return None
    request.check_tokens_may_go()
    rows = int(checkpoint.config.vocab_size)
    if stored is not None and stored.before != rows:
        raise PlanError(f"The plan is for {stored.before:,} tokens, and the model has {rows:,}. Make the plan anew.")
    width = find_width(checkpoint, subject.architecture, asked.keep_tokens)
    weight = _weigh_rows(request, subject, width.axes)
    if stored is not None:
        if stored.tokenizer != width.tokens.identity:
            raise PlanError("The plan's tokens are those of another tokenizer. Make the plan anew.")
        cut_tokens(width.tokens, stored.kept)
        sizes: tuple[int, ...] = (len(stored.kept),)
    elif asked.number is not None:
        sizes = (resolve_size(asked.number, rows),)
    else:
        assert isinstance(limit, SizeLimit)
        share = weight[0] / measure_size(subject, whole_target(subject))[0]
        if asked.vocab_size != AUTO and share < LEAST_SHARE:
            LOGGER.warning(
                f"Rows of tokens are {100 * share:.1f}% of the parameters, so all stay but with --vocab auto."
            )
            return None
        sizes = sizes_to_try(rows, width.least, limit.share_of(weight))
        if sizes == (rows,):
            LOGGER.warning(f"All {rows:,} tokens stay, as {len(width.stays):,} of them must.")
            return None
    check_size(width.stays, sizes[-1])
    return DecidedVocabulary(width, sizes, weight)


def _weigh_rows(request: PruneRequest, subject: Subject, axes: dict[str, int]) -> tuple[int, int]:
    """See `DecidedVocabulary.weight`."""
    from llmprune_cli.formats.gguf.writing import weights_bytes

    budget, checkpoint = request.choice.budget, subject.checkpoint
    parameters, size_bytes = rows_weight(checkpoint.entries, axes)
    if budget is not None and budget.dtype is not None:
        rows = [entry for entry in checkpoint.entries if entry.name in axes]
        both = (weights_bytes(some, checkpoint.config, budget.dtype) for some in (rows, ()))
        size_bytes = next(both) - next(both)  # without what any file has
    return parameters, size_bytes


def read_token_text(request: PruneRequest, rows: int, bench: Workbench, write: Writer) -> TokenText:
    """The text by whose use tokens stay, without the windows by which the result is judged.

    Args:
        write: see `load_calibration`.
    """
    checkpoint = bench.model.checkpoint
    reader = replace(model_reader(checkpoint), vocabulary=rows)
    length = min(request.text.calibration_seq_len, reader.longest or request.text.calibration_seq_len)
    parts = []
    for corpus, share in _corpora(request, bench, reader.tokenizer, write):
        windows = cut_windows(corpus, reader, length, None)
        if bench.text is not None and length == bench.text.judged.shape[1]:
            windows = windows_apart(windows, torch.cat((bench.text.judged, bench.text.held_out)))
        parts.append((windows, share))
    return TokenText(tuple(parts), request.text.calibration_tokens)


def _corpora(
    request: PruneRequest, bench: Workbench, tokenizer: PreTrainedTokenizerBase, write: Writer
) -> Sequence[tuple[Corpus, float]]:
    """The texts with their shares; the calibration text, where it is one, is there already."""
    own, calibration = request.vocabulary.vocab_text, request.text.calibration
    if own is None and bench.text is not None and len(parts_of(bench.text.corpus.name)) == 1:
        return [(bench.text.corpus, 1.0)]
    text = replace(request.text, calibration=own or calibration)
    return load_calibration(text, Speller(tokenizer), bench.listener.warn, write, request.text.calibration_tokens)


def rank_vocabularies(decided: DecidedVocabulary | None, bench: Workbench) -> tuple[SizedVocabulary, ...]:
    """The vocabularies of the sizes that are asked for, as the first process ranks tokens."""
    if decided is None:
        return ()
    processes, text = bench.model.processes, bench.text
    found = None
    if processes.is_first:
        width = decided.width
        scores = _rank(decided, bench)
        kept = [choose_tokens(width.tokens, scores, width.stays, size) for size in decided.sizes]
        told: Sequence[Told | None] = [None] * len(kept)
        if text is not None and len(kept) > 1:
            told = tell(width.tokens, kept, text.held_out[: judged_windows(text)])
        found = [
            SizedVocabulary(Vocabulary(width.rows, own, width.tokens.identity), decided.spared(len(own)), said)
            for own, said in zip(kept, told, strict=True)
        ]
    found = processes.broadcast(found)
    assert found is not None
    return tuple(found)


def _rank(decided: DecidedVocabulary, bench: Workbench) -> torch.Tensor:
    """See `rank_tokens`; what this run or another has measured already is not measured anew."""
    text, model, journal = decided.text, bench.model, replace(bench.journal, processes=ALONE)
    assert text is not None

    def measure() -> list[float]:
        bench.listener.stage("Ranking tokens", model.layers)
        scores = rank_tokens(model, text.parts, text.tokens, decided.width.rows, bench.listener.advance)
        return [float(score) for score in scores]

    if not journal.remembers_measurements:
        found = measure()
    else:
        windows = torch.cat([windows for windows, _ in text.parts])
        key = statistics_key(model.checkpoint, "tokens", windows, model.device, model.compute)
        found = journal.recall_measured({**key, **text.identity}, Json(list[float]), measure)
    return torch.tensor(found, dtype=torch.float64)


def warn_of_lost_tokens(plan: Plan, decided: DecidedVocabulary | None, bench: Workbench) -> None:
    """Say what a smaller vocabulary costs."""
    if plan.vocabulary is None or not bench.model.processes.is_first:
        return
    if decided is not None and decided.width.tokens.rowless:
        bench.listener.warn(
            f"{', '.join(decided.width.tokens.rowless)} left out of the tokenizer: the model has "
            f"{plan.vocabulary.before:,} rows, and none for such a number."
        )
    companions, kept = bench.model.checkpoint.companions, len(plan.vocabulary.kept)
    left_out = [path.name for path in vocabulary_files(companions)]
    if left_out:
        bench.listener.warn(f"{', '.join(left_out)} left out: tokenizer.json says what stays of it.")
    bench.listener.warn(
        f"{kept:,} of {plan.vocabulary.before:,} tokens stay, so text that uses others gets more of them."
    )


def summarize_vocabulary(
    subject: Subject, keep_file: Path | None = None, least_share: float = 0.0
) -> VocabularySummary:
    """What a model's tokens weigh, and how many of them must stay, where the twin proves that others can go.

    Args:
        keep_file: names tokens that stay.
        least_share: of the parameters; where rows of tokens are less, only their weight is found out.

    Raises:
        UsageError: see `must_stay`.
    """
    checkpoint, architecture, axes = subject.checkpoint, subject.architecture, {}
    try:
        axes = vocabulary_axes(one_of_each_kind(architecture))
        weighed = _summary(subject, int(architecture.config.vocab_size), axes, None, "")
        if weighed.share < least_share:
            return weighed
        width = find_width(checkpoint, architecture, keep_file)
    except UsageError:
        raise
    except (LlmpruneError, ValueError) as error:  # as configurations refuse what they are asked for
        return _summary(subject, int(architecture.config.vocab_size), axes, None, first_line(error).rstrip("."))
    found = summary_of(subject, width)
    return replace(found, refused=unproven_rows(subject)) if not found.refused else found


def summary_of(subject: Subject, width: VocabularyWidth) -> VocabularySummary:
    """The same of a vocabulary that is known."""
    stays = len(width.stays)
    refused = f"{stays:,} of {width.rows:,} tokens must stay" if width.least >= width.rows else ""
    return _summary(subject, width.rows, width.axes, stays, refused)


def _summary(subject: Subject, rows: int, axes: dict[str, int], stays: int | None, refused: str) -> VocabularySummary:
    weight, _ = rows_weight(subject.checkpoint.entries, axes)
    whole = sum(entry.numel for entry in (*subject.checkpoint.entries, *subject.surroundings))
    return VocabularySummary(rows, None, stays, weight, weight / whole, refused)


def told_of_tokens(
    request: PruneRequest, subject: Subject, decided: DecidedVocabulary | None, plan: Plan | None
) -> VocabularySummary | None:
    """What is said of tokens: how many stay, and of a target what it could have taken from them; else nothing."""
    if decided is not None:
        stays = decided.sizes[0] if plan is None else len(plan.vocabulary.kept) if plan.vocabulary is not None else None
        return replace(summary_of(subject, decided.width), after=stays if stays != decided.width.rows else None)
    budget = request.choice.budget
    if budget is None or budget.kind == "speedup" or request.vocabulary.vocab_size == KEEP:
        return None
    found = summarize_vocabulary(subject, least_share=LEAST_SHARE)
    return found if found.share >= LEAST_SHARE and not found.refused else None


def cut_to(
    subject: Subject, asked: VocabularyRequest, tensors: Sequence[TensorEntry]
) -> tuple[tuple[TensorEntry, ...], int]:
    """Tensors with as many rows as are asked for, and how many these are.

    Raises:
        PlanError, UnsupportedError: the tokenizer and the family cannot have so few tokens.
    """
    width = find_width(subject.checkpoint, subject.architecture, asked.keep_tokens)
    size = resolve_size(asked.number or "", width.rows)
    check_size(width.stays, size)
    return cut_entries(tensors, width.axes, range(size)), size
