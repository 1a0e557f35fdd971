"""How fast a model reads text, measured part by part, so that the whole of it need not fit into memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from llmprune_cli.run.layer import Ends, Layer
from llmprune_cli.run.speed.clock import timing

END_PASSES = 5  # of the ends, that are timed
ENOUGH = 3  # passes of a layer, of which the first warms up
TIMED = 8  # windows, at most, that a layer reads one at a time

Quartiles: TypeAlias = tuple[float, float, float]


@dataclass
class Clock:
    """How long the parts of one model take for a token: their forward passes alone, without loading and copying.

    A part's first pass only warms up: it touches fresh memory, and the very first one of a process starts threads and
    picks kernels. Of the others the quartiles count.
    """

    seconds: list[Quartiles] = field(default_factory=list)  # per token, of each part so far

    def advance(self, layer: Layer, stream: torch.Tensor) -> None:
        """Take hidden states [N, T, D] through a layer as `Layer.advance` does, the first windows one at a time."""
        with timing(layer.block, layer.device) as passes:
            for _ in range(ENOUGH - len(stream)):
                layer.run(stream[:1])
            for window in stream[:TIMED].split(1):
                layer.advance(window)
        layer.advance(stream[TIMED:])
        self.seconds.append(_quartiles(passes[1:], stream.shape[1]))

    def finish(self, ends: Ends, states: torch.Tensor, items: int) -> None:
        """Time what comes before and after the layers, on hidden states [1, T, D] that the last one gives.

        Args:
            items: see `Layer.returned_items`.
        """
        with timing(ends.model, torch.device(ends.device)) as passes:
            for _ in range(1 + END_PASSES):
                ends.logits(states, items)
        self.seconds.append(_quartiles(passes[1:], states.shape[1]))

    @property
    def tokens_per_second(self) -> float:
        """Of prefill, every token's logits included, with windows one at a time."""
        return 1 / sum(median for _, median, _ in self.seconds)

    @property
    def spread(self) -> float:
        """By what share of the whole time the quartiles of it lie around its median."""
        between = sum(late - early for early, _, late in self.seconds)
        return between * self.tokens_per_second / 2


def _quartiles(passes: list[float], tokens: int) -> Quartiles:
    """Of the seconds of at least two passes, per token."""
    early, median, late = statistics.quantiles(passes, n=4, method="inclusive")
    return early / tokens, median / tokens, late / tokens
