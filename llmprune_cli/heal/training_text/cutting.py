"""Windows of several texts, and what is known of each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.heal import ON_ANSWERS
from llmprune_cli.heal.options import Healing
from llmprune_cli.run.calibration import SeenText
from llmprune_cli.source.own_text import chat_frame
from llmprune_cli.text.columns import OTHER_NAMES
from llmprune_cli.text.conversations import ASSISTANT
from llmprune_cli.text.corpus import Corpus
from llmprune_cli.text.names import SELF, holds_conversations, parts_of
from llmprune_cli.text.reading import Reading, spelled_bytes
from llmprune_cli.text.windows import Reader, read_corpus, windows_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cut:
    """Windows of several texts."""

    windows: torch.Tensor  # token ids, [N, T]
    part: torch.Tensor  # the number of the text that each is of, [N]
    is_known: torch.Tensor  # which of them the pruned model was fitted on, [N] of bool
    sizes: torch.Tensor | None  # UTF-8 bytes of each token, [N, T]; None where the tokenizer does not tell
    learned: torch.Tensor | None  # see `TrainingText`

    def only(self, chosen: torch.Tensor) -> Cut:
        """Some of them: numbers, [K], or [N] of bool."""
        sizes, learned = (None if own is None else own[chosen] for own in (self.sizes, self.learned))
        return Cut(self.windows[chosen], self.part[chosen], self.is_known[chosen], sizes, learned)

    def learned_shares(self, parts: int) -> list[float]:
        """Of the tokens of each text: those that are learned from, by which windows of it weigh less than others."""
        if self.learned is None:
            return [1.0] * parts
        rates = self.learned.float().mean(1)
        return [float(rates[self.part == number].mean().nan_to_num(1.0)) for number in range(parts)]

    def predicted_bytes(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """UTF-8 bytes of the tokens that are predicted, or of those that are learned from."""
        if self.sizes is None:
            return sum(spelled_bytes(tokenizer, window) for window in self.windows)
        sizes = self.sizes[:, 1:]
        return int((sizes if self.learned is None else sizes * self.learned).sum())


def check_own_text(healing: Healing, tokenizer: PreTrainedTokenizerBase, teacher: str) -> None:
    """Make sure that a teacher writes conversations, where what is said in these is to be learned.

    Raises:
        CheckpointError: it will not, and no other text has any.
    """
    others = (part.name for part in parts_of(healing.text or SELF) if part.name != SELF)
    if healing.loss_on == ON_ANSWERS and chat_frame(tokenizer) is None and not any(map(holds_conversations, others)):
        raise CheckpointError(
            f"{teacher} has no chat template, so that it writes no conversations. Give --text with some, or leave out "
            f"--loss-on {ON_ANSWERS}."
        )


def cut_texts(
    parts: list[tuple[Corpus, float]],
    reader: Reader,
    length: int,
    healing: Healing,
    before: tuple[SeenText, PreTrainedTokenizerBase] | None,
) -> Cut:
    """Windows of several texts; those in which nothing is learned from are left out."""
    read = [read_corpus(corpus, reader) for corpus, _ in parts]
    cut = [windows_in(own.tokens, length, None, corpus.origin) for own, (corpus, _) in zip(read, parts, strict=True)]
    numbers = torch.cat([torch.full((len(own),), number) for number, own in enumerate(cut)])
    known = [torch.zeros(len(own), dtype=torch.bool) for own in cut]
    if before is not None:
        texts = zip(parts, read, known, strict=True)
        known = [
            _fitted_before(corpus.name, healing.text_split, torch.arange(len(own) + 1) * length, its, before)
            for (corpus, _), its, own in texts
        ]
    sizes = [its.sizes() for its in read]
    by_token = [
        own[: windows.numel()].view_as(windows) for own, windows in zip(sizes, cut, strict=True) if own is not None
    ]
    found = Cut(torch.cat(cut), numbers, torch.cat(known), torch.cat(by_token) if by_token else None, None)
    if healing.loss_on != ON_ANSWERS:
        return found
    learned = _answers([corpus for corpus, _ in parts], read, cut)
    return replace(found, learned=learned).only(learned.any(1))


def _answers(corpora: list[Corpus], read: list[Reading], cut: list[torch.Tensor]) -> torch.Tensor:
    """Which tokens but the first of all windows an assistant says, [N, T−1] of bool; all where nobody else speaks.

    Raises:
        CheckpointError: it says nothing, also if that is in one of the texts alone, or the tokenizer does not tell.
    """
    if not all(its.encoding.is_fast for its in read):
        raise CheckpointError(
            "The tokenizer does not tell which part of a text its tokens are, so that an assistant's cannot be told "
            "from the rest. Leave out --loss-on assistant."
        )
    learned = list[torch.Tensor]()
    for corpus, its, windows in zip(corpora, read, cut, strict=True):
        is_said = torch.ones_like(its.tokens, dtype=torch.bool)
        if corpus.answers is not None:
            is_said = its.within(corpus.answers)
        learned.append(is_said[: windows.numel()].view_as(windows)[:, 1:])
    silent = [corpus.origin for corpus, own in zip(corpora, learned, strict=True) if not own.any()]
    if silent or all(corpus.answers is None for corpus in corpora):
        raise CheckpointError(
            f"{', '.join(silent or (corpus.origin for corpus in corpora))} has no conversations in which an assistant "
            f"speaks (as {', '.join((ASSISTANT, *OTHER_NAMES))}). Give --text with some, name their column with "
            "--text-column, or leave out --loss-on assistant."
        )
    return torch.cat(learned)


def _fitted_before(
    name: str,
    split: str,
    edges: torch.Tensor,
    read: Reading,
    before: tuple[SeenText, PreTrainedTokenizerBase],
) -> torch.Tensor:
    """Which of a text's N windows hold a token that the pruned model was fitted on, [N] of bool.

    Args:
        edges: the tokens at which windows begin, and the last one ends, [N + 1].
    """
    (seen, tokenizer), first, end, tokens = before, edges[:-1], edges[1:], len(read.tokens)
    share = seen.share_of(name, split)
    if not share:
        return torch.zeros(len(first), dtype=torch.bool)
    if tokenizer is not read.tokenizer:
        own, its = (_starts(by, read.text) for by in (read.tokenizer, tokenizer))
        tokens = len(its) - 1
        first = torch.searchsorted(its, own[edges[:-1]], right=True) - 1
        end = torch.searchsorted(its, own[edges[1:]])
    counted = torch.cat((torch.zeros(1, dtype=torch.long), seen.places(tokens, share).cumsum(0)))
    return counted[end] > counted[first]


def _starts(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The characters at which tokens begin, and the text's end, [L + 1]; special ones begin where the last one did."""
    offsets = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([*(first for first, _ in offsets), len(text)]).cummax(0).values
