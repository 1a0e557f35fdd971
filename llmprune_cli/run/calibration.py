"""Calibration text: windows to fit on, and others to judge by."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.options import Text
from llmprune_cli.run.corpus import PYTHON_DOCS, Corpus, cut_windows, load_corpus

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 8  # one window in so many is held out, one at least


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens, drawn from all over a corpus."""

    corpus: Corpus
    fitted: torch.Tensor  # token ids, [N, T]
    held_out: torch.Tensor  # token ids, [M, T]; no statistic sees them

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
) -> CalibrationText:
    """Draw windows from a corpus: as many as asked for, or as there are.

    Args:
        vocabulary: token ids that the model knows.
        longest: tokens that the model can attend to, if it says so.

    Raises:
        CheckpointError: no such text, less than two windows of it, or a tokenizer of another model.
    """
    corpus = load_calibration(options, warn)
    length = min(options.calibration_seq_len, longest or options.calibration_seq_len)
    windows = cut_windows(corpus, tokenizer, vocabulary, length, None)
    if len(windows) < 2:
        raise CheckpointError(
            f"{corpus.origin} gives one window of {length} tokens; calibration needs two. Give more text or a smaller "
            "--calibration-seq-len."
        )
    wanted = max(1, options.calibration_tokens // length)
    held_out = max(1, min(wanted // HELD_OUT_SHARE, len(windows) // 2))
    fitted = min(wanted, len(windows) - held_out)
    if fitted < wanted:
        warn(
            f"{corpus.origin} has {fitted * length:,} tokens to calibrate on instead of {options.calibration_tokens:,}."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    drawn, judged = order[:fitted].sort().values, order[fitted : fitted + held_out].sort().values
    return CalibrationText(corpus, windows[drawn], windows[judged])


def spread_windows(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many of the windows [N, T] that they have at most as many tokens (one at least), from all over them."""
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def warn_of_shared_text(calibration: Corpus, evaluated: Corpus, warn: Callable[[str], None]) -> None:
    """Warn where one text is a part of the other: perplexity then tells how well it was fitted."""
    shorter, longer = sorted((calibration.text, evaluated.text), key=len)
    if shorter in longer:
        warn(
            f"The text that is evaluated ({evaluated.origin}) is the one that was calibrated on, so its perplexity "
            "flatters the pruned model. Give another --split or --dataset, or another --calibration."
        )


def load_calibration(options: Text, warn: Callable[[str], None]) -> Corpus:
    """The text to calibrate on, by default WikiText-2, or else Python's documentation.

    Raises:
        CheckpointError: there is no such text.
    """
    if options.calibration is not None:
        return load_corpus(options.calibration, options.calibration_split)
    try:
        return load_corpus("wikitext2", options.calibration_split)
    except CheckpointError:
        if options.calibration_split != Text.calibration_split or "LLMPRUNE_WIKITEXT2" in os.environ:
            raise
        warn("WikiText-2 is out of reach; calibrating on Python's own documentation. --calibration names better text.")
        return load_corpus(PYTHON_DOCS, options.calibration_split)
