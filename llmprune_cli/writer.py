"""Write a checkpoint folder tensor by tensor, all or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.checkpoint import INDEX_NAME, SINGLE_NAME, TensorEntry
from llmprune_cli.errors import OutputError, PlanError

if TYPE_CHECKING:
    import torch

TEMPORARY = ".llmprune-"  # in the names of files and folders that are not finished
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


@contextmanager
def staged_folder(
    target: Path, overwrite: bool = False, forbidden: Path | None = None, place: Path | None = None
) -> Iterator[Path]:
    """A staging folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    Args:
        place: that holds it, on the target's file system; None for the folder that will hold the target.

    Raises:
        OutputError: the target is not empty (and `overwrite` is off), lies in or around `forbidden`, or cannot be
            written.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite, forbidden)
    staging = (place or target.parent) / f".{target.name}{TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:  # from before it exists: an interruption must find it whenever it comes
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        except OSError as error:
            raise OutputError(f"Cannot write beside {target}: {error.strerror}. Choose another --output.") from error
        yield staging
        for path in [*staging.iterdir(), staging]:
            fsync(path)
        _replace_folder(staging, target)
        fsync(target.parent)
    except OSError as error:
        raise OutputError(f"Writing {target} failed: {error.strerror or error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, overwrite: bool, forbidden: Path | None = None) -> None:
    """Refuse a target that holds something or that overlaps the input, before any work is done.

    Raises:
        OutputError: see above.
    """
    resolved = target.resolve()
    if forbidden is not None:
        source = forbidden.resolve()
        if resolved == source or source in resolved.parents or resolved in source.parents:
            raise OutputError(f"The output {target} and the input {forbidden} overlap. Choose a folder beside it.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} exists and is not a folder. Choose another --output.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target} is not empty. Choose another --output, or pass --overwrite to replace it.")
        if not (target / "config.json").exists() and not _is_gguf_export(target):
            raise OutputError(f"{target} is not a model folder, so --overwrite leaves it alone. Empty it yourself.")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:  # trying it is the only test that holds for every user and file system
        Path(tempfile.mkdtemp(prefix=".llmprune-", dir=parent)).rmdir()
    except OSError as error:
        raise OutputError(f"{parent} is not writable ({error.strerror}). Choose another --output.") from error


def _is_gguf_export(folder: Path) -> bool:
    """Whether a folder holds one exported file, and what is written beside it: other people keep many together."""
    beside = re.compile(r"llmprune\.json|README\.md|(LICEN[SC]E|NOTICE).*")
    names = [path.name for path in folder.iterdir() if not beside.fullmatch(path.name)]
    return len(names) == 1 and re.fullmatch(r"model-\w+\.gguf", names[0]) is not None


def _replace_folder(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(staging.name + "-old")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def layout_shards(entries: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Split tensors, in order, into shards of at most `max_shard_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size_bytes
    return shards


def write_shards(
    folder: Path,
    entries: Sequence[TensorEntry],
    tensors: Iterable[tuple[TensorEntry, torch.Tensor]],
    max_shard_bytes: int,
) -> None:
    """Stream tensors into safetensors shards and their index: one tensor is written while the next is made.

    Args:
        entries: what will be written, in order, with final shapes and dtypes.
        tensors: the same tensors, in the same order.

    Raises:
        ValueError: a tensor differs from its entry (a bug of the caller).
    """
    shards = layout_shards(entries, max_shard_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file, ThreadPoolExecutor(1) as writer:
            writing = writer.submit(file.write, _encode_header(shard))
            for entry in shard:
                _, tensor = next(stream)
                if tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{entry.name}: {tuple(tensor.shape)} came where {entry.shape} was announced")
                writing.result()
                writing = writer.submit(file.write, raw_bytes(tensor))
                weight_map[entry.name] = name
            writing.result()
    if len(shards) > 1:
        total = {"total_size": sum(entry.size_bytes for entry in entries)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


def _encode_header(entries: Sequence[TensorEntry]) -> bytes:
    """The header of the safetensors format: a little-endian u64 length, then JSON padded to 8 bytes with spaces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def raw_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as a buffer, where it is contiguous the very memory of the tensor."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def replace_file(path: Path, parts: Iterable[Any]) -> None:
    """Write buffers into a file that gets its name when all of it is on disk.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: Path, option: str) -> None:
    """Make a folder where it is missing, and make sure that it can be written.

    Raises:
        OutputError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".llmprune-", dir=folder)).rmdir()
    except OSError as error:
        raise OutputError(f"{folder} is not a writable folder ({error.strerror}). Choose another {option}.") from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON that ends in a newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
