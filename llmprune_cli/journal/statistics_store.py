"""A folder that remembers what was measured on calibration text, for other targets of the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune_cli.choose.activity import Activity
from llmprune_cli.choose.magnitude import Scores
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import replace_file
from llmprune_cli.journal.identity import model_identity, text_identity, versions

HEADER = "llmprune"  # name of the JSON in a file's header that says what it holds
LAYERS = "layers"  # name of the tensor with one number for each layer; scores are named `width/instance`


@dataclass(frozen=True)
class StatisticsStore:
    """One file for each kind of measurement and all that it depends on."""

    folder: Path
    key: dict[str, Any]  # the model, the text and whatever else decides the numbers, ready for JSON
    warn: Callable[[str], None]

    def recall(self, kind: str, measure: Callable[[], Activity]) -> Activity:
        """What was measured before under this key, or else what is measured now, which is kept.

        A file that cannot be read is worth no more than none: what it held can be measured again.

        Args:
            kind: what is measured, a part of the key.

        Raises:
            OutputError: the folder cannot be written.
        """
        key = json.dumps({"kind": kind, **self.key}, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if path.exists():
            try:
                return _read(path, key)
            except ValueError as error:
                self.warn(f"{path} is damaged ({error}); measuring anew.")
        activity = measure()
        _write(path, key, activity)
        return activity


def statistics_key(checkpoint: Checkpoint, windows: torch.Tensor, device: str) -> dict[str, Any]:
    """The key of what is measured on token ids [N, T]."""
    return {
        **model_identity(checkpoint),
        "text": text_identity(windows),
        "device": device,
        "versions": versions(),
    }


def _read(path: Path, key: str) -> Activity:
    """What a file holds.

    Raises:
        ValueError: it is not what `_write` left there for this key.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            if header["key"] != key:
                raise ValueError("it was made for something else")
            scores: Scores = {}
            for name in header["order"]:
                width, _, instance = name.partition("/")
                scores.setdefault(width, {})[instance] = file.get_tensor(name)
            return Activity(scores, tuple(file.get_tensor(LAYERS).tolist()))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def _write(path: Path, key: str, activity: Activity) -> None:
    from safetensors.torch import save

    named = ((f"{width}/{instance}", own) for width, by in activity.scores.items() for instance, own in by.items())
    tensors = {name: own.contiguous() for name, own in named}
    # safetensors sorts tensors by name; plans list the choices of units in the order of the scores
    header = json.dumps({"key": key, "order": list(tensors)})
    tensors[LAYERS] = torch.tensor(activity.influence, dtype=torch.float64)
    replace_file(path, [save(tensors, {HEADER: header})])
