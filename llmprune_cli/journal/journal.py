"""What a run remembers: for `--resume` beside its output, for `--statistics` where the user says."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmprune_cli.errors import CheckpointError, NoNumbersError, OutputError, PlanError, first_line
from llmprune_cli.folder.documents import read_json, replace_file
from llmprune_cli.folder.shards import raw_bytes
from llmprune_cli.folder.staging import Claim, empty, hidden_folder
from llmprune_cli.journal.forms import Form
from llmprune_cli.journal.keys import differences
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.progress import LOGGER

RUN, LAYER, STATISTICS = "run.json", "layer.json", "statistics"
# What makes it worth going on; of a sweep, the work on its points.
STARTED = (
    f"{STATISTICS}/*",
    "judged-*",
    "choice*",
    LAYER,
    "block-*",
    "learning-rates*",
    "checkpoint-*/whole.json",
    "teacher/teacher.json",
    "points/*/*",
    "point-*",
)

WORK_PER_RECORD = 50  # how much longer the refit of layers takes than the record of their hidden states, at least

Value = TypeVar("Value")


@dataclass(frozen=True)
class Journal:
    """Finished parts of one run, as all its processes see them: the first one's records decide, and it alone writes.

    Each part is renamed into place when all of it is on disk, the record of a layer last.
    """

    processes: Processes = ALONE
    folder: Path | None = None  # of this run, in its first process; None where nothing is kept
    statistics: Path | None = None  # the user's own, for measurements
    # By folder, when the streams of a refit were recorded last, and how many seconds that took.
    _saved: dict[Path | None, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)

    def recall(self, name: str, form: Form[Value], make: Callable[[], Value]) -> Value:
        """What this run has made already under a name, or else what all processes make now, which is kept.

        Raises:
            CheckpointError: the record is damaged.
            OutputError: it cannot be written.
        """
        return self._recall(self.folder, name, form, make)

    @property
    def remembers_measurements(self) -> bool:
        """Whether any process keeps them."""
        return self.processes.broadcast(self.statistics is not None or self.folder is not None)

    def recall_measured(self, key: dict[str, Any], form: Form[Value], make: Callable[[], Value]) -> Value:
        """The same for a measurement, which other runs may have made.

        A file that cannot be read is worth no more than none: what it held can be measured again.

        Args:
            key: everything that decides the result, with its `kind`.
        """
        own = self.folder / STATISTICS if self.folder is not None else None
        mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._recall(self.statistics or own, f"{key.get('kind')}-{mark[:16]}", form, make, is_needed=False)

    def _recall(
        self, folder: Path | None, name: str, form: Form[Value], make: Callable[[], Value], is_needed: bool = True
    ) -> Value:
        path = folder / f"{name}{form.suffix}" if folder is not None and self.processes.is_first else None
        known: Value | None = None
        if path is not None and path.exists():
            try:
                known = form.read(path)
            except ValueError as error:
                if is_needed:
                    raise CheckpointError(
                        f"The record {name} in {folder} is damaged ({first_line(error)}). Leave out --resume to start "
                        "over."
                    ) from error
                LOGGER.warning(f"{path} is damaged ({error}); measuring anew.")
        known = self.processes.broadcast(known)
        if known is None:
            known = make()
            if path is not None:
                form.write(path, known)
            known = self.processes.broadcast(known)
        return known

    def last_layer(self, streams: Sequence[torch.Tensor]) -> tuple[int, list[dict[str, Any]]] | None:
        """The number of the last layer that was refitted, and the reports so far; None where there is none.

        Args:
            streams: their hidden states, of this process's windows, are replaced by those behind that layer. On disk
                they are in the order of the windows, so that another number of processes can go on.

        Raises:
            CheckpointError: these cannot be read.
        """
        if not self.processes.broadcast(self.folder is not None and (self.folder / LAYER).exists()):
            return None
        parts, done = self.processes.spread(streams), None
        if self.folder is not None:
            record = read_json(self.folder / LAYER, None)
            done = record["number"], record["reports"]
            _read_streams(_streams_file(self.folder, done[0]), parts)
        else:
            deque(parts, maxlen=0)
        return self.processes.broadcast(done)

    def save_layer(
        self,
        number: int,
        reports: Sequence[dict[str, Any]],
        streams: Sequence[torch.Tensor],
        is_last: bool = False,
    ) -> None:
        """Keep that a layer is refitted, whose weights are here already, with the hidden states behind it.

        Where that takes long for the little that would be lost, it is done after one of the next layers.
        """
        started = time.monotonic()
        last, took = self._saved.get(self.folder, (started, 0.0))
        if not self.processes.broadcast(is_last or started - last >= WORK_PER_RECORD * took):
            return
        parts = self.processes.collect(streams)
        if self.folder is None:
            deque(parts, maxlen=0)
            return
        own = _streams_file(self.folder, number)
        replace_file(own, map(raw_bytes, parts))
        replace_file(self.folder / LAYER, [json.dumps({"number": number, "reports": reports}).encode()])
        for path in self.folder.glob("streams-*"):
            if path != own:
                path.unlink()
        self._saved[self.folder] = time.monotonic(), time.monotonic() - started


def _streams_file(folder: Path, number: int) -> Path:
    return folder / f"streams-{number:05d}"


def _read_streams(path: Path, streams: Iterable[torch.Tensor]) -> None:
    try:
        with path.open("rb") as file:
            whole = all(file.readinto(raw_bytes(stream)) == stream.nbytes for stream in streams)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Leave out --resume to start over.") from error
    if not whole:
        raise CheckpointError(f"{path} is cut short. Leave out --resume to start over.")


@contextmanager
def kept_folder(
    claim: Claim,
    key: dict[str, Any],
    resume: bool,
    may_go_on: bool,
    final: tuple[type[BaseException], ...] = (NoNumbersError,),
) -> Iterator[Path]:
    """The folder of a run's journal: the hidden one of its target.

    It vanishes when the target is written; after an error or an interruption it stays if it holds something of worth,
    and the same command would not come to the same error.

    Args:
        key: see `run_key`.
        may_go_on: whether the output is where the user may want to go on later.
        final: errors to which the same work would only come again.

    Raises:
        PlanError: it holds the work of another run, with which this one was to go on.
        OutputError: it cannot be written.
    """
    folder = claim.folder
    try:
        _begin(folder, key, resume)
    except OSError as error:
        raise OutputError(f"Cannot write beside {claim.target}: {error.strerror}. Choose another --output.") from error
    try:
        yield folder
    except BaseException as error:
        if may_go_on and not isinstance(error, final) and _is_worth_keeping(folder):
            LOGGER.warning(f"The work so far is kept in {folder}: the same command with --resume goes on from there.")
        else:
            with suppress(OSError):
                _clear(folder)
        raise


def _begin(folder: Path, key: dict[str, Any], resume: bool) -> None:
    """Go on with the work that is here, or clear it away."""
    run = {"key": json.loads(json.dumps(key, default=str)), "threads": torch.get_num_threads()}
    if resume and (folder / RUN).exists():
        begun = read_json(folder / RUN, None)
        different = differences(begun["key"], run["key"])
        if different:
            raise other_run(folder, different)
        if begun["threads"] != run["threads"]:
            LOGGER.warning(f"Begun with {begun['threads']} threads, now {run['threads']}: the last digits may differ.")
        for path in folder.glob(hidden_folder(Path("*")).name):
            shutil.rmtree(path)
        return
    if resume:
        LOGGER.warning(f"There is no work of an earlier run in {folder}; starting at the beginning.")
    elif _is_worth_keeping(folder):
        LOGGER.warning(f"Replacing the work of an earlier run in {folder}; --resume would have gone on with it.")
    _clear(folder)
    replace_file(folder / RUN, [json.dumps(run).encode()])


def other_run(folder: Path, different: Sequence[str]) -> PlanError:
    """What is said where the work in a folder is that of another run.

    Args:
        different: in what, see `differences`.
    """
    return PlanError(
        f"The work in {folder} cannot go on, because this is another run: {'; '.join(different)}. Give what it was "
        "begun with, or leave out --resume to start over."
    )


def _is_worth_keeping(folder: Path) -> bool:
    """Whether there is anything to go on from, see `STARTED`."""
    return any(next(folder.glob(pattern), None) is not None for pattern in STARTED)


def _clear(folder: Path) -> None:
    """Remove everything, and first that on which the rest depends."""
    (folder / RUN).unlink(missing_ok=True)
    empty(folder)
