"""Where a run reports to: how far it is, and what the user should know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

LOGGER = logging.getLogger("llmprune_cli")


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    stage: str  # what is being done, for people to read
    done: int
    total: int  # bytes, layers or windows
    note: str = ""  # what came of it so far


@dataclass(frozen=True)
class StageEstimate:
    """What one stage of a run will take."""

    name: str
    seconds: float  # of all its times
    times: int  # that it is gone through at most
    chooses: bool  # whether it is a part of the choice of what stays


@dataclass(frozen=True)
class Estimate:
    """What a prune takes on this machine from its start, evaluation, healing and exports aside."""

    seconds: float | None  # None where no layers were timed
    stages: tuple[StageEstimate, ...]
    candidates: int  # that are tried at most; 0 where the widths were given
    memory_bytes: int  # of the process, at most
    device_bytes: int  # of a GPU, at most; 0 where none is used
    disk_bytes: int  # of the folder that is written
    temporary_bytes: int  # of files that go when the run ends


Told = Callable[[Progress], None]


class Listener:
    """Tells how far a run is, and warns."""

    def __init__(
        self,
        told: Told | None = None,
        warn: Callable[[str], None] = LOGGER.warning,
        expect: Callable[[Estimate], None] = lambda estimate: None,
    ) -> None:
        """Report to a function, and warnings to the log.

        Args:
            told: of the beginning of each stage, where nothing is done yet, and of every step; None tells nobody.
            warn: told what the user should know.
            expect: told what a run will take, before it starts.
        """
        self.warn, self.expect = warn, expect
        self._told = told
        self._now = Progress("", 0, 0)

    def within(self, name: str) -> Listener:
        """One that reports here, with a name before that of each stage and before each warning."""
        told, warn = self._told, self.warn
        return Listener(
            told and (lambda now: told(replace(now, stage=f"{name}: {now.stage}"))),
            lambda text: warn(f"{name}: {text}"),
            self.expect,
        )

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""
        self._tell(Progress(name, 0, total))

    def advance(self, amount: int) -> None:
        """More of it is done."""
        if amount:
            self._tell(replace(self._now, done=self._now.done + amount))

    def stand_at(self, done: int, note: str) -> None:
        """So much of it is done in all, with this result so far."""
        self._tell(replace(self._now, done=done, note=note))

    def _tell(self, now: Progress) -> None:
        self._now = now
        if self._told is not None:
            self._told(now)


QUIET = Listener(warn=lambda _: None)
