"""What a run was asked for, and where it reports to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmprune_cli.choose.activity import CALIBRATED
from llmprune_cli.choose.search import Budget
from llmprune_cli.plan.target import WidthRequest
from llmprune_cli.run.calibration import CalibrationOptions
from llmprune_cli.run.perplexity import RunningPerplexity
from llmprune_cli.source.full_model import pick_device


@dataclass(frozen=True)
class Listener:
    """Where a run reports to."""

    stage: Callable[[str, int], None]  # a stage begins: its name, and its length in bytes or windows
    advance: Callable[[int], None]  # more of it is done
    warn: Callable[[str], None]
    perplexity: Callable[[str, RunningPerplexity], None]  # model, where its evaluation stands


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate."""

    dataset: str = "wikitext2"
    split: str = "test"
    max_seq_len: int | None = None  # None: the model's maximum
    limit: int | None = None  # windows
    batch_size: int = 1
    device: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class PruneOptions:
    """What to prune and where to."""

    request: WidthRequest
    budget: Budget | None = None
    importance: str = "magnitude"
    layer_importance: str | None = None  # None: "influence" where text is measured anyway; else the deepest layers go
    refit: str = "none"
    left_open: tuple[str, ...] = ()  # of importance and refit, those that nobody asked for
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    rotate: bool = False  # whether the channels that stay are principal components of the residual stream
    seed: int = 0
    plan: Path | None = None
    save_plan: Path | None = None
    report: Path | None = None  # chart of the report card
    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    max_shard_bytes: int = 5 * 10**9
    statistics: Path | None = None  # folder that remembers what was measured on text
    resume: bool = False
    offload_dir: Path | None = None  # folder for the hidden states of calibration text; None keeps them in memory

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        measured = self.importance in CALIBRATED or self.ranks_layers
        return self.refit != "none" or self.rotate or (measured and not self.plan)

    @property
    def without_text(self) -> PruneOptions:
        """The same, but what was left open measures nothing on text."""
        reads_nothing = {"importance": "magnitude", "refit": "none"}
        changes: dict[str, Any] = {name: reads_nothing[name] for name in self.left_open}
        return replace(self, **changes)

    @property
    def ranks_layers(self) -> bool:
        """Whether layers go by what they do on text."""
        if self.budget is not None:
            return True
        by_text = self.layer_importance is not None or self.importance in CALIBRATED
        return self.request.num_hidden_layers is not None and by_text

    @property
    def needs_activity(self) -> bool:
        """Whether units, or layers by their influence, are ranked by what they do on text."""
        return self.importance in CALIBRATED or (self.ranks_layers and self.layer_importance != "loss")

    @property
    def needs_weights(self) -> bool:
        """Whether headers and configuration are not enough."""
        return not self.dry_run or self.save_plan is not None or self.budget is not None

    @property
    def layer_device(self) -> str:
        """Where one layer at a time runs.

        Raises:
            CheckpointError: the device is not on this machine.
        """
        place = pick_device(self.calibration.device)
        return "cuda" if place == "auto" else place
