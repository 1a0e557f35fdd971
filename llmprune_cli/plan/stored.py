"""The file of a plan, as far as it is read without any large library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.documents import read_json

PLAN_VERSION = 3
MAKE_ONE = "Make one with --save-plan."


def read_stored(path: Path, most_bytes: int | None = None) -> dict[str, Any]:
    """What a file says that is of a plan's version.

    Args:
        most_bytes: how large it may be; None: as it is.

    Raises:
        CheckpointError: it is no such file.
    """
    document = read_json(path, most_bytes, MAKE_ONE)
    if document.pop("plan_version", None) != PLAN_VERSION:
        raise CheckpointError(f"{path} is not a plan of version {PLAN_VERSION}. {MAKE_ONE}")
    return document
