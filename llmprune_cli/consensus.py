"""Importance on which two measurements agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune_cli.activations import Activity
from llmprune_cli.scoring import Scores

if TYPE_CHECKING:
    import torch

GRADIENT_SHARE_TOKENS = 8192  # of calibration text, at most: the inputs of all layers are kept on disk for the way back


def agree(first: Activity, second: Activity) -> Activity:
    """Units by the sum of their ranks in two measurements; layers by the first.

    A rank depends on neither scale nor tail of a score, so that units stay that matter in both ways: by how much they
    do on text, and by what the loss makes of it. Equal sums go by the first. (The sum of ranks: Borda's count.)
    """
    scores: Scores = {}
    for width in dict.fromkeys((*first.scores, *second.scores)):
        one, other = first.scores.get(width, {}), second.scores.get(width, {})
        scores[width] = {name: _ranked([by[name] for by in (one, other) if name in by]) for name in {**one, **other}}
    return Activity(scores, first.influence)


def _ranked(votes: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks, float64 [units], with a fraction that breaks ties as the first vote would."""
    ranks = [vote.double().argsort(stable=True).argsort(stable=True).double() for vote in votes]
    return sum(ranks[1:], ranks[0]) + ranks[0] / (2 * len(ranks[0]))
