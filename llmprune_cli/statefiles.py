"""Hidden states in files that are mapped into memory, so that keeping many takes disk and no memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.errors import OutputError

if TYPE_CHECKING:
    import torch


def keep_states(states: torch.Tensor, path: Path) -> torch.Tensor:
    """A copy of float32 hidden states that lives in a file; what is written into the copy goes to the file.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    import torch

    try:
        path.write_bytes(states.contiguous().numpy().data)
    except OSError as error:
        raise OutputError(
            f"{states.nbytes:,} bytes of hidden states cannot be kept in {path.parent}: {error.strerror or error}. "
            "Make room there, set TMPDIR to a folder with more, or give fewer --calibration-tokens."
        ) from error
    return torch.from_file(str(path), shared=True, size=states.numel(), dtype=states.dtype).view(states.shape)
