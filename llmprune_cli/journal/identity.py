"""What a measurement depends on, in a form that can be compared: weights, text, versions."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from llmprune_cli import __version__
from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint, stamp
from llmprune_cli.plan.document import fingerprint

PACKAGES = ("torch", "transformers", "safetensors")
WEIGHT_FILES = (".safetensors", ".bin", ".gguf")
SAMPLES = 8  # of every tensor, evenly spread
SAMPLE_BYTES = 512


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    return {"llmprune": __version__, **{name: version(name) for name in PACKAGES}}


def model_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of the configuration with all headers, and of the weights."""
    return {"model": fingerprint(checkpoint), "weights": weights_identity(checkpoint)}


def weights_identity(checkpoint: Checkpoint) -> str:
    """SHA-256 of a sample of every tensor, and of the commit or the sizes and dates of the files that hold them.

    The sample tells refined models of equal shapes apart, also where dates are lost; the dates tell a small change that
    no sample meets.
    """
    digest = hashlib.sha256(repr([checkpoint.revision, *_files(Path(checkpoint.source))]).encode())
    for entry, tensor in checkpoint.tensors():
        raw = tensor.reshape(-1).view(torch.uint8)
        digest.update(entry.name.encode())
        for number in range(SAMPLES):
            first = max(0, len(raw) - SAMPLE_BYTES) * number // (SAMPLES - 1)
            digest.update(raw[first : first + SAMPLE_BYTES].numpy().tobytes())
    return digest.hexdigest()


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and dates of a folder's weight files, or of one file; none for a hub id."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    try:
        found = [(file.name, stamp(file)) for file in files if file.suffix in WEIGHT_FILES]
    except OSError as error:
        raise CheckpointError(f"{error.filename} went missing while it was being read ({error.strerror}).") from error
    return [(name, size, changed) for name, (_, size, changed) in found]


def text_identity(*windows: torch.Tensor) -> str:
    """SHA-256 of token ids, [N, T] each."""
    digest = hashlib.sha256()
    for tokens in windows:
        digest.update(repr(tuple(tokens.shape)).encode())
        digest.update(tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()
