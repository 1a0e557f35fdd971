"""A teacher that knows more tokens than its student: what it predicts, in the student's tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.journal.keys import text_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = "The quick brown fox, né 1999, jumps over 13 lazy dogs: «Grüße», 你好!\n\n\tdef f(x): return x**2  # ok"
WHOLE = -1  # in the place of the piece that follows, where a token is spelled whole


@dataclass(frozen=True)
class TokenMap:
    """Which of a teacher's tokens are a student's, and what stands for the others."""

    numbers: torch.Tensor  # that the student's tokens have in the teacher's vocabulary, int64 [K]
    owners: torch.Tensor  # of each token of the teacher: the student's token that it is spelled with first, int64 [V];
    # K where there is none
    ways: Mapping[tuple[int, ...], slice]  # of `continued`, for each beginning of a token's spelling in the student's
    continued: torch.Tensor  # the teacher's tokens, and the pieces that follow there, or `WHOLE`; int64 [2, L]
    spellings: Sequence[tuple[int, ...]]  # of each token of the teacher in the student's; () where there is none

    @classmethod
    def of(cls, numbers: torch.Tensor, spellings: Sequence[tuple[int, ...]]) -> TokenMap:
        """From the numbers, and from how each of the teacher's tokens is spelled in the student's: (), if it is not."""
        ways: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, spelling in enumerate(spellings):
            for end, piece in enumerate((*spelling, WHOLE)[1:], start=1):
                ways[spelling[:end]].append((number, piece))
        ends = [*accumulate(len(own) for own in ways.values())]
        places = [slice(last - len(own), last) for last, own in zip(ends, ways.values(), strict=True)]
        owners = torch.tensor([spelling[0] if spelling else len(numbers) for spelling in spellings])
        continued = torch.tensor([*chain(*ways.values())], dtype=torch.long).view(-1, 2).T.contiguous()
        return cls(numbers, owners, dict(zip(ways, places, strict=True)), continued, spellings)

    def identity(self) -> str:
        """SHA-256 of all of it but `spellings`, which the rest follows from."""
        beginnings = torch.tensor([number for spelling in self.ways for number in (*spelling, WHOLE)])
        return text_identity(self.numbers, self.owners, beginnings, self.continued)

    def read(self, windows: torch.Tensor) -> torch.Tensor:
        """The teacher's numbers of token ids, of any shape."""
        return self.numbers.to(windows.device)[windows]

    def share_that_went(self, windows: torch.Tensor) -> float:
        """The share of tokens of windows [N, T] that the student lacks, as far as their spelling tells."""
        tokens, went = 0, 0
        for window in windows.tolist():
            place = 0
            while place < len(window):
                size = self._longest(window, place)
                tokens, went, place = tokens + 1, went + (size > 1), place + size
        return went / max(1, tokens)

    def _longest(self, window: list[int], place: int) -> int:
        """Pieces of the longest of the teacher's tokens that may begin at a place."""
        size, longest = 1, 1
        while ways := self.ways.get(tuple(window[place : place + size])):
            if bool((self.continued[1, ways] == WHOLE).any()):
                longest = size
            size += 1
            if place + size > len(window):
                break
        return longest

    def regroup(self, logs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the teacher's tokens, [n, V], as probabilities of the student's, [n, K].

        A token that the student lacks lends its probability to the piece that its text begins with there, since that is
        the next token of the same text: q(k) = Σ p(v) over all v that k begins.
        """
        size = len(self.numbers)
        owners = torch.full(logs.shape[-1:], size, device=logs.device)  # more rows than the tokenizer has tokens
        owners[: len(self.owners)] = self.owners.to(logs.device)
        sums = logs.new_zeros(len(logs), size + 1).index_add_(1, owners, logs.exp())[:, :size]
        return sums / sums.sum(-1, keepdim=True)


def map_tokens(
    pruned: tuple[Checkpoint, PreTrainedTokenizerBase], teacher: tuple[Checkpoint, PreTrainedTokenizerBase]
) -> TokenMap | None:
    """How the student's tokens are the teacher's; None where both number the same tokens alike.

    A token is taken to be spelled in every text as it is alone. A few are not, most of them with Unigram.

    Raises:
        CheckpointError: they are tokens of another tokenizer.
    """
    (model, own), (other, its) = pruned, teacher
    size, whole = (checkpoint.config.get_text_config().vocab_size for checkpoint in (model, other))
    known, all_known = _tokens_of(own, size), _tokens_of(its, whole)
    if known == all_known and size == whole and own(SAMPLE)["input_ids"] == its(SAMPLE)["input_ids"]:
        return None
    if not (size < whole and known.keys() < all_known.keys() and hasattr(own, "backend_tokenizer")):
        raise CheckpointError(
            f"{model.source} and {other.source} have different tokenizers, so that neither can learn what the other "
            "predicts. Give the --teacher that it was made from."
        )
    numbers = torch.zeros(size, dtype=torch.long)  # rows without a token are in no text
    for token, number in known.items():
        numbers[number] = all_known[token]
    spellings: list[tuple[int, ...]] = [()] * (1 + max(all_known.values()))
    for token, number in all_known.items():
        spellings[number] = (known[token],) if token in known else _spelling(own, token)
    return TokenMap.of(numbers, spellings)


def _tokens_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """Its tokens that have rows, by number, but for the names that a GGUF file gives to rows which no token has."""
    known = {token: number for token, number in tokenizer.get_vocab().items() if number < rows}
    return {token: number for token, number in known.items() if token != f"[PAD{number}]"}


def _spelling(tokenizer: PreTrainedTokenizerBase, token: str) -> tuple[int, ...]:
    return tuple(int(piece.id) for piece in tokenizer.backend_tokenizer.model.tokenize(token))
