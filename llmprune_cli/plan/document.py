"""The plan: how wide every layer becomes and which units stay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llmprune_cli.coupling.trace import Instance, Keep
from llmprune_cli.errors import CheckpointError
from llmprune_cli.family.widths import Width, Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import read_json, replace_file

PLAN_VERSION = 3


@dataclass(frozen=True)
class Plan:
    """Everything that surgery needs to know; JSON in, JSON out."""

    fingerprint: str  # SHA-256 of the source's configuration and tensor headers
    before: Widths
    after: Widths
    importance: str
    seed: int
    deviations: tuple[str, ...]
    layers: tuple[int, ...]  # numbers of the layers that stay
    protected: tuple[int, ...]  # numbers of the layers among them that no one may change
    keep: Keep

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the widths that shrink."""
        return self.after.changed_from(self.before)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """The plan in a file, checked for consistency.

        Raises:
            CheckpointError: it is not a plan, or contradicts itself.
        """
        return read_plan(Path(path))

    def save(self, path: Path | str) -> None:
        """Write it as JSON.

        Raises:
            OutputError: the file cannot be written.
        """
        save_plan(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """A document for `read_plan`."""
        return {"plan_version": PLAN_VERSION, **_ADAPTER.dump_python(self, mode="json")}


_ADAPTER = TypeAdapter(Plan)


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan.

    Raises:
        OutputError: the file cannot be written.
    """
    replace_file(path, [(json.dumps(plan.to_json()) + "\n").encode()], "Choose another --save-plan.")


def most_plan_bytes(widths: Widths) -> int:
    """How large a plan for a model may be: a number for each unit that can be chosen, and room for the rest."""
    units: int = sum(asdict(widths).values())
    return 2**20 + 12 * units * widths.num_hidden_layers * max(1, widths.num_experts)


def read_plan(path: Path, most_bytes: int | None = None) -> Plan:
    """The plan in a file, checked for consistency.

    Args:
        most_bytes: see `most_plan_bytes`; None for one of a run of its own.

    Raises:
        CheckpointError: not a plan, or one whose counts contradict its indices.
    """
    document = read_json(path, most_bytes)
    if document.pop("plan_version", None) != PLAN_VERSION:
        raise CheckpointError(f"{path} is not a plan of version {PLAN_VERSION}. Make one with --save-plan.")
    try:
        before, after = (Widths(**document.pop(name)) for name in ("before", "after"))
        keep = {
            width: {Instance.parse(instance): tuple(units) for instance, units in chosen.items()}
            for width, chosen in document.pop("keep").items()
        }
        deviations = tuple(map(str, document.pop("deviations")))
        layers, protected = tuple(document.pop("layers")), tuple(document.pop("protected"))
        plan = Plan(
            before=before,
            after=after,
            deviations=deviations,
            layers=layers,
            protected=protected,
            keep=keep,
            **document,
        )
        numbers = [
            *layers,
            *protected,
            *(unit for choice in keep.values() for units in choice.values() for unit in units),
        ]
        consistent = all(type(n) is int for n in (*numbers, *asdict(before).values(), *asdict(after).values()))
        consistent &= type(plan.importance) is type(plan.fingerprint) is str and type(plan.seed) is int
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a plan ({error!r}). Make one with --save-plan.") from error
    choices = {(width, instance): kept for width, choice in keep.items() for instance, kept in choice.items()}
    for (width, instance), kept in {**choices, (Width.LAYERS, Instance()): layers}.items():
        whole, part = getattr(before, width, 0), getattr(after, width, 0)
        inside = consistent and len(kept) == part and kept == tuple(sorted(set(kept)))
        if not inside or (kept and not 0 <= kept[0] <= kept[-1] < whole):
            raise CheckpointError(f"{path}: the units kept of {width} {instance} do not match its widths.")
    if not set(protected) <= set(layers) or (protected and set(plan.changed) - {Width.LAYERS}):
        raise CheckpointError(f"{path}: layers that are protected would change.")
    return plan


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what a plan depends on: the configuration and every tensor's name, shape and dtype."""
    config = {name: value for name, value in checkpoint.config.to_dict().items() if not name.startswith("_")}
    config.pop("transformers_version", None)
    headers = sorted((entry.name, entry.shape, entry.dtype) for entry in checkpoint.entries)
    return hashlib.sha256(json.dumps([config, headers], sort_keys=True, default=str).encode()).hexdigest()
