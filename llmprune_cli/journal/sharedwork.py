"""The work folder as all processes of a run see it: the first one's records decide, and it alone writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune_cli.choose.search import Candidate
from llmprune_cli.journal.workfolder import LAYER, WorkFolder
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.target import Target
from llmprune_cli.processes import ALONE, Processes


@dataclass(frozen=True)
class SharedWork:
    """See `WorkFolder`, whose methods these are.

    Hidden states are kept in the order of the windows, whoever has them, so that another number of processes can go on.
    """

    folder: WorkFolder | None  # of the first process; None in the others
    processes: Processes = ALONE

    @property
    def path(self) -> Path | None:
        """Where finished parts lie."""
        return self.folder.path if self.folder else None

    @property
    def statistics(self) -> Path | None:
        """Where measurements go that the user keeps nowhere else."""
        return self.folder.statistics if self.folder else None

    def judged(self, target: Target) -> float | None:
        """How a candidate of a search did; None where it was not tried yet."""
        return self.processes.broadcast(self.folder.judged(target) if self.folder else None)

    def save_judged(self, target: Target, kl: float) -> None:
        """Keep how a candidate of a search did."""
        if self.folder:
            self.folder.save_judged(target, kl)

    def choice(self) -> tuple[Plan, tuple[Candidate, ...]] | None:
        """The plan and the candidates that it was one of; None where nothing is chosen yet."""
        return self.processes.broadcast(self.folder.choice() if self.folder else None)

    def save_choice(self, plan: Plan, candidates: Sequence[Candidate]) -> None:
        """Keep what was chosen."""
        if self.folder:
            self.folder.save_choice(plan, candidates)

    def last_layer(self, streams: Sequence[torch.Tensor]) -> tuple[int, list[dict[str, Any]]] | None:
        """The number of the last layer that was refitted, and the reports so far; None where there is none.

        Args:
            streams: their hidden states, of this process's windows, are replaced by those behind that layer.

        Raises:
            CheckpointError: these cannot be read.
        """
        if not self.processes.broadcast(self.folder is not None and (self.folder.path / LAYER).exists()):
            return None
        parts, done = self.processes.spread(streams), None
        if self.folder:
            done = self.folder.last_layer(parts)
        else:
            deque(parts, maxlen=0)
        return self.processes.broadcast(done)

    def save_layer(self, number: int, reports: Sequence[dict[str, Any]], streams: Sequence[torch.Tensor]) -> None:
        """Keep that a layer is refitted, whose weights are here already, with the hidden states behind it."""
        parts = self.processes.collect(streams)
        if self.folder:
            self.folder.save_layer(number, reports, parts)
        else:
            deque(parts, maxlen=0)
