"""A text in the tokens of a model, and which part of the text is whose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
        return self._edges[first], self._edges[min(first + 1, end)], self._edges[end]

    def characters(self, count: int) -> int:
        """How many characters of the text so many of its first tokens are."""
        if self.encoding.is_fast:
            return self._edges[count]
        return len(spelled(self.tokenizer, self.tokens[:count]).removeprefix(self.tokenizer.bos_token or ""))

    def predicted_bytes(self, ends: Iterable[int]) -> int:
        """UTF-8 bytes of text in all but the first token of each window; the windows end before these tokens."""
        edges = list(pairwise((0, *ends)))
        parts = [self.part(first, end) for first, end in edges]
        return predicted_bytes(self.text, self.tokenizer, [self.tokens[a:b] for a, b in edges], parts)

    def sizes(self) -> torch.Tensor | None:
        """UTF-8 bytes of the text of each token, [L]; None where the tokenizer does not tell."""
        if not self.encoding.is_fast:
            return None
        sizes = [_size(self.text[begin:end]) for begin, end in pairwise(self._edges)]
        return torch.tensor(sizes, dtype=torch.long)

    def within(self, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Which tokens have a character of some ranges of the text, which follow each other, [L] of bool.

        A token of spaces of which a tokenizer says but where they end is where the last one is.
        """
        begins, ends = torch.tensor(ranges, dtype=torch.long).view(-1, 2).T.contiguous()
        first, last = torch.tensor(self._spans, dtype=torch.long).view(-1, 2).T
        is_there = last > first
        at = torch.searchsorted(ends, first + is_there.long())  # the first range that does not end before
        return torch.cat((begins, torch.tensor([len(self.text)])))[at].lt(last)

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """The characters that a tokenizer makes its tokens of; none, (0, 0), of a special one that no text has."""
        spans: list[tuple[int, int]] = self.encoding[0].offsets
        return spans

    @cached_property
    def _edges(self) -> list[int]:
        """The characters at which the tokens' text begins, which is where that of those before ends, [L + 1].

        A character of several tokens is the last one's, and one of none, such as a space, is the next one's.
        """
        edges, before = list[int](), 0
        for start, end in self._spans:
            edges.append(min(start, before) if end > start else before)
            before = end or before
        return [*edges, before]


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
