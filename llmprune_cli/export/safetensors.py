"""Export to sharded safetensors, streamed, in another dtype or shard size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.checkpoint import Checkpoint, TensorEntry
from llmprune_cli.export.formats import ExportOptions, Fit, Format
from llmprune_cli.loading import DTYPES, FLOATS, copy_companions
from llmprune_cli.writer import write_shards

if TYPE_CHECKING:
    import torch


def write_safetensors(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]
) -> None:
    """Write a checkpoint's tensors, configuration, tokenizer and generation config into a staging folder."""
    import torch

    dtype = options.dtype

    def cast(entry: TensorEntry) -> TensorEntry:
        return replace(entry, dtype=DTYPES[dtype]) if dtype and entry.dtype in FLOATS else entry

    def stream() -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in checkpoint.tensors():
            progress(entry.size_bytes)
            yield cast(entry), tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor

    write_shards(folder, [cast(entry) for entry in checkpoint.entries], stream(), options.max_shard_bytes)
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    if dtype:
        config.dtype = dtype
    config.save_pretrained(folder)
    copy_companions(checkpoint, folder)


SAFETENSORS = Format(
    runs_in="transformers",
    dtypes=tuple(DTYPES),
    write=write_safetensors,
    fit=lambda config: Fit(loads=True),
    keeps_dtypes=True,
)
