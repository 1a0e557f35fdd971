"""Calibration text: windows to fit on, and others to judge by."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.options import Text
from llmprune_cli.run.corpus import Corpus, cut_windows, load_corpus
from llmprune_cli.text.names import PYTHON_DOCS, SELF, WIKITEXT2, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

Writer: TypeAlias = "Callable[[int], Corpus]"  # a text of so many tokens, that a model writes itself
HELD_OUT_SHARE = 8  # one window in so many is held out, one at least
JUDGED_TOKENS = 16_384  # that are predicted of further text, on which the result is judged, where there are as many


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens, drawn from all over a corpus."""

    corpus: Corpus
    fitted: torch.Tensor  # token ids, [N, T]
    held_out: torch.Tensor  # token ids, [M, T]; no statistic sees them, but candidates are chosen by them
    judged: torch.Tensor  # token ids, [K, T]; nothing sees them before the result; empty where no text is left

    @property
    def without_corpus(self) -> CalibrationText:
        """The windows, without the text from which they were drawn."""
        return replace(self, corpus=replace(self.corpus, text=""))


def prepare_calibration(
    options: Text,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    longest: int | None,
    seed: int,
    warn: Callable[[str], None],
    write: Writer | None = None,
) -> CalibrationText:
    """Draw windows from a corpus: as many as asked for, or as there are.

    Args:
        vocabulary: token ids that the model knows.
        longest: tokens that the model can attend to, if it says so.
        write: see `load_calibration`.

    Raises:
        CheckpointError: no such text, less than two windows of it, or a tokenizer of another model.
    """
    parts = load_calibration(options, tokenizer, warn, write, tokens_to_write(options))
    length = min(options.calibration_seq_len, longest or options.calibration_seq_len)
    if options.calibration_tokens < length:
        warn(
            f"--calibration-tokens {options.calibration_tokens} is less than one window of {length}, so one window is "
            "fitted on. --calibration-seq-len makes windows shorter."
        )
    wanted = max(1, options.calibration_tokens // length)
    drawn = []
    for corpus, share in parts:
        windows = cut_windows(corpus, tokenizer, vocabulary, length, None)
        drawn.append(_drawn(corpus, windows, max(1, round(wanted * share)), share, seed, warn))
    corpus = together(options.calibration, [corpus for corpus, _ in parts])
    return CalibrationText(corpus, *(mixed([*own]) for own in zip(*drawn, strict=True)))


def _drawn(
    corpus: Corpus, windows: torch.Tensor, wanted: int, share: float, seed: int, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows to fit on, to choose by and to judge by; the last are the same, however many the others are.

    Args:
        windows: token ids, [N, T].
        wanted: windows to fit on.
        share: of the tokens to judge by that is of this corpus.
    """
    length = windows.shape[1]
    if len(windows) < 2:
        raise CheckpointError(
            f"{corpus.origin} gives one window of {length} tokens; calibration needs two. Give more text or a smaller "
            "--calibration-seq-len."
        )
    held_out = max(1, min(wanted // HELD_OUT_SHARE, len(windows) // 2))
    fitted = min(wanted, len(windows) - held_out)
    if fitted < wanted:
        warn(f"{corpus.origin} has {fitted * length:,} tokens to calibrate on instead of {wanted * length:,}.")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    left = len(windows) - fitted - held_out
    judged = min(left, max(1, math.ceil(share * JUDGED_TOKENS / (length - 1))))
    places = (order[:fitted], order[fitted : fitted + held_out], order[len(windows) - judged :])
    drawn, chosen_by, judged_by = (windows[place.sort().values] for place in places)
    return drawn, chosen_by, judged_by


def mixed(windows: list[torch.Tensor]) -> torch.Tensor:
    """The windows of several texts spread over each other, so that any run of them has something of all."""
    if len(windows) == 1:
        return windows[0]
    places = torch.cat([(torch.arange(len(own)) + 0.5) / len(own) for own in windows])
    return torch.cat(windows)[places.sort(stable=True).indices]


def together(name: str | None, corpora: list[Corpus]) -> Corpus:
    """Several texts as one."""
    if len(corpora) == 1:
        return corpora[0]
    texts, origins = ("\n\n".join(c.text for c in corpora), ", ".join(c.origin for c in corpora))
    return Corpus(name or "", texts, origins)


def windows_of(
    parts: list[tuple[Corpus, float]], tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int
) -> torch.Tensor:
    """Windows [N, T] of several texts, of each as large a share as is asked for, and as many as that allows."""
    cut = [cut_windows(corpus, tokenizer, vocabulary, length, None) for corpus, _ in parts]
    total = min(len(own) / share for own, (_, share) in zip(cut, parts, strict=True))
    return mixed([own[: max(1, int(total * share))] for own, (_, share) in zip(cut, parts, strict=True)])


def spread_windows(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many of the windows [N, T] that they have at most as many tokens (one at least), from all over them."""
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def windows_apart(windows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The windows [N, T] that are none of others, [M, T]; all of them where that would leave none."""
    is_other = torch.zeros(len(windows), dtype=torch.bool)
    for other in others:
        is_other |= (windows == other).all(1)
    return windows if bool(is_other.all()) else windows[~is_other]


def warn_of_shared_text(calibration: Corpus, evaluated: Corpus, warn: Callable[[str], None]) -> None:
    """Warn where one text is a part of the other: perplexity then tells how well it was fitted."""
    shorter, longer = sorted((calibration.text, evaluated.text), key=len)
    if shorter in longer:
        warn(
            f"The text that is evaluated ({evaluated.origin}) is the one that was calibrated on, so its perplexity "
            "flatters the pruned model. Give another --split or --dataset, or another --calibration."
        )


def tokens_to_write(options: Text) -> int:
    """How many a model has to write itself to be calibrated on, to choose by, and to be judged by."""
    windows = options.calibration_tokens * (HELD_OUT_SHARE + 1) // HELD_OUT_SHARE + 2 * options.calibration_seq_len
    return windows + JUDGED_TOKENS


def load_calibration(
    options: Text,
    tokenizer: PreTrainedTokenizerBase,
    warn: Callable[[str], None],
    write: Writer | None = None,
    tokens: int = 0,
) -> list[tuple[Corpus, float]]:
    """The texts asked for, each with its share of the tokens; by default WikiText-2, or else Python's documentation.

    Args:
        write: what makes the model write text itself.
        tokens: that it is to write, if that is all that is asked for.

    Raises:
        CheckpointError: see `load_corpus`.
    """
    split = options.calibration_split
    if options.calibration is not None:
        parts = parts_of(options.calibration)
        found = []
        for part in parts:
            if part.name == SELF and write is not None:
                corpus = write(math.ceil(tokens * part.share))
            else:
                corpus = load_corpus(part.name, split, options.text_column, tokenizer)
            found.append((corpus, part.share))
        return found
    try:
        return [(load_corpus(WIKITEXT2, split), 1.0)]
    except CheckpointError:
        if split != Text.calibration_split or "LLMPRUNE_WIKITEXT2" in os.environ:
            raise
        warn("WikiText-2 is out of reach; calibrating on Python's own documentation. --calibration names better text.")
        return [(load_corpus(PYTHON_DOCS, split), 1.0)]
