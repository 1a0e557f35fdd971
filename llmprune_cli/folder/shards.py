"""Write a checkpoint's shards tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from llmprune_cli.errors import PlanError, VerificationError
from llmprune_cli.folder.checkpoint import INDEX_NAME, SINGLE_NAME
from llmprune_cli.folder.tensors import TensorEntry

PADDED = 8  # bytes that the length of a header is a multiple of
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `4GiB`.

    Raises:
        PlanError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise PlanError(f"{text!r} is not a size. Write it like 500MB, 5GB or 4GiB.")
    return size


def layout_shards(entries: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Split tensors, in order, into files of at most `max_shard_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[TensorEntry]] = [[]]
    header_bytes = len(_encode_header([])) + PADDED
    filled = header_bytes
    for entry in entries:
        # no offset has more digits than the limit; the braces make up for the comma
        size = entry.size_bytes + len(_as_json({entry.name: _described(entry, max_shard_bytes, max_shard_bytes)}))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = header_bytes
        shards[-1].append(entry)
        filled += size
    return shards


def write_shards(
    folder: Path,
    entries: Sequence[TensorEntry],
    tensors: Iterable[tuple[TensorEntry, torch.Tensor]],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Stream tensors into safetensors shards and their index: one tensor is written while the next is made.

    Args:
        entries: what will be written, in order, with final shapes and dtypes.
        tensors: the same tensors, in the same order.

    Returns:
        The SHA-256 of each shard, by file name.

    Raises:
        VerificationError: a tensor holds NaN or infinity.
        ValueError: a tensor differs from its entry (a bug of the caller).
    """
    shards = layout_shards(entries, max_shard_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    checksums: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file, ThreadPoolExecutor(1) as writer:
            checksum = hashlib.sha256()

            def put(part: Any, file: IO[bytes] = file, checksum: hashlib._Hash = checksum) -> None:
                file.write(part)
                checksum.update(part)

            writing = writer.submit(put, _encode_header(shard))
            for entry in shard:
                _, tensor = next(stream)
                if tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{entry.name}: {tuple(tensor.shape)} came where {entry.shape} was announced")
                check_finite(entry.name, tensor)
                writing.result()
                writing = writer.submit(put, raw_bytes(tensor))
                weight_map[entry.name] = name
            writing.result()
        checksums[name] = checksum.hexdigest()
    if len(shards) > 1:
        total = {"total_size": sum(entry.size_bytes for entry in entries)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)
    return checksums


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse to write numbers that are none.

    Raises:
        VerificationError: the tensor holds NaN or infinity.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return
    low, high = tensor.aminmax()  # both are NaN where any element is
    if not (low.isfinite() and high.isfinite()):
        raise VerificationError(
            f"{name} would be written with NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}, so nothing "
            "was kept. If the input holds them, it is damaged; otherwise a wider --dtype or another --refit may help."
        )


def _encode_header(entries: Sequence[TensorEntry]) -> bytes:
    """The header of the safetensors format: a little-endian u64 length, then JSON padded with spaces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.name] = _described(entry, offset, end)
        offset = end
    encoded = _as_json(header)
    encoded += b" " * (-len(encoded) % PADDED)
    return struct.pack("<Q", len(encoded)) + encoded


def _described(entry: TensorEntry, first: int, end: int) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [first, end]}


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def raw_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as a buffer, where it is contiguous the very memory of the tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON that ends in a newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
