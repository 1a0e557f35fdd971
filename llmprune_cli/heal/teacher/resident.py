"""A teacher that is in memory all the time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from llmprune_cli.heal.layers import following
from llmprune_cli.heal.loss import Goal, Predicted, hidden_states
from llmprune_cli.heal.teacher.repeated import Repeated
from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.heal.teacher.unfinished import Unfinished
from llmprune_cli.run.perplexity import head_logits
from llmprune_cli.run.precision import multiplying_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ResidentTeacher:
    """A teacher that is in memory all the time."""

    model: PreTrainedModel
    temperature: float
    compute: torch.dtype  # of products
    tokens: TokenMap | None = None  # where the student has fewer
    layers: tuple[int, ...] = ()  # behind which its residual stream is a goal
    repeated: Repeated | None = None  # what it made of windows that come again

    def goal(self, windows: torch.Tensor, numbers: torch.Tensor) -> Goal:
        """What it predicts on windows [B, T] with these numbers, [B]; it runs when that is asked for."""
        return _ResidentGoal(self, windows, numbers, bool(self.layers))

    def judged_goal(self, windows: torch.Tensor, numbers: torch.Tensor) -> Goal:
        """The same without its residual stream."""
        return _ResidentGoal(self, windows, numbers, False)

    def run(
        self, windows: torch.Tensor, numbers: torch.Tensor, is_followed: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What its head is given for all tokens of windows [B, T] but their last, [B·(T−1), D]; its residual stream.

        Args:
            is_followed: whether that is wanted.
        """
        if is_followed:
            with following(self.model, self.layers) as streams:
                return self._hidden(windows), streams
        if self.repeated is None:
            return self._hidden(windows), []
        return self.repeated.hidden(windows, numbers.tolist(), self._hidden), []

    def _hidden(self, windows: torch.Tensor) -> torch.Tensor:
        """What its head is given for all tokens of windows [B, T] but their last, [B·(T−1), D]."""
        read = windows if self.tokens is None else self.tokens.read(windows)
        with torch.no_grad(), multiplying_in(self.compute, windows.device):
            return hidden_states(self.model, read)


@dataclass(frozen=True)
class _ResidentGoal:
    teacher: ResidentTeacher
    windows: torch.Tensor  # of the student's tokens
    numbers: torch.Tensor
    is_followed: bool  # whether the residual stream is wanted

    @cached_property
    def made(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See `ResidentTeacher.run`."""
        return self.teacher.run(self.windows, self.numbers, self.is_followed)

    def prepare(self) -> None:
        _ = self.made

    @property
    def streams(self) -> list[torch.Tensor]:
        return self.made[1] if self.is_followed else []

    @cached_property
    def unfinished(self) -> Unfinished | None:
        """Where the student has fewer tokens."""
        tokens = self.teacher.tokens
        return None if tokens is None else Unfinished(tokens, self.windows)

    def at(self, places: slice) -> Predicted:
        teacher, hidden = self.teacher, self.made[0]
        with torch.no_grad(), multiplying_in(teacher.compute, hidden.device):
            logits = head_logits(teacher.model, hidden[None, places])[0].float()
            logs = functional.log_softmax(logits / teacher.temperature, -1)
            return Predicted(logs if self.unfinished is None else self.unfinished.follow(places, logs))
