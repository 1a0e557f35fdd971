"""Cut the rows of tokens that go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from llmprune_cli.apply.surgery import take
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.vocabulary.size import rows_left

Stream = Iterator[tuple[TensorEntry, torch.Tensor]]


def cut_entries(entries: Sequence[TensorEntry], axes: dict[str, int], kept: Sequence[int]) -> tuple[TensorEntry, ...]:
    """The same tensors with fewer tokens.

    Args:
        axes: see `vocabulary_axes`.
        kept: numbers of the tokens that stay, in their order.
    """

    def cut(entry: TensorEntry) -> TensorEntry:
        own = axes.get(entry.name)
        shape = (rows_left(length, kept) if axis == own else length for axis, length in enumerate(entry.shape))
        return replace(entry, shape=tuple(shape))

    return tuple(map(cut, entries))


def cut_rows(
    entries: Sequence[TensorEntry], tensors: Stream, axes: dict[str, int], kept: Sequence[int]
) -> tuple[tuple[TensorEntry, ...], Stream]:
    """Tensors with the rows of some tokens only, one at a time."""
    index = torch.tensor(kept)

    def stream() -> Stream:
        for entry, tensor in tensors:
            axis = axes.get(entry.name)
            if axis is not None:
                tensor = take(tensor, axis, index[: rows_left(tensor.shape[axis], kept)])
            yield cut_entries([entry], axes, kept)[0], tensor

    return cut_entries(entries, axes, kept), stream()
