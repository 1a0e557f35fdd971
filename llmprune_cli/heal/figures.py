"""What is said of a healing: figures on held-out text, and when they were taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmprune_cli.family.widths import Widths
from llmprune_cli.heal.options import LossWeights


@dataclass(frozen=True)
class HeldOut:
    """Figures over the windows of held-out text."""

    kl: float  # mean over tokens of KL(teacher ‖ student) at the temperature of the loss, nats
    perplexity: float  # exponent of the mean over tokens
    bits_per_byte: float  # of UTF-8

    def loss(self, weights: LossWeights, temperature: float) -> float:
        """What is learned of it, nats per token: the weighted sum of τ²·KL and the cross-entropy.

        A reverse KL divergence is judged by the usual one.

        Args:
            temperature: τ, of the KL divergence.
        """
        parts = (weights.kl, temperature**2 * self.kl), (weights.ce, math.log(self.perplexity))
        return sum(weight * part for weight, part in parts if weight)


@dataclass(frozen=True)
class Judgement:
    """How a model stands after some steps."""

    tokens: int  # that were learned from so far
    held_out: HeldOut


@dataclass(frozen=True)
class RateTrial:
    """What a learning rate came to in a few steps."""

    learning_rate: float
    steps: int
    loss: float | None  # on held-out text then; None where it became NaN


@dataclass(frozen=True)
class HealedLayer:
    """How near a layer brings the pruned model's residual stream to the teacher's, on held-out text."""

    layer: int  # its number in the pruned model
    error_before: float  # mean over tokens of ‖h − h'‖²/‖h'‖² behind it, the layers before it being healed
    error_after: float
    trained_parameters: int  # 0 where it stayed as it was


@dataclass(frozen=True)
class FinalistResult:
    """A candidate for a target size that was healed for a while."""

    widths: Widths
    layers: tuple[int, ...]
    parameters: int
    kl_before: float  # on held-out text, nats: pruned and refitted
    kl_after: float  # and healed on a share of the tokens


@dataclass(frozen=True)
class Training:
    """What came of a training; the model has the best weights that were judged after some steps."""

    before: HeldOut
    curve: tuple[Judgement, ...]
    steps: int  # that were taken
    stopped_early: bool
    best: Judgement  # with the least loss; that before, of no tokens, where none has less
