"""A text in the tokens of a model, and which part of the text is whose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

UNKNOWN = (-1, -1, -1)  # the part of a window whose tokenizer does not tell where its tokens are from


@dataclass(frozen=True)
class Reading:
    """A text in the tokens of a tokenizer.

    The part of a window is where its text begins, where that of its second token begins, and where its text ends, in
    characters.
    """

    text: str
    tokens: torch.Tensor  # token ids, [L]
    tokenizer: PreTrainedTokenizerBase
    encoding: BatchEncoding

    def parts(self, length: int, windows: torch.Tensor, begin: int) -> torch.Tensor:
        """The parts, [N, 3], of windows of so many tokens, given by their numbers, [N].

        Args:
            begin: the character at which this text begins in the one that the parts are of.
        """
        found = [self.part(number * length, (number + 1) * length) for number in windows.tolist()]
        parts = torch.tensor(found, dtype=torch.long).view(-1, 3)
        return torch.where(parts < 0, parts, parts + begin)

    def part(self, first: int, end: int) -> tuple[int, int, int]:
        """The part of the tokens from one to before another."""
        if not self.encoding.is_fast:
            return UNKNOWN
        return self._start(first), self._start(min(first + 1, end)), self._start(end)

    def characters(self, count: int) -> int:
        """How many characters of the text so many of its first tokens are."""
        if self.encoding.is_fast:
            return self._start(count)
        return len(spelled(self.tokenizer, self.tokens[:count]).removeprefix(self.tokenizer.bos_token or ""))

    def predicted_bytes(self, ends: Iterable[int]) -> int:
        """UTF-8 bytes of text in all but the first token of each window; the windows end before these tokens."""
        edges = list(pairwise((0, *ends)))
        parts = [self.part(first, end) for first, end in edges]
        return predicted_bytes(self.text, self.tokenizer, [self.tokens[a:b] for a, b in edges], parts)

    def _start(self, number: int) -> int:
        """The character at which the text of a token begins, which is where that of the one before ends.

        A character of several tokens is the last one's, and one of none, such as a space, is the next one's.
        """
        before = next((end for _, end in map(self._span, range(number - 1, -1, -1)) if end), 0)
        start, end = self._span(number) if number < len(self.tokens) else (before, before)
        return min(start, before) if end > start else before

    def _span(self, number: int) -> tuple[int, int]:
        """The characters that a tokenizer makes a token of; none of a special one, which no text has."""
        start, end = self.encoding.token_to_chars(number) or (0, 0)
        return start, end


def read(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True) -> Reading:
    """Tokenize a text."""
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return Reading(text, torch.tensor(encoding["input_ids"], dtype=torch.long), tokenizer, encoding)


def predicted_bytes(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    windows: Iterable[torch.Tensor],
    parts: Iterable[Sequence[int]],
) -> int:
    """UTF-8 bytes of a text in the tokens of windows, [T] each, that are predicted: in all but the first.

    Args:
        parts: of the windows, see `Reading`; where a tokenizer tells none, what the tokens spell is counted.
    """
    total = 0
    for window, (first, second, end) in zip(windows, parts, strict=True):
        total += _size(text[second:end]) if first >= 0 else spelled_bytes(tokenizer, window)
    return total


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, window: torch.Tensor) -> int:
    """The same of a window, [T], whose text nobody has: of what its tokens spell."""
    return _size(spelled(tokenizer, window)) - _size(spelled(tokenizer, window[:1]))


def window_text(text: str, tokenizer: PreTrainedTokenizerBase, window: torch.Tensor, part: Sequence[int]) -> str:
    """The text of a window, [T], after the start token that it may begin with."""
    first, _, end = part
    if first < 0:
        return spelled(tokenizer, window)
    begins = int(window[0]) == tokenizer.bos_token_id and first == part[1]
    return (spelled(tokenizer, window[:1]) if begins else "") + text[first:end]


def spelled(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    """The text of token ids, [T], special ones included."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))
