"""What was written, read back: a checksum of every file, kept in the manifest and compared later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmprune_cli.errors import CheckpointError, VerificationError
from llmprune_cli.folder.documents import fsync
from llmprune_cli.folder.manifest import MANIFEST_NAME, FileRecord, read_manifest, require_manifest
from llmprune_cli.folder.shards import read_index
from llmprune_cli.folder.staging import is_listed

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".onnx", ".onnx_data", ".data", ".pt2")
SHOWN = 5  # differences that a message names


@dataclass(frozen=True)
class Integrity:
    """What was compared with a manifest, and found to be as it says."""

    files: int
    size_bytes: int
    parameters: int | None  # by the headers; None where the weights are not safetensors


def list_files(folder: Path, written: Mapping[str, str]) -> dict[str, FileRecord]:
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
        listed[name] = FileRecord(path.stat().st_size, found)
    return listed


def check_files(folder: Path) -> Integrity:
    """Hold a folder against the manifest in it.

    Raises:
        CheckpointError: there is none, or none with checksums.
        VerificationError: a file is missing, has changed, or has come since; or the headers say something else.
    """
    require_manifest(folder)
    manifest = read_manifest(folder)
    listed = manifest.files
    if listed is None:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME} holds no checksums, and nothing can be verified. Name one that llmprune wrote."
        )
    wrong = [problem for name, entry in listed.items() if (problem := _problem(folder, name, entry))]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wrong += [f"{name} was not written with it" for name in sorted(present - {*listed}) if name.endswith(WEIGHTS)]
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise VerificationError(f"{folder} is not what was written: {'; '.join(wrong[:SHOWN])}{more}.")
    entries = read_index(folder)
    parameters = sum(entry.numel for entry in entries) if entries else None
    stated = manifest.parameters.after if manifest.parameters else None
    if parameters is not None and stated is not None and parameters != stated:
        raise VerificationError(f"{folder} has {parameters:,} parameters, and {MANIFEST_NAME} says {stated:,}.")
    return Integrity(len(listed), sum(entry.size_bytes or 0 for entry in listed.values()), parameters)


def _problem(folder: Path, name: str, entry: FileRecord) -> str | None:
    """What is wrong with a file, in words; None where nothing is."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{name} lies outside of it"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry.size_bytes:
        return f"{name} has {path.stat().st_size:,} bytes"
    return None if _checksum(path) == entry.sha256 else f"{name} has other contents"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leave_cache(path: Path) -> None:
    """Have a file read from the disk next time, where the system can: its cache repeats what it was told."""
    fsync(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
