"""The folder that a healed model is written to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.apply.multimodal import names_within, put_back
from llmprune_cli.errors import VerificationError
from llmprune_cli.family.written import write_config, write_whole_config
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.shards import read_index, write_shards
from llmprune_cli.folder.tensors import DTYPES
from llmprune_cli.progress import Listener
from llmprune_cli.source.tokenizer import copy_companions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from llmprune_cli.folder.tensors import TensorEntry


def write_healed(
    pruned: Checkpoint,
    trained: Iterable[tuple[TensorEntry, torch.Tensor]],
    folder: Path,
    max_shard_bytes: int,
    listener: Listener,
) -> dict[str, str]:
    """Write a trained model with the names, shapes and dtypes that it had, and everything beside the weights.

    Args:
        trained: all its tensors, in the order of the pruned model's.

    Returns:
        The SHA-256 of each shard, by file name.

    Raises:
        VerificationError: what was written is not what was there before.
    """
    listener.stage("Writing", pruned.size_bytes)

    def tensors() -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in trained:
            yield entry, tensor.to("cpu", DTYPES[entry.dtype].torch)
            listener.advance(entry.size_bytes)

    entries, stream = pruned.entries, tensors()
    if pruned.whole is None:
        write_config(pruned.config, folder)
    else:
        names = names_within(pruned, {entry.name: entry.name for entry in entries})
        entries, stream = put_back(pruned, pruned.whole, names, entries, stream)
        write_whole_config(pruned.whole.config, pruned.config, pruned.config, folder)
    checksums = write_shards(folder, entries, stream, max_shard_bytes)
    copy_companions(pruned, folder)
    written = {entry.name: (entry.shape, entry.dtype) for entry in read_index(folder)}
    if written != {entry.name: (entry.shape, entry.dtype) for entry in entries}:
        raise VerificationError("The written headers differ from the pruned model's. Please report this.")
    return checksums
