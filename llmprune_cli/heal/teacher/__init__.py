"""The teacher: the model that a pruned one was made from, and what it predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from llmprune_cli.heal.loss import Goal


class Teacher(Protocol):
    """What tells a student what to predict."""

    def goal(self, windows: torch.Tensor, numbers: torch.Tensor) -> Goal:
        """What it predicts on windows [B, T] with these numbers, [B]."""

    def judged_goal(self, windows: torch.Tensor, numbers: torch.Tensor) -> Goal:
        """The same of windows that are asked for more than once; its residual stream is not wanted."""
