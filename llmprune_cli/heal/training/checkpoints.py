"""The checkpoints of a training, of which only whole ones count."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.documents import read_json, replace_file
from llmprune_cli.folder.integrity import list_files

MARK, STATE, WEIGHTS = "whole.json", "trainer_state.json", "model.safetensors"
CHECKPOINTS = "checkpoint-*"
NUMBERS_PER_WEIGHT = 3  # a weight, and two moments of its gradient
KEPT_TOGETHER = 3  # checkpoints: the best, the last, and the one that is being written


def mark_whole(folder: Path, step: int) -> None:
    """Say that the checkpoint of a step is on disk, and what is in it."""
    own = folder / CHECKPOINTS.replace("*", str(step))
    replace_file(own / MARK, [json.dumps(_records(own)).encode()])


def keep_last(folder: Path, step: int, best: str | None) -> None:
    """Remove all checkpoints in a folder but that of a step, which is whole, and the best one.

    Args:
        best: its path, as the Trainer names it.
    """
    kept = {CHECKPOINTS.replace("*", str(step)), Path(best).name if best else ""}
    for path in folder.glob(CHECKPOINTS):
        if path.name not in kept:
            shutil.rmtree(path)


def has_ended(checkpoint: Path) -> bool:
    """Whether a training was over when its checkpoint was written."""
    control = read_json(checkpoint / STATE, None)["stateful_callbacks"]["TrainerControl"]
    return bool(control["args"]["should_training_stop"])


def last_checkpoints(folder: Path) -> tuple[Path | None, Path | None]:
    """The last whole checkpoint in a folder and the best one; None where there is none. What was half written goes.

    Raises:
        CheckpointError: it is damaged.
    """
    found = sorted(folder.glob(CHECKPOINTS), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / MARK).exists()]
    last = whole[-1] if whole else None
    best = _best(last)
    needed = {path for path in (last, best) if path is not None}
    for path in needed:
        _check(path)
    for path in set(found) - needed:
        shutil.rmtree(path)
    return last, best


def _best(last: Path | None) -> Path | None:
    """The checkpoint that was the best so far, by the last one, which names it by where the folder was then."""
    if last is None:
        return None
    _check(last)
    named = read_json(last / STATE, None).get("best_model_checkpoint")
    return last.parent / Path(named).name if named else None


def _check(checkpoint: Path) -> None:
    """Hold a checkpoint against its mark.

    Raises:
        CheckpointError: it differs.
    """
    try:
        marked = read_json(checkpoint / MARK, None)
        present = _records(checkpoint)
    except (CheckpointError, OSError):
        marked, present = {}, None
    if marked != present:
        raise CheckpointError(f"{checkpoint} is damaged. Leave out --resume to start over.")


def _records(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file but the mark."""
    return {name: asdict(record) for name, record in list_files(checkpoint, {}).items() if name != MARK}


def bytes_of(trained: int) -> int:
    """Bytes that checkpoints take of so many numbers that are trained."""
    return 4 * trained * NUMBERS_PER_WEIGHT * KEPT_TOGETHER
