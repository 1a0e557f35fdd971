"""The manifest `llmprune.json` in a folder that was written: how it was made, and what was written into it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.documents import first_fault, read_json, write_json

MANIFEST_NAME = "llmprune.json"
MANIFEST_SCHEMA = 1


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Numbers:
    """One number of a model, before and after pruning."""

    before: int
    after: int


@dataclass(frozen=True)
class WidthNumbers:
    """All widths of a model by their names, before and after pruning."""

    before: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a manifest says. What it does not say is None; fields that are unknown here are kept as they are."""

    schema_version: int = MANIFEST_SCHEMA
    source: str | None = None  # the MODEL argument that the weights are from
    revision: str | None = None  # commit of a hub id
    source_fingerprint: str | None = None  # of the source's configuration and headers
    versions: dict[str, Any] | None = None  # of what computed the result
    options: dict[str, Any] | None = None  # that decided what was removed
    widths: WidthNumbers | None = None  # None where nothing was pruned
    layers: tuple[int, ...] | None = None  # the source's layers that stay
    protected_layers: tuple[int, ...] | None = None  # that stay as they are
    parameters: Numbers | None = None
    size_bytes: Numbers | None = None
    deviations: tuple[str, ...] | None = None  # from what was asked for, in words
    dropped_tensors: tuple[str, ...] | None = None  # of the source, which the model does not use
    renamed_tensors: dict[str, str] | None = None  # stored name and name today
    recipe: dict[str, Any] | None = None  # the command and its options, to run it again
    calibration: dict[str, Any] | None = None  # how pruned and dense model compare on text
    healing: dict[str, Any] | None = None  # how it was trained after pruning, and what came of it
    files: dict[str, FileRecord] | None = None  # by their paths within the folder
    export: dict[str, Any] | None = None  # the format that it was exported to, and how that compares
    other: dict[str, Any] = field(default_factory=dict)  # fields that are unknown here

    @property
    def is_pruned(self) -> bool:
        """Whether it tells of pruning, and not of an export alone."""
        return self.widths is not None


_ADAPTER = TypeAdapter(Manifest)
_NAMES = {own.name for own in fields(Manifest)} - {"other"}


def require_manifest(folder: Path) -> None:
    """Make sure that there is a manifest to verify a folder against.

    Raises:
        CheckpointError: there is none.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}, so there is nothing to verify it against. Name one that llmprune wrote."
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        CheckpointError: it is missing, unreadable or not a manifest.
    """
    path = folder / MANIFEST_NAME
    document = read_json(path)
    other = {name: value for name, value in document.items() if name not in _NAMES}
    try:
        return _ADAPTER.validate_python({**{name: document[name] for name in document.keys() & _NAMES}, "other": other})
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a manifest of llmprune ({first_fault(error)}). Remove it.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into a folder."""
    document: dict[str, Any] = _ADAPTER.dump_python(manifest)
    other = document.pop("other")
    said = {name: value for name, value in document.items() if value is not None or name == "revision"}
    write_json(folder / MANIFEST_NAME, {**said, **other})
