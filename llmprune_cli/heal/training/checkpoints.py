"""The checkpoints of a training, of which only whole ones count."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.documents import read_json, replace_file
from llmprune_cli.folder.integrity import list_files

MARK, STATE = "whole.json", "trainer_state.json"
CHECKPOINTS = "checkpoint-*"
NUMBERS_PER_WEIGHT = 3  # a weight, and two moments of its gradient
KEPT_TOGETHER = 3  # checkpoints: the best, the last, and the one that is being written


def mark_whole(folder: Path, step: int) -> None:
    """Say that the checkpoint of a step is on disk, and what is in it."""
    own = folder / CHECKPOINTS.replace("*", str(step))
    files = {name: asdict(record) for name, record in list_files(own, {}).items()}
    replace_file(own / MARK, [json.dumps(files).encode()])


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder; None where there is none. What was left half written goes.

    Raises:
        CheckpointError: it is damaged.
    """
    found = sorted(folder.glob(CHECKPOINTS), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / MARK).exists()]
    last = whole[-1] if whole else None
    needed = {path for path in (last, _best(last)) if path is not None}
    for path in found:
        if path in needed:
            _check(path)
        else:
            shutil.rmtree(path)
    return last


def _best(last: Path | None) -> Path | None:
    """The checkpoint that was the best so far, by the last one."""
    if last is None:
        return None
    _check(last)
    best = read_json(last / STATE, None).get("best_model_checkpoint")
    return Path(best) if best else None


def _check(checkpoint: Path) -> None:
    """Hold a checkpoint against its mark.

    Raises:
        CheckpointError: it differs.
    """
    try:
        marked = read_json(checkpoint / MARK, None)
        present = {name: asdict(record) for name, record in list_files(checkpoint, {}).items() if name != MARK}
    except (CheckpointError, OSError):
        marked, present = {}, None
    if marked != present:
        raise CheckpointError(f"{checkpoint} is damaged. Leave out --resume to start over.")


def bytes_of(trained: int) -> int:
    """Bytes that checkpoints take of so many numbers that are trained."""
    return 4 * trained * NUMBERS_PER_WEIGHT * KEPT_TOGETHER
