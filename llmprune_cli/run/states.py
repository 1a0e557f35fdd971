"""Room for the hidden states of all tokens: in memory, in files that are mapped into it, or in one that is read."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from llmprune_cli.errors import OutputError
from llmprune_cli.folder.shards import raw_bytes

MOST_OF_FREE_SPACE = 0.5  # that hidden states may take which could be computed again
IN_MEMORY = ("tmpfs", "ramfs")  # file systems whose files are memory, as /tmp is on many systems
LASTING = Path("/var/tmp")  # of temporary files that outlive a restart, and so lie on a disk


def new_states(shape: Sequence[int], folder: Path | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Hidden states that are yet to be written.

    Args:
        folder: of a file that holds them; it has no name any more, so that it goes with the tensor, or with a process
            that is killed. None keeps them in memory.

    Raises:
        OutputError: the folder has no room for them.
    """
    if folder is None or not math.prod(shape):
        return torch.empty(*shape, dtype=dtype)
    size_bytes = dtype.itemsize * math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llmprune-") as file:
            allocate(file.fileno(), size_bytes)
            states = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
    except OSError as error:
        raise _no_room(folder, size_bytes, error) from error
    return states.view(*shape)


def copy_states(states: torch.Tensor, folder: Path | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A copy of hidden states, see `new_states`."""
    return new_states(states.shape, folder, dtype).copy_(states)


Place = tuple[int, str]  # a layer, and the name of a reader behind which states are taken; "" before the layer


def states_bytes(tokens: int, channels: int, places: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the states of so many tokens at so many places."""
    return dtype.itemsize * tokens * channels * places


def are_worth_keeping(size_bytes: int, folder: Path) -> bool:
    """Whether a folder has ample room for states that could be computed again."""
    return size_bytes <= MOST_OF_FREE_SPACE * shutil.disk_usage(folder).free


def roomy_folder(beside: Path | None) -> Path:
    """Where hidden states go that are too many for memory: to the other temporary files, unless these are memory.

    Args:
        beside: a folder where the run writes, which is better then; None where there is none.
    """
    usual = Path(tempfile.gettempdir())
    places = [usual, LASTING, *([beside] if beside is not None else [])]
    on_disk = (place for place in places if os.access(place, os.W_OK | os.X_OK) and not lies_in_memory(place))
    return next(on_disk, usual)


def lies_in_memory(folder: Path) -> bool:
    """Whether files in a folder are memory."""
    path = folder.resolve()
    mounts = [own for own in psutil.disk_partitions(all=True) if path.is_relative_to(own.mountpoint)]
    deepest = max(reversed(mounts), key=lambda own: len(own.mountpoint), default=None)  # of equal ones the last holds
    return deepest is not None and deepest.fstype in IN_MEMORY


@dataclass
class DenseStates:
    """What the unpruned model makes of some windows, before, within and behind its layers: for whoever needs it again.

    All of it lies in one file, which has no name any more and is read part by part.
    """

    folder: Path
    windows: torch.Tensor | None = None  # token ids, [N, T]; None where nothing is kept
    channels: int = 0
    dtype: torch.dtype = torch.float32
    is_whole: bool = False  # whether the windows went through all layers
    only_between: bool = False  # layers, not within them
    notes: dict[int, Any] = field(default_factory=dict)  # what was found out about each layer on the way
    _slots: dict[Place, int] = field(default_factory=dict)
    _file: IO[bytes] | None = None
    _is_needed: bool = False  # whether a full disk is an error; else nothing is kept then

    def begin(
        self, windows: torch.Tensor, channels: int, places: int, needed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        """Make room for the states of windows [N, T] at so many places; if there is not enough, keep nothing.

        Args:
            needed: places between layers, which there must be room for; 0 where nothing has to be kept.
            dtype: to which they are rounded.

        Raises:
            OutputError: there must be, and is not.
        """
        size_bytes = states_bytes(windows.numel(), channels, places, dtype)
        self.windows, self.is_whole, self._file, self._is_needed = None, False, None, needed > 0
        self._slots.clear()
        self.notes.clear()
        try:
            is_ample = are_worth_keeping(size_bytes, self.folder)
            if not is_ample and not needed:
                return
            self.only_between = needed > 0 and (not is_ample or places == needed)
            if self.only_between:
                size_bytes = states_bytes(windows.numel(), channels, needed, dtype)
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix=".llmprune-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            if needed:  # else blocks are given as they are written, which takes a tenth of the time on ext4
                allocate(self._file.fileno(), size_bytes)
        except OSError as error:
            self._file = None
            if needed:
                raise _no_room(self.folder, size_bytes, error) from error
            return
        self.windows, self.channels, self.dtype = windows, channels, dtype

    @property
    def is_open(self) -> bool:
        """Whether states are wanted."""
        return self.windows is not None and not self.is_whole

    def put(self, place: Place, first: int, states: torch.Tensor) -> None:
        """Keep states [B, T, D] of the windows from a number on.

        Raises:
            OutputError: they have to be kept, and the disk is full.
        """
        if self._file is None or (self.only_between and place[1]):
            return
        at = self._offset(self._slots.setdefault(place, len(self._slots)), first)
        rounded = states.to(self.dtype).contiguous()
        try:
            self._file.seek(at)
            self._file.write(raw_bytes(rounded))
        except OSError as error:
            if self._is_needed:
                raise _no_room(self.folder, rounded.nbytes, error) from error
            with suppress(OSError):  # of what is yet to be written
                self._file.close()
            self.windows, self._file = None, None

    def covering(self, windows: torch.Tensor) -> KeptStates | None:
        """What is kept of windows [M, T]; None where some of them never ran, or where a part of it is left out."""
        if self.windows is None or not self.is_whole or self.only_between:
            return None
        if windows.shape[1:] != self.windows.shape[1:]:
            return None
        rows = {window.numpy().tobytes(): number for number, window in enumerate(self.windows)}
        wanted = [rows.get(window.numpy().tobytes()) for window in windows]
        return None if None in wanted else KeptStates(self, tuple(row for row in wanted if row is not None))

    def read(self, place: Place, row: int, into: torch.Tensor) -> None:
        """The states [T, D] of one window at a place, of the dtype in which they are kept."""
        assert self._file is not None and into.dtype == self.dtype
        self._file.seek(self._offset(self._slots[place], row))
        if self._file.readinto(raw_bytes(into)) != into.nbytes:  # type: ignore[attr-defined]
            raise AssertionError(f"the states at {place} were never kept")

    def _offset(self, slot: int, row: int) -> int:
        assert self.windows is not None
        count, length = self.windows.shape
        return self.dtype.itemsize * length * self.channels * (slot * count + row)


@dataclass(frozen=True)
class KeptStates:
    """Some of the windows of `DenseStates`."""

    states: DenseStates
    rows: tuple[int, ...]  # their numbers there

    def read(self, place: Place, folder: Path | None = None) -> torch.Tensor:
        """The states [M, T, D] at a place, see `new_states`."""
        assert self.states.windows is not None
        shape = (len(self.rows), self.states.windows.shape[1], self.states.channels)
        return self.read_into(new_states(shape, folder, self.states.dtype), place)

    def read_into(self, found: torch.Tensor, place: Place) -> torch.Tensor:
        """The states at a place of the first windows, as many as there is room for in [m, T, D]."""
        for into, row in zip(found, self.rows, strict=False):
            self.states.read(place, row, into)
        return found


def _no_room(folder: Path, size_bytes: int, error: OSError) -> OutputError:
    return OutputError(
        f"{size_bytes:,} bytes of hidden states cannot be kept in {folder}: {error.strerror or error}. Make room "
        "there, or have them elsewhere or fewer: `prune` with --offload-dir or --calibration-tokens, `recover` with "
        "--output, --teacher-cache or --tokens."
    )


def allocate(file: int, size_bytes: int) -> None:
    """Give a file its size and, where the system can, the blocks for it: a full disk is an error only here."""
    if hasattr(os, "posix_fallocate") and size_bytes:
        os.posix_fallocate(file, 0, size_bytes)
    else:
        os.ftruncate(file, size_bytes)


def give_back_freed_memory() -> None:
    """Let the system have what was freed, between parts of a run that need much memory for different things."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of GNU's C library
    if trim is not None:
        trim(0)
