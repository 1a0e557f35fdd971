"""What a teacher makes of windows that come again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.run.states import DenseStates

PLACE = 0, ""  # the only one of whose states there are


class Repeated:
    """The hidden states that a teacher's head is given for windows that come again, in a file without a name.

    Where a folder has no ample room for it, nothing is kept, and the teacher runs each time.
    """

    def __init__(self, folder: Path, windows: torch.Tensor, first: int) -> None:
        """Of windows [N, T] whose numbers follow each other from `first` on; all others come once."""
        self._states, self._windows, self._first = DenseStates(folder), windows, first
        self._known: set[int] = set()
        self._dtype: torch.dtype | None = None  # once the first ones are made

    @classmethod
    def of(cls, text: TrainingText, folder: Path, with_trained: bool) -> Self:
        """Of a training: the windows that are judged, and with them the others."""
        if with_trained:
            return cls(folder, torch.cat((text.windows, text.held_out)), 0)
        return cls(folder, text.held_out, len(text.windows))

    def hidden(
        self, windows: torch.Tensor, numbers: list[int], run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The hidden states of all tokens of windows [B, T] but their last, [B·(T−1), D].

        Args:
            run: what makes them of some windows.
        """
        if min(numbers) < self._first:
            return run(windows)
        each = zip(windows.split(1), numbers, strict=True)  # alone, so that it is the same whenever it runs
        return torch.cat([self._recalled(number, window, run) for window, number in each])

    def _recalled(self, number: int, window: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The hidden states of one window [1, T]: [T−1, D]."""
        if number in self._known:
            kept = torch.empty(window.shape[1] - 1, self._states.channels)
            self._states.read(PLACE, number - self._first, kept)
            return kept.to(window.device, self._dtype)
        made = run(window)
        if self._dtype is None:
            self._dtype = made.dtype
            self._states.begin(self._windows, made.shape[-1], 1)
        if self._states.is_open:
            self._states.put(PLACE, number - self._first, made[None].float().cpu())
            self._known.add(number)
            if not self._states.is_open:  # the disk is full
                self._known.clear()
        return made
