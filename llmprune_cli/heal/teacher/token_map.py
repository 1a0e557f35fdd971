"""A teacher that knows more tokens than its student: what it predicts, in the student's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = "The quick brown fox, né 1999, jumps over 13 lazy dogs: «Grüße», 你好!\n\n\tdef f(x): return x**2  # ok"


@dataclass(frozen=True)
class TokenMap:
    """Which of a teacher's tokens are a student's, and what stands for the others."""

    numbers: torch.Tensor  # that the student's tokens have in the teacher's vocabulary, int64 [K]
    owners: torch.Tensor  # of each token of the teacher: the student's token that it is spelled with first, int64 [V];
    # K where there is none

    def read(self, windows: torch.Tensor) -> torch.Tensor:
        """The teacher's numbers of token ids, of any shape."""
        return self.numbers.to(windows.device)[windows]

    def regroup(self, logs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the teacher's tokens, [n, V], as those of the student's, [n, K].

        A token that the student lacks lends its probability to the piece that its text begins with there, since that is
        the next token of the same text: q(k) = Σ p(v) over all v that k begins.
        """
        size = len(self.numbers)
        owners = torch.full(logs.shape[-1:], size, device=logs.device)  # more rows than the tokenizer has tokens
        owners[: len(self.owners)] = self.owners.to(logs.device)
        sums = logs.new_zeros(len(logs), size + 1).index_add_(1, owners, logs.exp())[:, :size]
        return (sums / sums.sum(-1, keepdim=True)).clamp_min(torch.finfo(sums.dtype).tiny).log()


def map_tokens(
    pruned: tuple[Checkpoint, PreTrainedTokenizerBase], teacher: tuple[Checkpoint, PreTrainedTokenizerBase]
) -> TokenMap | None:
    """How the student's tokens are the teacher's; None where both number the same tokens alike.

    Raises:
        CheckpointError: they are tokens of another tokenizer.
    """
    (model, own), (other, its) = pruned, teacher
    size, whole = (checkpoint.config.get_text_config().vocab_size for checkpoint in (model, other))
    known, all_known = own.get_vocab(), its.get_vocab()
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
    owners = torch.full((1 + max(all_known.values()),), size)
    for token, number in all_known.items():
        owners[number] = known[token] if token in known else _first_piece(own, token, size)
    return TokenMap(numbers, owners)


def _first_piece(tokenizer: PreTrainedTokenizerBase, token: str, otherwise: int) -> int:
    pieces = tokenizer.backend_tokenizer.model.tokenize(token)
    return int(pieces[0].id) if pieces else otherwise
