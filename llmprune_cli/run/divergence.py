"""How far a pruned model's predictions are from the dense one's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from llmprune_cli.errors import CheckpointError
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.run.layer import Ends
from llmprune_cli.run.perplexity import LOGIT_ELEMENTS


@dataclass(frozen=True)
class Divergence:
    """Figures over windows of held-out text."""

    tokens: int  # that were predicted
    perplexity_before: float
    perplexity_after: float
    kl: float  # mean over tokens of KL(dense ‖ pruned), nats


@dataclass(frozen=True)
class Side:
    """What one model makes of some windows."""

    ends: Ends
    states: torch.Tensor  # behind the last layer, [N, T, D]
    items: int  # see `Layer.returned_items`


def tokens_at_a_time(ends: Ends) -> int:
    """How many tokens' logits are formed together."""
    return max(1, LOGIT_ELEMENTS // int(ends.model.config.get_text_config().vocab_size))


def predicted(ends: Ends, windows: torch.Tensor) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Windows [N, T] in parts of few logits: a window's number, places in it, and the tokens that follow these."""
    chunk = tokens_at_a_time(ends)
    for number, window in enumerate(windows):
        for first in range(0, len(window) - 1, chunk):
            wanted = window[1:][first : first + chunk]
            yield number, slice(first, first + len(wanted)), wanted.to(ends.device)


def compare(dense: Side, pruned: Side, windows: torch.Tensor, processes: Processes = ALONE) -> Divergence:
    """Mean KL(dense ‖ pruned) = E[Σ_v p(v) log(p(v)/q(v))] of the next token, and both perplexities, in float32.

    Args:
        windows: token ids, [N, T], the share of this process.

    Raises:
        CheckpointError: see `check_loss`.
    """
    losses, kl = torch.zeros(2, dtype=torch.float64), 0.0
    for window, places, wanted in predicted(dense.ends, windows):
        logs = [_log_probabilities(side, window, places) for side in (dense, pruned)]
        for index, log in enumerate(logs):
            losses[index] += float(functional.nll_loss(log, wanted, reduction="sum"))
        kl += _divergence(logs[1].neg_().add_(logs[0]), logs[0].exp_())
    kl, tokens, *sums = processes.add_up(kl, windows[:, 1:].numel(), *losses.tolist())
    check_loss(sums[0])
    before, after = (math.exp(min(loss / tokens, 700)) for loss in sums)
    kl = math.inf if math.isnan(kl) else max(0.0, kl / tokens)  # rounding may leave less than nothing
    return Divergence(int(tokens), before, after, kl)


def compare_all(
    dense: Side, others: Sequence[Side], windows: torch.Tensor, processes: Processes = ALONE
) -> list[float]:
    """Mean KL(dense ‖ other) of the next token for each of several models, in nats, as `compare` gives it.

    Args:
        windows: token ids, [N, T], the share of this process.

    Raises:
        CheckpointError: see `check_loss`.
    """
    sums = [0.0] * len(others)
    for window, places, wanted in predicted(dense.ends, windows):
        first = _log_probabilities(dense, window, places)
        check_loss(float(functional.nll_loss(first, wanted)))
        probabilities = first.exp()
        for index, side in enumerate(others):
            gaps = _log_probabilities(side, window, places).neg_().add_(first)
            sums[index] += _divergence(gaps, probabilities)
    *sums, tokens = processes.add_up(*sums, windows[:, 1:].numel())
    return [math.inf if math.isnan(kl) else max(0.0, kl / tokens) for kl in sums]


def _log_probabilities(side: Side, window: int, places: slice) -> torch.Tensor:
    """Of the tokens of the vocabulary behind those at some places of a window, float32 [n, V]."""
    return functional.log_softmax(side.ends.logits(side.states[window : window + 1, places], side.items)[0], -1)


def _divergence(gaps: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Σ p (log p − log q), for log p − log q [n, V], in whose place the products are formed, to need little memory."""
    return float(gaps.mul_(probabilities).sum(-1).cpu().double().sum())


def losses(side: Side, windows: torch.Tensor, known: torch.Tensor | None = None) -> float:
    """Negative log-likelihood of the tokens of windows [N, T] that are predicted, summed, in nats.

    Args:
        known: whether the model has each token, [V]; all of them by default.

    Raises:
        CheckpointError: see `check_loss`.
    """
    total = 0.0
    for window, places, wanted in predicted(side.ends, windows):
        logits = side.ends.logits(side.states[window : window + 1, places], side.items)[0]
        if known is not None:
            logits = logits.masked_fill(~known.to(logits.device), -math.inf)
        total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
    check_loss(total)
    return total


def check_loss(loss: float) -> None:
    """Hold that the unpruned model, whose hidden states are numbers, predicts something.

    Raises:
        CheckpointError: its loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise CheckpointError(
            "The final norm or the output projection makes NaN or infinity of text: its weights are damaged. Download "
            "the checkpoint again."
        )
