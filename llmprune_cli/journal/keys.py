"""What a result depends on, in a form that can be compared: weights, text, options, versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmprune_cli import __version__
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint, stamp
from llmprune_cli.options import Choice
from llmprune_cli.plan.document import Plan, fingerprint

MEASURED_AS = 4  # raised where what is measured or made comes out otherwise, so that older work is not taken for it
PACKAGES = ("torch", "transformers", "safetensors")
WEIGHT_FILES = (".safetensors", ".bin", ".gguf")
SAMPLES = 8  # of every tensor, evenly spread
SAMPLE_BYTES = 512


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    return {"llmprune": __version__, **{name: version(name) for name in PACKAGES}}


def run_key(
    subject: Subject,
    choice: Choice,
    plan: Plan | None,
    windows: Sequence[torch.Tensor],
    device: str,
    tokens: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides what a run writes.

    Args:
        plan: that is replayed, if one is.
        windows: of calibration text, token ids, [N, T] each.
        tokens: what decides which of them stay; None where all do.
    """
    chosen = asdict(choice)
    return {
        **model_identity(subject.checkpoint),
        "calibration text": text_identity(*windows),
        "plan": hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest() if plan else None,
        "device": device,
        "versions": versions(),
        "way of computing": MEASURED_AS,
        **(tokens or {}),
        **chosen.pop("widths"),
        **chosen,
    }


def statistics_key(
    checkpoint: Checkpoint, kind: str, windows: torch.Tensor, device: str, compute: torch.dtype
) -> dict[str, Any]:
    """Everything that decides what is measured on token ids [N, T].

    Args:
        kind: what is measured.
        compute: dtype of the matrix products.
    """
    return {
        "kind": kind,
        "measured as": MEASURED_AS,
        **model_identity(checkpoint),
        "text": text_identity(windows),
        "device": device,
        "compute dtype": str(compute),
        "versions": versions(),
    }


def differences(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two keys, in words."""
    found = []
    for name in begun.keys() | now.keys():
        old, new = begun.get(name), now.get(name)
        if old != new:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (old, new))
            found.append(f"{name} differs" if hashed else f"{name} was {old} and is {new}")
    return sorted(found)


def model_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of the configuration with all headers, and of the weights."""
    return {"model": fingerprint(checkpoint), "weights": weights_identity(checkpoint)}


def weights_identity(checkpoint: Checkpoint) -> str:
    """SHA-256 of a sample of every tensor, and of the commit or the sizes and dates of the files that hold them.

    The sample tells refined models of equal shapes apart, also where dates are lost; the dates tell a small change that
    no sample meets.
    """
    digest = hashlib.sha256(repr([checkpoint.revision, *_files(Path(checkpoint.source))]).encode())
    for name, sample in _samples(checkpoint):
        digest.update(name.encode())
        digest.update(sample)
    return digest.hexdigest()


def weights_sample(checkpoint: Checkpoint) -> str | None:
    """SHA-256 of the sample alone, the same of every copy of the weights; None where they are not on this machine."""
    shards = {entry.shard for entry in checkpoint.entries}
    if not all(shard is not None and (checkpoint.folder / shard).is_file() for shard in shards):
        return None
    samples = sorted((name, hashlib.sha256(sample).hexdigest()) for name, sample in _samples(checkpoint))
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def _samples(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """The name of every tensor, in the order on disk, and some of its bytes."""
    for entry, tensor in checkpoint.tensors():
        raw = tensor.reshape(-1).view(torch.uint8)
        firsts = [max(0, len(raw) - SAMPLE_BYTES) * number // (SAMPLES - 1) for number in range(SAMPLES)]
        yield entry.name, b"".join(raw[first : first + SAMPLE_BYTES].numpy().tobytes() for first in firsts)


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
