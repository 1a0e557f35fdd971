"""The same text in the tokens of vocabularies of several sizes, so that they can be held against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmprune_cli.source.tokenizer import reader_of
from llmprune_cli.vocabulary.rewriting import cut_tokens
from llmprune_cli.vocabulary.tokens import Tokens

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what is left of a character that was cut within


@dataclass(frozen=True)
class Told:
    """Text in the tokens of a vocabulary, by their numbers in the whole one."""

    windows: torch.Tensor  # token ids, [N, T]; behind its length a window is filled up
    lengths: tuple[int, ...]  # tokens of each
    bytes: int  # in UTF-8, of text in the tokens that are predicted


def tell(tokens: Tokens, vocabularies: Sequence[Sequence[int]], windows: torch.Tensor) -> list[Told]:
    """The text of windows in each vocabulary: as much of it as the smallest one says in tokens of the same number.

    Args:
        vocabularies: numbers of the tokens that each has, the largest first.
        windows: token ids, [N, T].
    """
    whole = reader_of(json.dumps(tokens.document))
    readers = [(_reader(tokens, whole, kept), kept) for kept in vocabularies]
    texts = [whole.decode(window, False) for window in windows.tolist()]
    least = [_read(*readers[-1], text)[: windows.shape[1]] for text in texts]
    common = [whole.decode(ids, False).rstrip(UNKNOWN) for ids in least]
    return [_told([_read(*reader, text) for text in common], whole, windows.shape[1]) for reader in readers]


def _reader(tokens: Tokens, whole: Any, kept: Sequence[int]) -> Any:
    if set(tokens.by_id) <= set(kept):
        return whole
    return reader_of(json.dumps(cut_tokens(tokens, tuple(kept))))


def _read(reader: Any, kept: Sequence[int], text: str) -> list[int]:
    return [kept[number] for number in reader.encode(text, add_special_tokens=False).ids]


def _told(read: list[list[int]], whole: Any, length: int) -> Told:
    found = torch.zeros(len(read), length, dtype=torch.long)
    count, lengths = 0, []
    for row, ids in zip(found, read, strict=True):
        ids = ids[:length]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        lengths.append(len(ids))
        count += len(whole.decode(ids, False).encode()) - len(whole.decode(ids[:1], False).encode())
    return Told(found, tuple(lengths), count)
