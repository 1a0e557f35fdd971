"""What a refusal is: a message on stderr, its exit code, and nothing changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cli import BY_MAGNITUDE, Run, run_cli

USAGE, CHECKPOINT, UNSUPPORTED, PLAN, OUTPUT, VERIFICATION, MEMORY, INTERRUPTED = 2, 3, 4, 5, 6, 7, 9, 130


def state_of(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a digest of the files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(run: Run, code: int, *words: str) -> None:
    assert run.code == code, run.stderr
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr, run.stderr


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def assert_prune_refused(model: Path, tmp_path: Path, code: int, *words: str, options: tuple[str, ...] = ()) -> None:
    before = state_of(tmp_path)
    run = run_cli("prune", model, *BY_MAGNITUDE, *(options or ("--pruning-ratio", "0.5")), "--output", tmp_path / "out")
    assert_refused(run, code, *words)
    assert state_of(tmp_path) == before
