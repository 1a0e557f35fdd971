"""A checkpoint as a value: its configuration and what is where on disk, known from headers alone."""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.tensors import DTYPES, TensorEntry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MANIFEST_NAME = "llmprune.json"
READ = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".tiktoken", ".py")  # suffixes of what is read
MOST_JSON_BYTES = 32 * 2**20  # the index of 150,000 tensors has half of that
MOST_CONTAINERS = 10**6  # lists and objects of a document, which take much more memory than their brackets


Stamp = tuple[int, int, int]  # inode, bytes, time of the last change in nanoseconds


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: configuration, tensor index, and where the bytes are.

    `entries` is in the order in which the bytes lie on disk, so that reading in that order is sequential.
    """

    folder: Path
    source: str  # the MODEL argument as the user gave it
    revision: str | None  # commit of a hub id
    config: PretrainedConfig
    entries: tuple[TensorEntry, ...]
    has_weights: bool
    companions: Path  # where tokenizer, chat template and generation config lie
    dropped: tuple[str, ...] = ()  # stored tensors that the model does not use
    renamed: tuple[tuple[str, str], ...] = ()  # stored name and name today, where they differ
    trust_remote_code: bool = False  # whether code that comes with it may run
    stamps: Mapping[str, Stamp] = field(default_factory=dict)  # of shards, before their headers were read

    @cached_property
    def by_name(self) -> dict[str, TensorEntry]:
        """Entries by tensor name."""
        return {entry.name: entry for entry in self.entries}

    @property
    def parameter_count(self) -> int:
        """Number of stored parameters (a tied tensor counts once)."""
        return sum(entry.numel for entry in self.entries)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.entries)

    def tensors(self) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        """Every tensor once, in disk order, memory-mapped: the bytes are read when they are used.

        Raises:
            CheckpointError: a shard went missing or changed since its header was read.
        """
        from itertools import groupby

        for shard, entries in groupby(self.entries, key=lambda entry: entry.shard):
            if shard is None:
                raise CheckpointError(f"{self.folder} holds no weights. Point MODEL at a folder with *.safetensors.")
            with open_shard(self.folder / shard) as handle:
                for entry in entries:
                    self._check_unchanged(shard)  # a file that was cut short would end this process
                    yield entry, handle.get_tensor(entry.stored_name or entry.name)
                self._check_unchanged(shard)

    def _check_unchanged(self, shard: str) -> None:
        if shard in self.stamps:
            check_unchanged(self.folder / shard, self.stamps[shard])


def stamp(path: Path) -> Stamp:
    """What tells whether a file was written to, or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def stamp_shards(folder: Path) -> dict[str, Stamp]:
    """The stamps of all safetensors files in a folder."""
    return {path.name: stamp(path) for path in folder.glob("*.safetensors") if path.is_file()}


def check_unchanged(path: Path, known: Stamp) -> None:
    """Hold a file against an earlier stamp.

    Raises:
        CheckpointError: it went missing or changed since.
    """
    try:
        now = stamp(path)
    except OSError as error:
        raise CheckpointError(f"{path} went missing while it was being read ({error.strerror}).") from error
    if now != known:
        raise CheckpointError(f"{path} changed while it was being read. Run again when nothing writes it.")


@contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[None]:
    """Watch files while a block reads them; what is missing before is for the block to complain about.

    Raises:
        CheckpointError: one of them went missing or changed meanwhile.
    """
    known = {path: stamp(path) for path in paths if is_there(path)}
    yield
    for path, own in known.items():
        check_unchanged(path, own)


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


def read_json(path: Path, most_bytes: int | None = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        most_bytes: of a file of this kind; None for one that this program wrote for itself.

    Raises:
        CheckpointError: the file is missing, too large, not JSON, or not an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file.")
        if most_bytes is not None and status.st_size > most_bytes:
            raise CheckpointError(f"{path} has {status.st_size:,} bytes, and files of its kind at most {most_bytes:,}.")
        text = path.read_text(encoding="utf-8")
        if most_bytes is not None and text.count("[") + text.count("{") > MOST_CONTAINERS:
            raise CheckpointError(f"{path} holds more than {MOST_CONTAINERS:,} lists and objects.")
        value = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def check_places(folder: Path) -> None:
    """Refuse a model folder in which something is no file that should be one, or a link to elsewhere.

    What is read or copied from a folder has to be in it. The links of the hub's cache lead to its own `blobs`.

    Raises:
        CheckpointError: see above.
    """
    root = folder.resolve()
    places = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.suffix in READ and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file.")
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in places):
            raise CheckpointError(f"{path} is a link to somewhere else. Put the file itself into the folder.")


def read_index(folder: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a folder's safetensors shards, in disk order; empty where there are none.

    Raises:
        CheckpointError: an index that names a missing shard or one outside the folder, or shards that differ from it.
    """
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        single = folder / SINGLE_NAME
        return tuple(_read_header(single)) if single.exists() else ()
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path} has no usable weight_map.")
    entries: list[TensorEntry] = []
    for shard in sorted(set(weight_map.values())):
        if not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index_path} names a shard outside its folder: {shard!r}.")
        if not is_there(folder / shard):
            raise CheckpointError(f"{index_path} names {shard}, which is missing. Download the checkpoint again.")
        entries += _read_header(folder / shard)
    stored = {entry.name: entry.shard for entry in entries}
    wrong = [name for name in weight_map.keys() | stored.keys() if weight_map.get(name) != stored.get(name)]
    if wrong or len(stored) != len(entries):
        raise CheckpointError(f"{index_path} and the shards disagree about {', '.join(sorted(wrong)[:3])}.")
    return tuple(entries)


def is_there(path: Path) -> bool:
    """Whether a path exists; one that no file system can have does not."""
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _read_header(path: Path) -> list[TensorEntry]:
    with open_shard(path) as handle:
        _check_named_once(path)
        entries = []
        for name in handle.offset_keys():
            view = handle.get_slice(name)
            dtype = view.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: {name} is stored as {dtype}, which is unknown here. Convert it first.")
            entries.append(TensorEntry(name, tuple(view.get_shape()), dtype, path.name))
        return entries


def _check_named_once(path: Path) -> None:
    """Refuse a header that safetensors has accepted although it names a tensor twice: readers would differ.

    Raises:
        CheckpointError: see above, or the file went missing or changed since.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names = [name for name, _ in json.loads(file.read(length), object_pairs_hook=list)]
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} went missing or changed while it was being read ({error}).") from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path} names {twice} twice. Download the checkpoint again.")
