"""One module per format. A format is one function of (checkpoint, staging folder, options), named in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmprune_cli.checkpoint import Checkpoint
from llmprune_cli.export.safetensors import write_safetensors


@dataclass(frozen=True)
class ExportOptions:
    """What every format is told."""

    dtype: str | None  # torch's name; None keeps the checkpoint's
    max_shard_bytes: int


Exporter = Callable[[Checkpoint, Path, ExportOptions, Callable[[int], None]], None]


def _safetensors(checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]) -> None:
    write_safetensors(checkpoint, folder, options.dtype, options.max_shard_bytes, progress)


FORMATS: dict[str, Exporter] = {"safetensors": _safetensors}
