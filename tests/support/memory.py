"""What was found out about an architecture once is not found out again by the next command of the same process.

Every run of a command traces and proves its model anew, which takes seconds. Both depend on the configuration and the
shapes alone, so that tests share them; each is still computed once in every run of the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.apply import proof, proven_widths
from llmprune_cli.coupling import subject
from llmprune_cli.family.architecture import Architecture


def share_findings(patched: pytest.MonkeyPatch) -> None:
    """Let the commands remember traces and proofs, in files that all processes of a test run read."""
    found: dict[Any, Any] = {}
    shared = Path(os.environ["LLMPRUNE_TESTS_CACHE"], "findings")
    shared.mkdir(exist_ok=True)

    def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*arguments: Any) -> Any:
            key = (function.__name__, *map(_key, arguments))
            file = shared / hashlib.sha256(repr(key).encode()).hexdigest()
            if key not in found:
                found[key] = pickle.loads(file.read_bytes()) if file.exists() else function(*arguments)
                _share(found[key], file)
            return found[key]

        return remembered

    for module, name in (
        (subject, "discover"),
        (subject, "settle_head_dim"),
        (subject, "trace"),
        (proof, "prove"),
        (proof, "check_kept_layers"),
        (proven_widths, "compare"),
        (proven_widths, "disagreements"),
        (proven_widths, "hold_against_torch_pruning"),
    ):
        patched.setattr(module, name, remembering(getattr(module, name)))


def _share(finding: Any, file: Path) -> None:
    """Keep what was found out for other processes; classes that came with a checkpoint are no other's."""
    own = file.with_suffix(f".{os.getpid()}")
    if not file.exists():
        with contextlib.suppress(pickle.PicklingError, AttributeError):
            own.write_bytes(pickle.dumps(finding))
            own.rename(file)


def _key(argument: Any) -> str:
    """What tells two arguments apart: configurations by their settings, all else by how it is written."""
    if isinstance(argument, Architecture):
        settings = {**argument.config.to_dict(), "_name_or_path": ""}  # wherever it lies
        own = replace(argument, config=None)  # type: ignore[arg-type]
        return f"{type(argument.config).__name__} {json.dumps(settings, sort_keys=True, default=str)} {own}"
    if hasattr(argument, "to_dict"):
        return type(argument).__name__ + json.dumps(argument.to_dict(), sort_keys=True, default=str)
    return argument.__qualname__ if callable(argument) else repr(argument)
