"""How fast a model reads text, measured part by part, so that the whole of it need not fit into memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmprune_cli.run.layer import Layer
from llmprune_cli.run.layered_model import Ends

END_PASSES = 5  # of the ends, that are timed


@dataclass
class Clock:
    """How long the parts of one model take for a token: their forward passes alone, without loading and copying.

    A part's first pass only warms up: it touches fresh memory, and the very first one of a process starts threads and
    picks kernels. Of the others the median counts.
    """

    seconds: list[float] = field(default_factory=list)  # per token, of each part so far

    def advance(self, layer: Layer, stream: torch.Tensor) -> None:
        """Take hidden states [N, T, D] through a layer as `Layer.advance` does, one window at a time."""
        with _timing(layer.block, layer.device) as passes:
            layer.run(stream[:1])
            for window in stream.split(1):
                layer.advance(window)
        self.seconds.append(statistics.median(passes[1:]) / stream.shape[1])

    def finish(self, ends: Ends, states: torch.Tensor, items: int) -> None:
        """Time what comes before and after the layers, on hidden states [1, T, D] that the last one gives.

        Args:
            items: see `Layer.returned_items`.
        """
        with _timing(ends.model, torch.device(ends.device)) as passes:
            for _ in range(1 + END_PASSES):
                ends.logits(states, items)
        self.seconds.append(statistics.median(passes[1:]) / states.shape[1])

    @property
    def tokens_per_second(self) -> float:
        """Of prefill, every token's logits included, with windows one at a time."""
        return 1 / sum(self.seconds)


@contextmanager
def _timing(module: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """The seconds of each forward pass of a module, in the order in which they end."""
    passes: list[float] = []
    started = 0.0

    def start(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal started
        _wait(device)
        started = time.perf_counter()

    def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _wait(device)
        passes.append(time.perf_counter() - started)

    handles = [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
