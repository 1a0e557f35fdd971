"""The text of a healing: windows to learn from, in which order, and others to judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.heal import ON_ANSWERS
from llmprune_cli.heal.options import Healing
from llmprune_cli.heal.training_text.cutting import Cut, cut_texts
from llmprune_cli.options import Text
from llmprune_cli.run.calibration import SeenText, Writer, load_calibration, together
from llmprune_cli.text.conversations import Speller
from llmprune_cli.text.corpus import Corpus
from llmprune_cli.text.names import parts_of
from llmprune_cli.text.windows import Reader, are_apart, fitting_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 8  # one window in so many is held out, one at least
MOST_WRITTEN = 65536  # tokens that a teacher writes itself; they are repeated where more are asked for
MOST_HELD_OUT = 4096  # tokens that are, and that count,
MOST_READ = 4  # of which so many times as many are read, at most, where few count
LEAST_JUDGED = 256  # of an assistant's, fewer of which are said
BATCHES = 256  # optimizer steps by default, as long as a batch has neither too few tokens nor too many
LEAST_BATCH, MOST_BATCH = 1024, 65536  # tokens
TOGETHER, TOGETHER_ON_CPU = 4096, 1024  # tokens that run together: their activations lie in memory
STEPS_BETWEEN = 16  # judgements, at least
MOST_JUDGEMENTS = 8


@dataclass(frozen=True)
class Schedule:
    """How text is cut into steps."""

    together: int  # windows that a process runs at a time
    accumulated: int  # such batches of each process in a step
    steps: int  # of the optimizer; a multiple of `between`
    between: int  # steps from one judgement to the next


@dataclass(frozen=True)
class _Drawn:
    """Numbers of windows."""

    judged: torch.Tensor  # [M]
    trained: torch.Tensor  # each once, [K]
    order: torch.Tensor  # places among these, as they are learned from, [S]


@dataclass(frozen=True)
class TrainingText:
    """Windows of tokens, drawn from all over a corpus."""

    corpus: Corpus
    windows: torch.Tensor  # token ids, [N, T]; each is learned from at least once
    order: torch.Tensor  # numbers of windows, as they are learned from, [S]
    held_out: torch.Tensor  # token ids, [M, T]; nothing is learned from them
    held_out_bytes: int  # of UTF-8, of those of its tokens that are predicted
    schedule: Schedule
    learned: torch.Tensor | None = None  # which tokens but the first are learned from, [N, T−1] of bool; None: all
    held_out_judged: torch.Tensor | None = None  # the same of held-out windows and judging by them, [M, T−1]

    @property
    def trained_tokens(self) -> int:
        """Tokens that are learned from, each as often as it is."""
        return len(self.order) * self.windows.shape[1]

    @property
    def learned_share(self) -> float:
        """Of the tokens but the first of each window: those that are learned from, in the mean."""
        return 1.0 if self.learned is None else float(self.learned.float().mean(1)[self.order].mean())

    @property
    def judged_tokens(self) -> int:
        """Held-out tokens that are judged by."""
        judged = self.held_out_judged
        return self.held_out[:, 1:].numel() if judged is None else int(judged.sum())


def prepare_training(
    healing: Healing,
    reader: Reader,
    processes: int,
    most_together: int,
    warn: Callable[[str], None],
    write: Writer | None = None,
    before: tuple[SeenText, PreTrainedTokenizerBase] | None = None,
    apart: torch.Tensor | None = None,
) -> TrainingText:
    """Draw windows from a corpus, and repeat them where it has too few.

    Nothing that the pruned model was fitted on is held out as long as there is other text, and it is trained on last:
    on such text the pruned model looks better than it is.

    Args:
        processes, most_together: that share every batch, and how many tokens each runs at a time.
        write: what makes the teacher write text itself.
        before: what the pruned model was fitted on, and the tokenizer that read it, where that is known.
        apart: windows [K, T] that others judge by: they are neither trained on nor held out, as far as there is more.

    Raises:
        CheckpointError: no such text, less than a batch of it, or a tokenizer of another model.
    """
    options = Text(healing.text, healing.text_split, healing.text_column, calibration_seq_len=healing.seq_len)
    speller = Speller(reader.tokenizer, healing.loss_on == ON_ANSWERS)
    parts = load_calibration(options, speller, warn, write, min(healing.token_count, MOST_WRITTEN), "--text")
    corpus = together(healing.text, [own for own, _ in parts])
    length = fitting_length(healing.seq_len, reader.longest, Healing.seq_len, warn)
    cut = cut_texts(parts, reader, length, healing, before)
    if apart is not None and apart.shape[1] == length:
        cut = cut.only(_apart_from(cut.windows, apart, corpus, warn))
    present = torch.bincount(cut.part, minlength=len(parts)).tolist()
    _say_what_is_gone([own for own, _ in parts], present, warn)
    rates = cut.learned_shares(len(parts))
    each = zip(parts, rates, present, strict=True)
    shares = [share / rate if there else 0.0 for (_, share), rate, there in each]
    wanted = max(1, healing.token_count // length)
    scarce = sum(shares) / sum(share for _, share in parts)
    most = int(MOST_HELD_OUT * min(MOST_READ, max(1.0, scarce))) // length
    held_out = max(1, min(len(cut.windows), wanted, most * HELD_OUT_SHARE) // HELD_OUT_SHARE)
    held = _held_out(held_out, shares, present)
    batch = _batch(healing, length, (sum(present) - sum(held)) * length, corpus)
    schedule = _schedule(healing.token_count, batch, length, processes, most_together)
    count = schedule.steps * schedule.accumulated * schedule.together * processes
    generator = torch.Generator().manual_seed(healing.seed)
    left = zip(shares, present, held, strict=True)
    counts = _shared(count, [own if there > out else 0.0 for own, there, out in left])
    drawn = _draw([own for own, _ in parts], cut, held, counts, length, generator, warn)
    own, judged = cut.only(drawn.trained), cut.only(drawn.judged)
    held_bytes = judged.predicted_bytes(reader.tokenizer)
    text = TrainingText(corpus, own.windows, drawn.order, judged.windows, held_bytes, schedule)
    text = replace(text, learned=own.learned, held_out_judged=judged.learned)
    if judged.learned is not None and text.judged_tokens < LEAST_JUDGED:
        warn(f"{text.judged_tokens} held-out tokens are an assistant's, by which little can be told. Give more --text.")
    return text


def warn_of_learned_text(
    said: dict[str, Any] | None, corpus: Corpus, split: str, source: str, warn: Callable[[str], None]
) -> None:
    """Warn of a text that a model was healed on before, which may hold out then what is held out now, or may not.

    Args:
        said: of that healing, in the manifest.
        split: of the text, where it has several.
        source: the model.
    """
    before = SeenText.of({"seed": 0, **(said or {})})
    if before is not None and any(before.share_of(part.name, split) for part in parts_of(corpus.name)):
        warn(
            f"{source} was healed on {corpus.origin} before, and may have learned from what is held out of it now, so "
            "that figures on that flatter it. Give other --text, or judge it by `llmprune eval` on another text."
        )


def _draw(
    corpora: Sequence[Corpus],
    cut: Cut,
    held: Sequence[int],
    counts: Sequence[int],
    length: int,
    generator: torch.Generator,
    warn: Callable[[str], None],
) -> _Drawn:
    """Draw the windows of each text by itself: of a text that has too few for its share, windows come again.

    Args:
        held, counts: how many of each text are judged by, and learned from.
        length: tokens in a window.
    """
    judged, trained, order = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    before = 0  # windows of the texts before this one
    for number, (corpus, out, count) in enumerate(zip(corpora, held, counts, strict=True)):
        drawn = (cut.part == number).nonzero().flatten()
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
        drawn = torch.cat((drawn[~cut.is_known[drawn]], drawn[cut.is_known[drawn]]))
        judged.append(drawn[:out])
        if bool(cut.is_known[judged[-1]].any()):
            warn(
                f"The pruned model was fitted on nearly all of {corpus.origin}, so that held-out text flatters it. "
                "Give other --text."
            )
        own = drawn[out:][:count].sort().values
        if count > len(own):
            tokens = len(own) * length
            warn(
                f"{corpus.origin} has {tokens:,} tokens to train on, which are seen {count / len(own):.1f} times each."
            )
        rounds = [torch.randperm(len(own), generator=generator) for _ in range(-(-count // max(1, len(own))))]
        order.append(torch.cat(rounds)[:count] + before if count else own)
        trained.append(own)
        before += len(own)
    mixed = torch.cat(order)
    if len(order) > 1:
        mixed = mixed[torch.randperm(len(mixed), generator=generator)]
    return _Drawn(torch.cat(judged).sort().values, torch.cat(trained), mixed)


def _say_what_is_gone(corpora: Sequence[Corpus], present: Sequence[int], warn: Callable[[str], None]) -> None:
    """Warn of texts without a window that is left."""
    for corpus, there in zip(corpora, present, strict=True):
        if not there:
            warn(f"All of {corpus.origin} is judged on, so that others take its share. Give more of it.")


def _held_out(count: int, shares: Sequence[float], present: Sequence[int]) -> list[int]:
    """How many windows of each text are held out: as its share is, one at least and half of them at most."""
    each = zip(_shared(count, shares), shares, present, strict=True)
    held = [min(max(own, 1 if share else 0), there // 2) for own, share, there in each]
    if not any(held):
        held[present.index(max(present))] = 1
    return held


def _shared(count: int, shares: Sequence[float]) -> list[int]:
    """A number in parts that are as large as shares are."""
    edges = [round(count * own / sum(shares)) for own in accumulate(shares)] if any(shares) else [0] * len(shares)
    return [end - begin for begin, end in pairwise([0, *edges])]


def _apart_from(
    windows: torch.Tensor, judged: torch.Tensor, corpus: Corpus, warn: Callable[[str], None]
) -> torch.Tensor:
    """Which windows [N, T] are none of those that others judge by, [N] of bool; all, where they repeat these."""
    own = are_apart(windows, judged)
    if bool(own.all()) and bool((judged == windows[0]).all(1).any()):
        warn(f"{corpus.origin} repeats itself, so that what is judged on is trained on, too. Give more text.")
    return own


def _batch(healing: Healing, length: int, present: int, corpus: Corpus) -> int:
    """Tokens in a step.

    Args:
        present: tokens that there are to train on.

    Raises:
        CheckpointError: these are less than a batch.
    """
    batch = healing.batch_tokens or max(length, min(_default_batch(healing), present))
    if batch > present:
        raise CheckpointError(
            f"{corpus.origin} has {present:,} tokens to train on, less than a batch of {batch:,}. Give more text, or "
            "smaller --batch-tokens or --seq-len."
        )
    return batch


def _default_batch(healing: Healing) -> int:
    least = 1 if healing.mode == "blocks" else LEAST_BATCH  # a single layer gains more by more steps
    return min(max(healing.token_count // BATCHES, least), MOST_BATCH)


def tokens_together(device: str) -> int:
    """Tokens that a process runs at a time at most."""
    return TOGETHER_ON_CPU if device == "cpu" else TOGETHER


def _schedule(tokens: int, batch_tokens: int, length: int, processes: int, most_together: int) -> Schedule:
    """Steps of about so many tokens, of which some are judged."""
    own = -(-max(1, batch_tokens // length) // processes)
    most = max(1, most_together // length)
    least = -(-own // most)
    accumulated = min(range(least, 2 * least + 1), key=lambda count: abs(count * round(own / count) - own))
    together = max(1, round(own / accumulated))
    steps = max(1, round(tokens / (accumulated * together * processes * length)))
    judgements = max(1, min(MOST_JUDGEMENTS, steps // STEPS_BETWEEN))
    between = -(-steps // judgements)
    return Schedule(together, accumulated, between * judgements, between)
