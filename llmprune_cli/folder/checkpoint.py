"""A checkpoint as a value: its configuration and what is where on disk, known from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.documents import is_there
from llmprune_cli.folder.shards import open_shard
from llmprune_cli.folder.tensors import DTYPES, TensorEntry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

READ = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".tiktoken", ".py")  # suffixes of what is read


Stamp = tuple[int, int, int]  # inode, bytes, time of the last change in nanoseconds


@dataclass(frozen=True)
class Surroundings:
    """The multimodal model around a language model: it sees or hears, and goes untouched into what is written."""

    config: PretrainedConfig  # of the whole model
    entries: tuple[TensorEntry, ...] = ()  # of all parts but the language model, under their stored names
    is_written: bool = True  # False where the language model alone is wanted


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
    around: Surroundings | None = None  # where this is the language model of a multimodal one

    @cached_property
    def by_name(self) -> dict[str, TensorEntry]:
        """Entries by tensor name."""
        return {entry.name: entry for entry in self.entries}

    @property
    def whole(self) -> Surroundings | None:
        """What goes with the language model into what is written, if anything."""
        return self.around if self.around is not None and self.around.is_written else None

    @property
    def surroundings(self) -> tuple[TensorEntry, ...]:
        """The tensors that go with the language model as they are."""
        return self.whole.entries if self.whole is not None else ()

    @property
    def parameter_count(self) -> int:
        """Number of stored parameters (a tied tensor counts once)."""
        return sum(entry.numel for entry in self.entries)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor."""
        return DTYPES[max(self.entries, key=lambda entry: entry.numel).dtype].torch

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
