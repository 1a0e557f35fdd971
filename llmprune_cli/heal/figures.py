"""What is said of a healing: figures on held-out text, and when they were taken."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldOut:
    """Figures over the windows of held-out text."""

    kl: float  # mean over tokens of KL(teacher ‖ student) at the temperature of the loss, nats
    perplexity: float  # exponent of the mean over tokens
    bits_per_byte: float  # of UTF-8

    def loss(self, kind: str) -> float:
        """What is learned of it, see `LOSSES`, nats per token."""
        return ("kl" in kind) * self.kl + ("ce" in kind) * math.log(self.perplexity)


@dataclass(frozen=True)
class Judgement:
    """How a model stands after some steps."""

    tokens: int  # that were learned from so far
    held_out: HeldOut
