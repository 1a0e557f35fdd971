"""Importance of layers: by how far they turn the residual stream, or by what the loss is without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from llmprune_cli.choose.measuring import Activity, Measuring
from llmprune_cli.processes import Processes
from llmprune_cli.run.divergence import predicted
from llmprune_cli.run.layer import Ends, check_states
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import copy_states
from llmprune_cli.text.windows import spread_windows

ABLATION_TOKENS = 2048  # of calibration text, at most: the cost grows with the square of the number of layers


def score_influence(measuring: Measuring, activity: Activity) -> tuple[float, ...]:
    """By how far each layer turns the residual stream, see `block_influence`; measured with the units already."""
    return activity.influence


def score_loss(measuring: Measuring, activity: Activity | None) -> tuple[float, ...]:
    """By how much the loss grows without each layer: see `ablate_layers`."""
    bench = measuring.bench
    windows = spread_windows(measuring.windows, ABLATION_TOKENS)
    bench.listener.stage("Leaving out each layer", bench.model.layers * (bench.model.layers + 1) // 2)
    with torch.inference_mode():
        return ablate_layers(bench.model, windows, bench.all_layers_dir, bench.listener.advance)


def ablate_layers(
    model: LayeredModel, windows: torch.Tensor, folder: Path, progress: Callable[[int], None]
) -> tuple[float, ...]:
    """By how much the loss grows when each layer alone is left out, in nats per token.

    The loss is the mean negative log-likelihood of the next token. All models that lack one layer advance together, so
    that every layer is loaded once; their hidden states are kept in files.

    Args:
        windows: token ids, [N, T], of which each process runs its share.
        folder: for the files, L times the hidden states of all tokens in float32.
        progress: told how many models went through a layer, L·(L+1)/2 in all.
    """
    windows = model.share(windows, windows.shape[1])
    dense = model.embed(windows)
    without: list[torch.Tensor] = []
    for number in range(model.layers):
        layer = model.load_layer(number)
        passed_by = copy_states(dense, folder)
        for stream in (dense, *without):
            layer.advance(stream)
        check_states(dense, f"Layer {number}")
        without.append(passed_by)
        progress(number + 1)
    ends, items = model.load_ends(exact=True), layer.returned_items(dense)
    loss = mean_nll(ends, dense, items, windows, model.processes)
    return tuple(mean_nll(ends, states, items, windows, model.processes) - loss for states in without)


def mean_nll(ends: Ends, states: torch.Tensor, items: int, windows: torch.Tensor, processes: Processes) -> float:
    """Mean negative log-likelihood of each token but the first of the windows [N, T] of all processes, nats.

    Args:
        states: hidden states behind the last layer, [N, T, D].
        items: see `Layer.returned_items`.
    """
    total = 0.0
    for window, places, wanted in predicted(ends, windows):
        logits = ends.logits(states[window : window + 1, places], items)[0]
        total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
    total, tokens = processes.add_up(total, windows[:, 1:].numel())
    return total / tokens
