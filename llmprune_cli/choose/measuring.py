"""What an importance works with, and what it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmprune_cli.choose.magnitude import check_scores
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.folder.documents import replace_file
from llmprune_cli.journal.keys import statistics_key
from llmprune_cli.plan.units import Scores
from llmprune_cli.run.workbench import Workbench

ORDER = "llmprune"  # name of the JSON in a file's header that lists its scores in their order
LAYERS = "layers"  # name of the tensor with one number for each layer; scores are named `width/instance`


@dataclass(frozen=True)
class Activity:
    """What the dense model does on calibration text."""

    scores: Scores  # of every width, see `measure_activity` and `measure_gradients`
    influence: tuple[float, ...]  # of each layer, see `block_influence`


@dataclass(frozen=True)
class Measuring:
    """The unpruned model and the text that it is measured on."""

    bench: Workbench
    windows: torch.Tensor  # token ids, [N, T], of all processes

    def on(self, windows: torch.Tensor) -> Measuring:
        """The same on other text."""
        return replace(self, windows=windows)

    def remembered(self, kind: str, measure: Callable[[], Activity]) -> Activity:
        """What is known of a kind of measurement on this text, or else what is measured now, which is kept."""
        bench = self.bench

        def checked() -> Activity:
            activity = measure()
            check_scores(activity.scores)
            return activity

        if not bench.journal.remembers_measurements:
            return bench.journal.processes.broadcast(checked())
        key = {}
        if bench.journal.processes.is_first:
            key = statistics_key(bench.model.checkpoint, kind, self.windows, bench.model.device, bench.model.compute)
        return bench.journal.recall_measured(key, ActivityForm(), checked)


class ActivityForm:
    """Measurements as safetensors."""

    suffix = ".safetensors"

    def write(self, path: Path, value: Activity) -> None:
        """See `Form`."""
        named = ((f"{width}/{instance}", own) for width, by in value.scores.items() for instance, own in by.items())
        tensors = {name: own.contiguous() for name, own in named}
        # safetensors sorts tensors by name; plans list the choices of units in the order of the scores
        header = json.dumps(list(tensors))
        tensors[LAYERS] = torch.tensor(value.influence, dtype=torch.float64)
        replace_file(path, [save(tensors, {ORDER: header})])

    def read(self, path: Path) -> Activity:
        """See `Form`."""
        try:
            with safe_open(path, framework="pt") as file:
                scores: Scores = {}
                for name in json.loads(file.metadata()[ORDER]):
                    width, _, instance = name.partition("/")
                    scores.setdefault(width, {})[Instance.parse(instance)] = file.get_tensor(name)
                return Activity(scores, tuple(file.get_tensor(LAYERS).tolist()))
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ValueError(str(error)) from error
