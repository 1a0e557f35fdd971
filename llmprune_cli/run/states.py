"""Room for the hidden states of all tokens: in memory, or in files that are mapped into it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from llmprune_cli.errors import OutputError


def new_states(shape: Sequence[int], folder: Path | None) -> torch.Tensor:
    """Float32 hidden states that are yet to be written.

    Args:
        folder: of a file that holds them; it has no name any more, so that it goes with the tensor, or with a process
            that is killed. None keeps them in memory.

    Raises:
        OutputError: the folder has no room for them.
    """
    if folder is None or not math.prod(shape):
        return torch.empty(*shape)
    size_bytes = 4 * math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llmprune-") as file:
            _allocate(file.fileno(), size_bytes)
            states = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=torch.float32)
    except OSError as error:
        raise OutputError(
            f"{size_bytes:,} bytes of hidden states cannot be kept in {folder}: {error.strerror or error}. Make room "
            "there, choose another --offload-dir, or give fewer --calibration-tokens."
        ) from error
    return states.view(*shape)


def copy_states(states: torch.Tensor, folder: Path | None) -> torch.Tensor:
    """A copy of hidden states, see `new_states`."""
    return new_states(states.shape, folder).copy_(states)


def _allocate(file: int, size_bytes: int) -> None:
    """Give a file its size and, where the system can, the blocks for it: a full disk is an error only here."""
    if hasattr(os, "posix_fallocate") and size_bytes:
        os.posix_fallocate(file, 0, size_bytes)
    else:
        os.ftruncate(file, size_bytes)
