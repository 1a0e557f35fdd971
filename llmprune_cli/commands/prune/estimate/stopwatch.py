"""What is found out about the stages of a run while they are tried on little text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from llmprune_cli.progress import Listener, Progress
from llmprune_cli.run.speed.clock import wait


@dataclass
class Tried:
    """One stage, as it went."""

    name: str
    chooses: bool  # see `StageEstimate`
    began: float  # by the clock, as all times here
    ended: float = 0.0
    steps: list[tuple[int, float]] = field(default_factory=list)  # how much was done, and when
    windows: int = 0  # that went through it
    run_windows: float = 0.0  # that will
    predicted: int = 0  # tokens whose logits were formed
    learned: int = 0  # tokens whose logits were formed and went back as gradients
    solved: list[tuple[int, int, int]] = field(default_factory=list)  # outputs, inputs and kept inputs of readers

    @property
    def growth(self) -> float:
        """How many times as many tokens will go through it."""
        return self.run_windows / self.windows if self.windows else 1.0

    @property
    def sweeps(self) -> list[tuple[float, float, int]]:
        """For each time that both layers were gone through: seconds of the first and of the second, and its steps."""
        times = [self.began, *(at for _, at in self.steps)]
        taken = [later - earlier for earlier, later in pairwise(times)]
        amounts = [amount for amount, _ in self.steps]
        return list(zip(taken[::2], taken[1::2], amounts[1::2], strict=False))


class Stopwatch:
    """Listens to stages and takes their times."""

    def __init__(self, device: str = "cpu") -> None:
        """Begin with nothing; on a device, which is waited for before a time is taken."""
        self.stages: list[Tried] = []
        self._device = torch.device(device)
        self._done, self._chooses = 0, True

    @property
    def listener(self) -> Listener:
        """What the stages report to; warnings of a trial are nobody's business."""
        return Listener(self._told, lambda text: None)

    def end(self) -> None:
        """The last stage has ended."""
        if self.stages and not self.stages[-1].ended:
            self.stages[-1].ended = self._now()

    def chosen(self) -> None:
        """What stays is chosen."""
        self._chooses = False

    def shared(self, windows: int, tried: int = 1) -> None:
        """Some windows are tried in the place of so many."""
        self.stages[-1].windows += tried
        self.stages[-1].run_windows += windows

    def asked(self, tokens: int, with_gradients: bool) -> None:
        """Logits of so many tokens are formed."""
        if with_gradients:
            self.stages[-1].learned += tokens
        else:
            self.stages[-1].predicted += tokens

    def solved(self, outputs: int, inputs: int, kept: int) -> None:
        """A reader is to be solved."""
        self.stages[-1].solved.append((outputs, inputs, kept))

    def _told(self, now: Progress) -> None:
        if now.done == 0:
            self.end()
            self.stages.append(Tried(now.stage, self._chooses, self._now()))
            self._done = 0
        else:
            self.stages[-1].steps.append((now.done - self._done, self._now()))
            self._done = now.done

    def _now(self) -> float:
        wait(self._device)
        return time.perf_counter()
