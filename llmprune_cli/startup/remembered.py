"""What earlier runs found out, kept in the user's cache: files that may be removed at any time."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmprune_cli import __version__
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.folder.documents import replace_file

PACKAGES = ("torch", "transformers", "safetensors", "gguf")  # that decide what is found out
SETTLED_NS = 2 * 10**9  # after which a file that is written to again has another time

Value = TypeVar("Value")


def remembered_in(kind: str, *known: Any) -> Path | None:
    """The file for what follows from some values, this code and the versions of its libraries; None without a cache.

    Args:
        kind: how the file's name begins.
    """
    cache = _cache()
    if cache is None:
        return None
    package = Path(__file__).parents[1]
    code = [(str(path.relative_to(package)), *_stamp(path)) for path in sorted(package.rglob("*.py"))]
    key = json.dumps([known, sys.version, __version__, versions(), code], sort_keys=True, default=str)
    return cache / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def statistics_folder() -> Path | None:
    """Where a dry run keeps what it measured, for the run that goes on from it; None without a cache to write to."""
    cache = _cache()
    if cache is None:
        return None
    folder = cache / "statistics"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def versions() -> list[str]:
    """The versions of the libraries, as far as they are installed."""
    found = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def _cache() -> Path | None:
    """The folder of this program in the user's cache, by the XDG base directory specification."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):  # no home
        return (named if named.is_absolute() else Path.home() / ".cache") / "llmprune"
    return None


def state_of(model: Path) -> list[Any] | None:
    """What is different once a model's file, or one in its folder, was written to, replaced, added or removed.

    None where it is no file or folder, or something is so new that it may be written to without a trace.
    """
    try:
        paths = [model, *(sorted(model.iterdir()) if model.is_dir() else ())]
        stamps = [(str(path), *_stamp(path)) for path in paths]
    except (OSError, ValueError):  # no such file, or a name that none can have
        return None
    newest = max(max(stamp[-2:]) for stamp in stamps)
    return stamps if newest < time.time_ns() - SETTLED_NS else None


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Inode, bytes, and when the content and the inode last changed, in nanoseconds."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def recall(place: Path | None, kind: type[Value]) -> Value | None:
    """What a file remembers; None where there is none that can be read."""
    try:
        return None if place is None else TypeAdapter(kind).validate_json(place.read_bytes())
    except (OSError, ValidationError):
        return None


def remember(place: Path | None, found: Any) -> None:
    """Write it, if the user's cache can be written."""
    if place is None:
        return
    with suppress(OSError, LlmpruneError):
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, [TypeAdapter(type(found)).dump_json(found)])
