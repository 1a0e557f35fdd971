"""Put a pruned language model back into the multimodal model that it is part of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.folder.checkpoint import Checkpoint, Surroundings
from llmprune_cli.folder.tensors import TensorEntry, split_name

Stream = Iterator[tuple[TensorEntry, torch.Tensor]]


def names_within(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    """What tensors of a pruned language model are called in the multimodal one: as they were stored, but renumbered.

    Args:
        names: of the language model's tensors that stay, before and after pruning.

    Raises:
        UnsupportedError: a stored name has other numbers than the language model's own.
    """
    stored = {name: raw for raw, name in checkpoint.renamed}
    found = {}
    for before, after in names.items():
        template, numbers = split_name(stored.get(before, before))
        if numbers != split_name(before)[1]:
            raise UnsupportedError(
                f"{checkpoint.folder}: {stored[before]} is not numbered as {before} is, so that the pruned model "
                "cannot be put back into the multimodal one. --text-only writes the language model alone."
            )
        found[after] = template.format(*split_name(after)[1])
    return found


def put_back(
    checkpoint: Checkpoint,
    whole: Surroundings,
    stored: Mapping[str, str],
    entries: Sequence[TensorEntry],
    tensors: Stream,
) -> tuple[tuple[TensorEntry, ...], Stream]:
    """The tensors of the multimodal model: those of the language model, and the others as they are.

    Args:
        stored: see `names_within`.
        entries: of the pruned language model, as are the tensors.
    """

    def named(entry: TensorEntry) -> TensorEntry:
        return replace(entry, name=stored[entry.name])

    def stream() -> Stream:
        for entry, tensor in tensors:
            yield named(entry), tensor
        yield from replace(checkpoint, entries=whole.entries).tensors()

    return (*(named(entry) for entry in entries), *whole.entries), stream()
