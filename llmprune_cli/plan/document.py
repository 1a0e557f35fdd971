"""The plan: how wide every layer becomes and which units stay."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from llmprune_cli.coupling.trace import Instance, Keep, Numbers
from llmprune_cli.errors import CheckpointError
from llmprune_cli.family.widths import FIELDS, Width, Widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import first_fault, place_of, replace_file
from llmprune_cli.plan.stored import MAKE_ONE, PLAN_VERSION, read_stored


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Vocabulary:
    """The tokens that stay."""

    before: int  # rows of the embedding
    kept: Numbers  # numbers of the tokens that stay, in their order, which get the numbers from 0
    tokenizer: str = ""  # SHA-256 of all tokens with their numbers; empty of a twin, which has none


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Plan:
    """Everything that surgery needs to know; JSON in, JSON out."""

    fingerprint: str  # SHA-256 of the source's configuration and tensor headers
    before: Widths
    after: Widths
    importance: str
    seed: int
    deviations: tuple[str, ...]
    layers: Numbers  # numbers of the layers that stay
    protected: Numbers  # numbers of the layers among them that no one may change
    keep: Keep
    vocabulary: Vocabulary | None = None  # None: all tokens stay
    weights: str | None = None  # SHA-256 of a sample of the weights that units were chosen by; None: of any

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the widths that shrink."""
        return self.after.changed_from(self.before)

    @property
    def choices(self) -> Keep:
        """The units that stay, layers among them: what has a share for each layer loses those of layers that go."""
        return {**self.keep, Width.LAYERS: {Instance(): self.layers}}

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


def most_plan_bytes(widths: Widths, tokens: int) -> int:
    """How large a plan for a model may be: a number for each unit that can be chosen, and room for the rest.

    Args:
        tokens: in the vocabulary.
    """
    units: int = sum(asdict(widths).values())
    return 2**20 + 12 * (units * widths.num_hidden_layers * max(1, widths.num_experts) + tokens)


def read_plan(path: Path, most_bytes: int | None = None) -> Plan:
    """The plan in a file, checked for consistency.

    Args:
        most_bytes: see `most_plan_bytes`; None for one of a run of its own.

    Raises:
        CheckpointError: not a plan, or one whose counts contradict its indices.
    """
    document = read_stored(path, most_bytes)
    try:
        plan = _ADAPTER.validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a plan ({first_fault(error)}). {MAKE_ONE}") from error
    for contradiction in _contradictions(plan):
        raise CheckpointError(f"{path} contradicts itself: {contradiction}. Make a plan anew with --save-plan.")
    return plan


def _contradictions(plan: Plan) -> Iterator[str]:
    """Where the units that stay are not those that the widths speak of, in words."""
    choices: list[tuple[str, str, Numbers]] = [("layers", Width.LAYERS, plan.layers)]
    for width, chosen in plan.keep.items():
        if width not in FIELDS:
            yield f"{place_of('keep', width)} is not a width"
        choices += [(place_of("keep", width, str(instance)), width, kept) for instance, kept in chosen.items()]
    for place, width, kept in choices:
        whole, part = getattr(plan.before, width), getattr(plan.after, width)
        if len(kept) != part:
            yield f"{place} lists {len(kept)} of {whole}, but after.{width} is {part}"
        if kept != tuple(sorted(set(kept))) or (kept and not 0 <= kept[0] <= kept[-1] < whole):
            yield f"{place} must be different numbers from 0 to {whole - 1} in their order"
    whole, part = asdict(plan.before), asdict(plan.after)
    for width in (width for width, count in part.items() if count < 1 <= whole[width]):
        yield f"after.{width} is {part[width]}, and one must stay"
    yield from _lone_heads(plan)
    if plan.vocabulary is not None:
        kept, rows = plan.vocabulary.kept, plan.vocabulary.before
        if not kept or kept != tuple(sorted(set(kept))) or not 0 <= kept[0] <= kept[-1] < rows:
            yield f"vocabulary.kept must be different numbers from 0 to {rows - 1} in their order"
    if gone := sorted(set(plan.protected) - set(plan.layers)):
        yield f"protected has layer {gone[0]}, which is not in layers"
    if plan.protected and (shrinking := set(plan.changed) - {Width.LAYERS}):
        yield f"layers are protected, but {', '.join(sorted(shrinking))} shrink in all of them"


def _lone_heads(plan: Plan) -> Iterator[str]:
    """Where the query heads that stay are not those of the KV groups that stay, as many of each, in words."""
    per_group, after = plan.before.heads_per_group, plan.after.heads_per_group
    for instance, groups in plan.keep.get(Width.GROUPS, {}).items():
        heads = plan.keep.get(Width.HEADS, {}).get(instance, ())
        if Counter(head // per_group for head in heads) != Counter(dict.fromkeys(groups, after)):
            place = place_of("keep", Width.HEADS, str(instance))
            yield f"{place} must name {after} query heads of each KV group that stays, and no other"


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what a plan depends on: the configuration and every tensor's name, shape and dtype."""
    config = {name: value for name, value in checkpoint.config.to_dict().items() if not name.startswith("_")}
    config.pop("transformers_version", None)
    headers = sorted((entry.name, entry.shape, entry.dtype) for entry in checkpoint.entries)
    return hashlib.sha256(json.dumps([config, headers], sort_keys=True, default=str).encode()).hexdigest()
