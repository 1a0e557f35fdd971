"""What was written, read back: a checksum of every file, kept in the manifest and compared later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError, VerificationError
from llmprune_cli.folder.checkpoint import MANIFEST_NAME, read_index, read_json
from llmprune_cli.folder.staging import fsync, is_listed

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".onnx", ".data", ".pt2")
SHOWN = 5  # differences that a message names


@dataclass(frozen=True)
class Integrity:
    """What was compared with a manifest, and found to be as it says."""

    files: int
    size_bytes: int
    parameters: int | None  # by the headers; None where the weights are not safetensors


def list_files(folder: Path, written: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a folder, read back from the disk.

    Args:
        written: SHA-256 of what was meant to be written, by file name, where that is known.

    Raises:
        VerificationError: a file is another one than was written.
    """
    listed = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not is_listed(name):
            continue
        _leave_cache(path)
        found = _checksum(path)
        if written.get(name, found) != found:
            raise VerificationError(f"{name} reads back as something else than was written. Check the disk.")
        listed[name] = {"size_bytes": path.stat().st_size, "sha256": found}
    return listed


def check_files(folder: Path) -> Integrity:
    """Hold a folder against the manifest in it.

    Raises:
        CheckpointError: there is none, or none with checksums.
        VerificationError: a file is missing, has changed, or has come since; or the headers say something else.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}, so there is nothing to verify it against.")
    manifest = read_json(folder / MANIFEST_NAME)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise CheckpointError(f"{folder / MANIFEST_NAME} holds no checksums, so there is nothing to verify against.")
    wrong = [problem for name, entry in listed.items() if (problem := _problem(folder, name, entry))]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wrong += [f"{name} was not written with it" for name in sorted(present - {*listed}) if name.endswith(WEIGHTS)]
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise VerificationError(f"{folder} is not what was written: {'; '.join(wrong[:SHOWN])}{more}.")
    entries = read_index(folder)
    parameters = sum(entry.numel for entry in entries) if entries else None
    sides = manifest.get("parameters")
    stated = sides.get("after") if isinstance(sides, dict) else None
    if parameters is not None and stated is not None and parameters != stated:
        raise VerificationError(f"{folder} has {parameters:,} parameters, and {MANIFEST_NAME} says {stated:,}.")
    return Integrity(len(listed), sum(entry["size_bytes"] for entry in listed.values()), parameters)


def _problem(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, in words; None where nothing is."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name} lies outside of it"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry.get("size_bytes"):
        return f"{name} has {path.stat().st_size:,} bytes"
    return None if _checksum(path) == entry.get("sha256") else f"{name} has other contents"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leave_cache(path: Path) -> None:
    """Have a file read from the disk next time, where the system can: its cache repeats what it was told."""
    fsync(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
