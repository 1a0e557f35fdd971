"""Text becomes tokens, and these become windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.text.corpus import Corpus
from llmprune_cli.text.reading import Reading, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reader:
    """How a model reads text."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # token ids that it knows
    longest: int | None = None  # tokens that it can attend to, if it says so


def cut_windows(corpus: Corpus, reader: Reader, window_tokens: int, limit: int | None) -> torch.Tensor:
    """Tokenize once, with the tokenizer's default special tokens, and cut; the tail is dropped.

    Returns:
        Token ids, [windows, window_tokens].

    Raises:
        CheckpointError: the text is shorter than one window, or the tokenizer is that of another model.
    """
    return windows_in(read_corpus(corpus, reader).tokens, window_tokens, limit, corpus.origin)


def fitting_length(asked: int, longest: int | None, default: int, warn: Callable[[str], None]) -> int:
    """Tokens in a window: as many as asked for, or as the model can attend to.

    Args:
        longest: tokens that the model can attend to, if it says so.
        default: what nobody has asked for, and what is cut without a word.
    """
    if not longest or asked <= longest:
        return asked
    if asked != default:
        warn(f"Windows have {longest:,} tokens instead of {asked:,}: the model knows no more positions.")
    return longest


def windows_in(tokens: torch.Tensor, window_tokens: int, limit: int | None, origin: str) -> torch.Tensor:
    """Token ids [L] cut into windows, [windows, window_tokens]; the tail is dropped.

    Args:
        origin: of the text, for the message.

    Raises:
        CheckpointError: the text is shorter than one window.
    """
    windows = len(tokens) // window_tokens
    if windows == 0:
        raise CheckpointError(
            f"{origin} has {len(tokens)} tokens, less than one window of {window_tokens}. "
            "Give more text, or ask for shorter windows (--max-seq-len, --calibration-seq-len, --seq-len)."
        )
    kept = windows if limit is None else min(limit, windows)
    return tokens[: kept * window_tokens].view(kept, window_tokens)


def read_corpus(corpus: Corpus, reader: Reader) -> Reading:
    """A corpus in the tokens of a model, with the tokenizer's default special tokens.

    Raises:
        CheckpointError: the tokenizer is that of another model.
    """
    found = read(corpus.text, reader.tokenizer)
    if len(found.tokens) and int(found.tokens.max()) >= reader.vocabulary:
        raise CheckpointError(
            f"The tokenizer gives token {int(found.tokens.max())}, but the model knows {reader.vocabulary} tokens, so "
            "it is the tokenizer of another model. Put the right one beside the weights."
        )
    return found


def mixed(windows: list[torch.Tensor]) -> torch.Tensor:
    """What belongs to the windows of several texts, [N, ...] each, so mixed that any run of it has something of all."""
    if len(windows) == 1:
        return windows[0]
    places = torch.cat([(torch.arange(len(own)) + 0.5) / len(own) for own in windows])
    return torch.cat(windows)[places.sort(stable=True).indices]


def spread_windows(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many of the windows [N, T] that they have at most as many tokens (one at least), from all over them."""
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def windows_apart(windows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The windows [N, T] that are none of others, [M, T]; all of them where that would leave none."""
    return windows[are_apart(windows, others)]


def are_apart(windows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which windows [N, T] are none of others, [M, T]: [N] of bool; all of them where that would leave none."""
    is_other = torch.zeros(len(windows), dtype=torch.bool)
    for other in others:
        is_other |= (windows == other).all(1)
    return ~is_other | is_other.all()


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, T] that end together, and which of them count."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[own[0]] * (longest - len(own)) + own for own in prompts])
    mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts])
    return ids, mask
