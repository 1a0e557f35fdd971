"""The processes of one run, as `accelerate launch` and `torchrun` start them: their shares, and how results meet."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmprune_cli.errors import CheckpointError, LlmpruneError, PeerError, first_line

if TYPE_CHECKING:
    import torch

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what a launcher says
PATIENCE = timedelta(days=30)  # for the first process, which writes alone
PART_BYTES = 2**26  # of hidden states that travel together
GOING_ON, BUG, FINISHED = 0, 1, -1  # how a process stands; other numbers are exit codes of errors

Value = TypeVar("Value")
Name = TypeVar("Name")


@dataclass(frozen=True)
class Processes:
    """The processes that share the windows of text of one run; most runs have one.

    Every method but `share` is called by all of them in the same order. Before anything travels they tell each other
    that all is well, so that none waits for one that failed.
    """

    rank: int = 0  # of this one
    count: int = 1
    local_rank: int = 0  # of this one among those of its machine
    _group: Any = None  # torch's, for what lies in memory

    @property
    def is_first(self) -> bool:
        """Whether this is the one that solves, writes and reports."""
        return self.rank == 0

    def share(self, windows: torch.Tensor, together: int = 1) -> torch.Tensor:
        """This process's consecutive part of windows [N, ...]; it may be empty, though not that of the first process.

        Args:
            together: windows in a batch, which stays whole: the same products are then formed as in one process. What
                half precision rounds would make much of the least difference.
        """
        pieces = -(-len(windows) // together)
        ends = (min(len(windows), together * -(-pieces * rank // self.count)) for rank in (self.rank, self.rank + 1))
        return windows[slice(*ends)]

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace tensors by their sums over all processes."""
        import torch.distributed as distributed

        if self.count == 1:
            return
        self._meet()
        with _lost_peers(), _travelling(tensors) as copies:
            for tensor in copies:
                distributed.all_reduce(tensor, group=self._group_for(tensor))

    def sum_by_name(self, tensors: Mapping[Name, torch.Tensor]) -> dict[Name, torch.Tensor]:
        """Sums over all processes of tensors in memory, each of which some processes may lack."""
        import torch

        sums = dict(tensors)
        for kinds in self.gather({name: (own.shape, own.dtype) for name, own in tensors.items()}):
            for name, (shape, dtype) in kinds.items():
                if name not in sums:
                    sums[name] = torch.zeros(shape, dtype=dtype)
        order = list(self.broadcast(list(sums)))
        self.sum_(*(sums[name] for name in order))
        return {name: sums[name] for name in order}

    def add_up(self, *numbers: float) -> list[float]:
        """Sums over all processes of a few numbers, added in the order of the processes."""
        return [sum(own[1:], own[0]) for own in zip(*self.gather(numbers), strict=True)]

    def gather(self, value: Value) -> list[Value]:
        """A small value of each process, in their order."""
        import torch.distributed as distributed

        if self.count == 1:
            return [value]
        self._meet()
        values: list[Any] = [None] * self.count
        with _lost_peers():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Value) -> Value:
        """The first process's value; those of the others do not count."""
        import torch.distributed as distributed

        if self.count == 1:
            return value
        self._meet()
        values = [value]
        with _lost_peers():
            distributed.broadcast_object_list(values, src=0, group=self._group)
        return value if self.is_first else values[0]

    def copy_from_first_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by that of the first process."""
        import torch.distributed as distributed

        if self.count == 1:
            return
        self._meet()
        with _lost_peers(), _travelling([tensor]) as copies:
            distributed.broadcast(copies[0], src=0, group=self._group_for(copies[0]))

    def collect(self, streams: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """All windows [N, T, D] of each stream, in memory and in order, a part at a time; given in the first process.

        The other processes hand in theirs and are given nothing.
        """
        import torch.distributed as distributed

        for owner, part in self._parts(streams):
            if owner:
                self._meet()
                with _lost_peers():
                    if self.is_first:
                        distributed.recv(part, src=owner, group=self._group)
                    elif owner == self.rank:
                        distributed.send(part, dst=0, group=self._group)
            if self.is_first:
                yield part

    def spread(self, streams: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What `collect` gave, to be filled by the first process; each part then goes to the process that owns it."""
        import torch.distributed as distributed

        for owner, part in self._parts(streams):
            if self.is_first:
                yield part
            if owner:
                self._meet()
                with _lost_peers():
                    if self.is_first:
                        distributed.send(part, dst=owner, group=self._group)
                    elif owner == self.rank:
                        distributed.recv(part, src=0, group=self._group)

    def _parts(self, streams: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Every part of the streams with the process that owns it; in the first process, room for those of others."""
        for stream in streams:
            each = max(1, PART_BYTES // (stream.element_size() * math.prod(stream.shape[1:])))
            for owner, windows in enumerate(self.gather(len(stream))):
                for first in range(0, windows, each):
                    count = min(each, windows - first) if self.is_first else 0
                    is_own = owner == self.rank
                    yield owner, stream[first : first + each] if is_own else stream.new_empty(count, *stream.shape[1:])

    def _group_for(self, tensor: torch.Tensor) -> Any:
        return self._group if tensor.device.type == "cpu" else None  # None: torch's own, which is NCCL's for CUDA

    def _meet(self, code: int = GOING_ON, message: str = "") -> None:
        """Wait for all other processes.

        Args:
            code: how this one stands.
            message: of the error for which it ends.

        Raises:
            PeerError: a process ended for an error; the message is that of the lowest rank.
        """
        import torch
        import torch.distributed as distributed

        if self.count == 1:
            return
        codes = torch.zeros(self.count, dtype=torch.int64)
        codes[self.rank] = code
        with _lost_peers():
            distributed.all_reduce(codes, group=self._group)
            failed = (codes > 0).nonzero().flatten().tolist()
            if not failed:
                assert len(codes.unique()) == 1, "some processes of this run have finished and others wait for them"
                return
            told = [message]
            distributed.broadcast_object_list(told, src=failed[0], group=self._group)
        raise PeerError(told[0], int(codes[failed[0]]))


ALONE = Processes()
_met: list[Processes] = []  # torch knows one group of processes for as long as a process lives


def join(device: str = "auto") -> Processes:
    """Meet the other processes of this run, where a launcher started several.

    Args:
        device: that the user asked for.

    Raises:
        CheckpointError: more processes on this machine than GPUs, or a GPU by number for all of them.
    """
    if _environment()["WORLD_SIZE"] == 1:
        return ALONE
    import torch

    on_gpus = torch.cuda.is_available() and device != "cpu"
    if on_gpus and device not in ("auto", "cuda"):
        raise CheckpointError(f"Each of several processes takes a GPU of its own; leave out --device {device}.")
    here = _environment()["LOCAL_WORLD_SIZE"]
    if on_gpus and here > torch.cuda.device_count():
        raise CheckpointError(
            f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs. Start one for each "
            "GPU, or give --device cpu."
        )
    if not _met:
        _met.append(_meet_all(on_gpus))
    return _met[0]


def _meet_all(on_gpus: bool) -> Processes:
    import atexit

    import torch.distributed as distributed
    from accelerate import PartialState

    state = PartialState(cpu=not on_gpus)
    atexit.register(distributed.destroy_process_group)
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.local_process_index, group)


def _environment() -> dict[str, int]:
    """What the launcher said; without one, what a single process is."""
    said = {name: int(os.environ[name]) for name in LAUNCHED if os.environ.get(name, "").isdecimal()}
    return said if len(said) == len(LAUNCHED) else {"RANK": 0, "WORLD_SIZE": 1}


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one, as the launcher says."""
    return _environment()["RANK"] == 0


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Silence every other process: whatever it would print, the first one prints too."""
    if is_first():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def ended_together() -> Iterator[None]:
    """Let every process of a run end when all do, and for the same error when one fails.

    An interruption is not passed on: launchers interrupt all processes.

    Raises:
        PeerError: another process failed.
    """
    try:
        yield
    except (KeyboardInterrupt, PeerError):
        raise
    except SystemExit as end:
        _tell(end.code if isinstance(end.code, int) and end.code else FINISHED, "It was used wrongly.")
        raise
    except LlmpruneError as error:
        _tell(error.exit_code, str(error))
        raise
    except BaseException:
        _tell(BUG, f"Process {_environment()['RANK']} failed: its traceback says where.")
        raise
    _tell(FINISHED)


def _tell(code: int, message: str = "") -> None:
    """Tell the other processes how this one ends, where it has met them.

    Raises:
        PeerError: this one does not fail, but another does.
    """
    for processes in _met:
        with suppress(*([] if code == FINISHED else [PeerError])):
            processes._meet(code, message)


def leave(code: str | int | None) -> None:
    """End a process that has met others, all of whom are done; any other one goes on.

    Python would take torch's threads apart first, and now and then gloo aborts the process while it does.
    """
    if _met:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


@contextmanager
def _lost_peers() -> Iterator[None]:
    """Report what torch says where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"Another process of this run is gone: killed, or out of memory ({first_line(error)})."
        ) from error


@contextmanager
def _travelling(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors, or copies that can travel, which are copied back when the block ends."""
    copies = [(own if own.device.type in ("cpu", "cuda") else own.cpu()).contiguous() for own in tensors]
    yield copies
    for own, copy in zip(tensors, copies, strict=True):
        if copy is not own:
            own.copy_(copy)
