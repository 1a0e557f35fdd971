"""Export to sharded safetensors, streamed, in another dtype or shard size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llmprune_cli.family.written import write_config
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.shards import write_shards
from llmprune_cli.folder.tensors import BY_NAME, DTYPES, TensorEntry
from llmprune_cli.formats.registry import ExportOptions, Fit, Format
from llmprune_cli.source.tokenizer import copy_companions


def write_safetensors(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write a checkpoint's tensors, configuration, tokenizer and generation config into a staging folder.

    Returns:
        The SHA-256 of each shard, by file name.
    """
    dtype = options.dtype

    def cast(entry: TensorEntry) -> TensorEntry:
        return replace(entry, dtype=BY_NAME[dtype].code) if dtype and DTYPES[entry.dtype].is_weight else entry

    def stream() -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry, tensor in checkpoint.tensors():
            progress(entry.size_bytes)
            yield cast(entry), tensor.to(BY_NAME[dtype].torch) if dtype and tensor.is_floating_point() else tensor

    checksums = write_shards(folder, [cast(entry) for entry in checkpoint.entries], stream(), options.max_shard_bytes)
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    if dtype:
        config.dtype = dtype
    write_config(config, folder)
    copy_companions(checkpoint, folder)
    return checksums


SAFETENSORS = Format(
    runs_in="transformers",
    write=write_safetensors,
    fit=lambda config: Fit(loads=True),
    loading="""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    keeps_dtypes=True,
)
