"""The folder that holds a calibrated run's work, so that a run that was cut short can go on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune_cli.choose.search import Candidate
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import CheckpointError, OutputError, PlanError
from llmprune_cli.family.architecture import Widths
from llmprune_cli.folder.documents import UNFINISHED, read_json, replace_file
from llmprune_cli.folder.shards import raw_bytes
from llmprune_cli.folder.staging import Claim, empty
from llmprune_cli.journal.identity import model_identity, text_identity, versions
from llmprune_cli.options import PruneOptions
from llmprune_cli.plan.target import Plan, Target, read_plan
from llmprune_cli.run.calibration import CalibrationText

RUN, JUDGED = "run.json", "judged.json"
CANDIDATES, PLAN, LAYER = "candidates.json", "plan.json", "layer.json"
# Options that decide nothing of what the folder holds. Text, plan and device have entries of their own in the key.
FREE_OPTIONS = {"calibration", "plan", "save_plan", "output", "overwrite", "dry_run", "max_shard_bytes"}
FREE_OPTIONS |= {"report", "statistics", "resume", "offload_dir"}


@dataclass(frozen=True)
class WorkFolder:
    """Finished parts of one run. Each is renamed into place when all of it is on disk, the record of a layer last."""

    path: Path

    @property
    def statistics(self) -> Path:
        """Where measurements go that the user keeps nowhere else."""
        return self.path / "statistics"

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a candidate was judged, units were chosen or a layer was refitted."""
        return any((self.path / name).exists() for name in (JUDGED, PLAN, LAYER))

    def judged(self, target: Target) -> float | None:
        """How a candidate of a search did; None where it was not tried yet."""
        return dict(self._judged()).get(target)

    def save_judged(self, target: Target, kl: float) -> None:
        """Keep how a candidate of a search did."""
        self._write(JUDGED, {"judged": [(asdict(known), value) for known, value in [*self._judged(), (target, kl)]]})

    def _judged(self) -> list[tuple[Target, float]]:
        path = self.path / JUDGED
        return [(_as_target(known), kl) for known, kl in read_json(path, None)["judged"]] if path.exists() else []

    def choice(self) -> tuple[Plan, tuple[Candidate, ...]] | None:
        """The plan and the candidates that it was one of; None where nothing is chosen yet."""
        if not (self.path / PLAN).exists():
            return None
        stored = read_json(self.path / CANDIDATES, None)["candidates"]
        candidates = tuple(Candidate(_as_target(c["target"]), c["parameters"], c["kl"]) for c in stored)
        return read_plan(self.path / PLAN), candidates

    def save_choice(self, plan: Plan, candidates: Sequence[Candidate]) -> None:
        """Keep what was chosen."""
        self._write(CANDIDATES, {"candidates": [asdict(candidate) for candidate in candidates]})
        self._write(PLAN, plan.to_json())

    def last_layer(self, streams: Iterable[torch.Tensor]) -> tuple[int, list[dict[str, Any]]] | None:
        """The number of the last layer that was refitted, and the reports so far; None where there is none.

        Args:
            streams: their hidden states are replaced by those behind that layer.

        Raises:
            CheckpointError: these cannot be read.
        """
        if not (self.path / LAYER).exists():
            return None
        done = read_json(self.path / LAYER, None)
        path = self._streams(done["number"])
        try:
            with path.open("rb") as file:
                whole = all(file.readinto(raw_bytes(stream)) == stream.nbytes for stream in streams)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Leave out --resume to start over.") from error
        if not whole:
            raise CheckpointError(f"{path} is cut short. Leave out --resume to start over.")
        return done["number"], done["reports"]

    def save_layer(self, number: int, reports: Sequence[dict[str, Any]], streams: Iterable[torch.Tensor]) -> None:
        """Keep that a layer is refitted, whose weights are here already, with the hidden states behind it."""
        replace_file(self._streams(number), map(raw_bytes, streams))
        self._write(LAYER, {"number": number, "reports": reports})
        for path in self.path.glob("streams-*"):
            if path != self._streams(number):
                path.unlink()

    def _streams(self, number: int) -> Path:
        return self.path / f"streams-{number:05d}"

    def _write(self, name: str, document: dict[str, Any]) -> None:
        replace_file(self.path / name, [json.dumps(document).encode()])

    def begin(self, key: dict[str, Any], resume: bool, warn: Callable[[str], None]) -> None:
        """Go on with the work that is here, or clear it away.

        Args:
            key: see `run_key`.

        Raises:
            PlanError: it is that of another run.
        """
        run = {"key": json.loads(json.dumps(key, default=str)), "threads": torch.get_num_threads()}
        if resume and (self.path / RUN).exists():
            begun = read_json(self.path / RUN, None)
            different = _differences(begun["key"], run["key"])
            if different:
                raise PlanError(
                    f"The work in {self.path} cannot go on, because this is another run: {'; '.join(different)}. Give "
                    "what it was begun with, or leave out --resume to start over."
                )
            if begun["threads"] != run["threads"]:
                warn(f"Begun with {begun['threads']} threads, now {run['threads']}: the last digits may differ.")
            for path in self.path.glob(UNFINISHED.format("*", "*")):
                path.unlink()
            return
        if resume:
            warn(f"There is no work of an earlier run in {self.path}; starting at the beginning.")
        elif self.is_worth_keeping:
            warn(f"Replacing the work of an earlier run in {self.path}; --resume would have gone on with it.")
        self.clear()
        self._write(RUN, run)

    def clear(self) -> None:
        """Remove everything, and first that on which the rest depends."""
        (self.path / RUN).unlink(missing_ok=True)
        empty(self.path)


@contextmanager
def kept_work(
    claim: Claim, key: dict[str, Any], resume: bool, keep: bool, warn: Callable[[str], None]
) -> Iterator[WorkFolder]:
    """The work of a run, in the hidden folder of its target.

    It vanishes when the target is written; after an error or an interruption it stays if it holds something of worth.

    Args:
        keep: whether the output is where the user may want to go on later.

    Raises:
        PlanError: see `WorkFolder.begin`.
        OutputError: it cannot be written.
    """
    work = WorkFolder(claim.folder)
    try:
        work.begin(key, resume, warn)
    except OSError as error:
        raise OutputError(f"Cannot write beside {claim.target}: {error.strerror}. Choose another --output.") from error
    try:
        yield work
    except BaseException:
        if keep and work.is_worth_keeping:
            warn(f"The work so far is kept in {work.path}: the same command with --resume goes on from there.")
        else:
            with suppress(OSError):
                work.clear()
        raise


def run_key(subject: Subject, options: PruneOptions, plan: Plan | None, calibration: CalibrationText) -> dict[str, Any]:
    """Everything that decides the work of a run.

    Args:
        plan: that is replayed, if one is.
    """
    key = {
        **model_identity(subject.checkpoint),
        "calibration text": text_identity(calibration.fitted, calibration.held_out),
        "plan": hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest() if plan else None,
        "device": options.layer_device,
        "versions": versions(),
    }
    chosen = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    return {**key, **chosen.pop("request"), **chosen}


def _differences(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two keys, in words."""
    found = []
    for name in begun.keys() | now.keys():
        old, new = begun.get(name), now.get(name)
        if old != new:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (old, new))
            found.append(f"{name} differs" if hashed else f"{name} was {old} and is {new}")
    return sorted(found)


def _as_target(stored: dict[str, Any]) -> Target:
    layers, deviations, protected = (tuple(stored[name]) for name in ("layers", "deviations", "protected"))
    return Target(Widths(**stored["widths"]), layers, deviations, protected)
