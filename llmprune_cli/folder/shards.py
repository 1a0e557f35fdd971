"""Safetensors shards, both ways: headers and index are read, tensors are streamed into new shards."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from llmprune_cli.errors import CheckpointError, VerificationError
from llmprune_cli.folder.documents import is_there, read_json, write_json
from llmprune_cli.folder.tensors import DTYPES, TensorEntry

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
BIN_NAME, BIN_INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMED_WEIGHTS = "transformers_weights"  # the field of config.json that names another file than the usual ones
METADATA = "__metadata__"  # of a header, which is about no tensor
PADDED = 8  # bytes that the length of a header is a multiple of


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A safetensors file, its header checked by safetensors itself.

    Raises:
        CheckpointError: the file is missing, truncated or malformed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Download the checkpoint again.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}). Download it again.") from error
    with handle as opened:
        yield opened


def weight_sources(folder: Path) -> list[Path]:
    """The weight files and indexes of a folder, in transformers' order: it reads the first and passes over the others.

    Raises:
        CheckpointError: `config.json` names another file, which is missing or no safetensors file of this folder.
    """
    names, config = (SINGLE_NAME, INDEX_NAME, BIN_NAME, BIN_INDEX_NAME), folder / "config.json"
    found = [folder / name for name in names if is_there(folder / name)]
    named = read_json(config).get(NAMED_WEIGHTS) if config.is_file() else None
    if named is None:
        return found
    if not isinstance(named, str) or Path(named).name != named or ".safetensors" not in named:
        raise CheckpointError(f"{config}: {NAMED_WEIGHTS} is {named!r}, and must name a safetensors file beside it.")
    if not is_there(folder / named):
        raise CheckpointError(f"{config} names {named}, which is missing. Download the checkpoint again.")
    return [folder / named, *(path for path in found if path.name != named)]


def weight_names(source: Path) -> list[str]:
    """The names of the files that hold the weights: the source itself, or all shards that it names as an index.

    Raises:
        CheckpointError: an index that is none, or that names a shard outside the folder.
    """
    if source.suffix != ".json":
        return [source.name]
    names = sorted(set(_weight_map(source).values()))
    for shard in names:
        if not shard or Path(shard).name != shard:
            raise CheckpointError(f"{source} names a shard outside its folder: {shard!r}.")
    return names


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights, see `weight_names`.

    Raises:
        CheckpointError: see `weight_names`; or a missing shard.
    """
    files = [source.with_name(name) for name in weight_names(source)]
    for file in files:
        if source.suffix == ".json" and not is_there(file):
            raise CheckpointError(f"{source} names {file.name}, which is missing. Download the checkpoint again.")
    return files


def read_index(folder: Path) -> tuple[TensorEntry, ...]:
    """The tensors of the safetensors files that a folder's weights are read from, in disk order; empty without any.

    Raises:
        CheckpointError: see `weight_sources` and `weight_files`; or shards that differ from their index.
    """
    sources = weight_sources(folder)
    if not sources or sources[0].name in (BIN_NAME, BIN_INDEX_NAME):
        return ()
    entries = [entry for path in weight_files(sources[0]) for entry in _read_header(path)]
    if sources[0].suffix != ".json":
        return tuple(entries)
    weight_map, stored = _weight_map(sources[0]), {entry.name: entry.shard for entry in entries}
    wrong = [name for name in weight_map.keys() | stored.keys() if weight_map.get(name) != stored.get(name)]
    if wrong or len(stored) != len(entries):
        raise CheckpointError(f"{sources[0]} and the shards disagree about {', '.join(sorted(wrong)[:3])}.")
    return tuple(entries)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, by name.

    Raises:
        CheckpointError: it is no index.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise CheckpointError(f"{index} has no usable weight_map.")
    return found


def _read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one shard, in the order of their bytes."""
    with open_shard(path):  # which holds the header against the file
        header = _header(path)
    names = [name for name, _ in header]
    if len(set(names)) < len(names):  # which safetensors accepts, and readers would differ
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path} names {twice} twice. Download the checkpoint again.")
    found = [(name, dict(own)) for name, own in header if name != METADATA]
    for name, own in found:
        if own["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {own['dtype']}, which is unknown here. Convert it first."
            )
    found.sort(key=lambda named: named[1]["data_offsets"])
    return [TensorEntry(name, tuple(own["shape"]), own["dtype"], path.name) for name, own in found]


def _header(path: Path) -> list[tuple[str, Any]]:
    """What a header says of each name in it, as pairs: a dictionary would hide a name that is there twice.

    Raises:
        CheckpointError: the file went missing or changed since safetensors accepted it.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return list(json.loads(file.read(length), object_pairs_hook=list))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} went missing or changed while it was being read ({error}).") from error


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


def warn_of_large_shards(folder: Path, most_bytes: int, warn: Callable[[str], None]) -> None:
    """Warn where a tensor alone is larger than a shard may be."""
    large = sum(path.stat().st_size > most_bytes for path in folder.glob("*.safetensors"))
    if large:
        warn(f"Shards larger than --max-shard-size: {large}. Each holds one tensor, which cannot be split.")


def _encode_header(entries: Sequence[TensorEntry]) -> bytes:
    """The header of the safetensors format: a little-endian u64 length, then JSON padded with spaces."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.name] = _described(entry, offset, end)
        offset = end
    encoded = _as_json(header)
    encoded += b" " * (-len(encoded) % PADDED)
    return struct.pack("<Q", len(encoded)) + encoded


def header_bytes(entries: Sequence[TensorEntry], max_shard_bytes: int) -> int:
    """Bytes of all headers of the shards that `write_shards` makes."""
    return sum(len(_encode_header(shard)) for shard in layout_shards(entries, max_shard_bytes))


def _described(entry: TensorEntry, first: int, end: int) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [first, end]}


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def raw_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as a buffer, where it is contiguous the very memory of the tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
