"""Importance on which two measurements agree."""

from __future__ import annotations

import torch

from llmprune_cli.choose.activity import measure_range
from llmprune_cli.choose.gradients import measure_taylor
from llmprune_cli.choose.measuring import Activity, Measuring
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.plan.units import Scores
from llmprune_cli.text.windows import spread_windows

FIRST_COUNTS = 2
GRADIENT_SHARE_TOKENS = 2048  # of calibration text, at most: four times as many chose no better


def measure_consensus(measuring: Measuring) -> Activity:
    """Units by the sum of their ranks by range and by the gradient of the loss: see `agree`."""
    some = spread_windows(measuring.windows, GRADIENT_SHARE_TOKENS)
    return agree(measure_range(measuring), measure_taylor(measuring.on(some)))


def agree(first: Activity, second: Activity) -> Activity:
    """Units by the sum of their ranks in two measurements, of which the first counts twice; layers by the first.

    A rank depends on neither scale nor tail of a score, so that units stay that matter in both ways: by how much they
    do on text, and by what the loss makes of it. The more the second counts, the better is text unlike that of the
    calibration predicted, and the worse text like it. Equal sums go by the first. (Sums of ranks: Borda's count.)
    """
    scores: Scores = {}
    sides = ((first, FIRST_COUNTS), (second, 1))
    for width in dict.fromkeys((*first.scores, *second.scores)):
        votes: dict[Instance, list[torch.Tensor]] = {}
        for activity, weight in sides:
            for instance, own in activity.scores.get(width, {}).items():
                votes.setdefault(instance, []).append(weight * _ranks(own))
        scores[width] = {instance: sum(own[1:], own[0]) + own[0] / (4 * len(own[0])) for instance, own in votes.items()}
    return Activity(scores, first.influence)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    return scores.double().argsort(stable=True).argsort(stable=True).double()
