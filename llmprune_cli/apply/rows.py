"""Cut the rows of tokens that go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from llmprune_cli.apply.surgery import take
from llmprune_cli.folder.tensors import TensorEntry

Stream = Iterator[tuple[TensorEntry, torch.Tensor]]


def cut_entries(entries: Sequence[TensorEntry], axes: dict[str, int], size: int) -> tuple[TensorEntry, ...]:
    """The same tensors with another number of tokens.

    Args:
        axes: see `vocabulary_axes`.
    """

    def cut(entry: TensorEntry) -> TensorEntry:
        shape = (size if axis == axes.get(entry.name) else length for axis, length in enumerate(entry.shape))
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
            yield cut_entries([entry], axes, len(kept))[0], tensor if axis is None else take(tensor, axis, index)

    return cut_entries(entries, axes, len(kept)), stream()
