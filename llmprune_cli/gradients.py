"""Importance of units by the gradient of the calibration loss: a forward and a backward sweep, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.activations import Activity, block_influence
from llmprune_cli.architecture import Architecture, on_disk
from llmprune_cli.checkpoint import Checkpoint
from llmprune_cli.evaluation import LOGIT_ELEMENTS
from llmprune_cli.groups import Trace, instance_of
from llmprune_cli.layerwise import Ends, Layer, batches, embed, load_ends, load_layer
from llmprune_cli.names import split_name
from llmprune_cli.scoring import EXPERTS, GROUPS, HEADS, Scores
from llmprune_cli.statefiles import keep_states

if TYPE_CHECKING:
    import torch

GRADIENT_TOKENS = 1024  # that run through a layer together while its intermediate results are kept for the way back


def measure_gradients(
    checkpoint: Checkpoint,
    architecture: Architecture,
    trace: Trace,
    windows: torch.Tensor,
    device: str,
    folder: Path,
    progress: Callable[[int], None],
) -> Activity:
    """Score every unit by the change in loss that its removal is to cost, to first order.

    Σ |g·w| over all weights w that go with the unit, where g is the gradient of the mean negative log-likelihood of the
    next token over all windows (LLM-Pruner, arXiv 2305.11627, equation 5 without its second-order term, by element,
    summed over the group). A channel's weights are those of all layers; the embedding and the output projection have
    no say. A layer: block influence, see `measure_activity`.

    The input of every layer is kept in a file; what runs in memory is one layer, its gradients, and one hidden state
    and one gradient for each token.

    Args:
        windows: token ids, [N, T].
        folder: for the files, which need L times the hidden states of all tokens.
        progress: told after each layer, on the way forth and on the way back.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        stream = embed(checkpoint, architecture, windows, device)
        influence, inputs = [], []
        for number in range(architecture.widths.num_hidden_layers):
            layer = load_layer(checkpoint, architecture, number, device)
            inputs.append(keep_states(stream, folder / f"{number}.states"))
            layer.advance(stream)
            influence.append(block_influence(inputs[-1], stream))
            progress(1)
        items = layer.returned_items(stream)
        del layer
        loss_gradient(load_ends(checkpoint, architecture, device, exact=True), stream, items, windows)
        scores: Scores = {}
        for number, states in reversed([*enumerate(inputs)]):
            layer = load_layer(checkpoint, architecture, number, device)
            pull_back(layer, states, stream)
            add_saliences(scores, layer, trace, architecture, number)
            progress(1)
    return Activity(scores, tuple(influence))


def loss_gradient(ends: Ends, states: torch.Tensor, items: int, windows: torch.Tensor) -> None:
    """Replace the hidden states [N, T, D] behind the last layer by the gradient of the loss with respect to them.

    The loss is the mean over all windows of the negative log-likelihood of each token but the first.

    Args:
        items: see `Layer.returned_items`.
    """
    import torch
    from torch.nn import functional

    ends.model.requires_grad_(False)
    chunk = max(1, LOGIT_ELEMENTS // ends.model.config.get_text_config().vocab_size)
    predicted = windows[:, 1:].numel()
    for window, hidden in zip(windows, states, strict=True):
        for first in range(0, len(window) - 1, chunk):
            wanted = window[1:][first : first + chunk].to(ends.device)
            given = hidden[None, first : first + len(wanted)].clone().requires_grad_()
            with torch.enable_grad():
                logits = ends.logits(given, items)[0]
                (functional.cross_entropy(logits, wanted, reduction="sum") / predicted).backward()
            hidden[first : first + len(wanted)] = given.grad[0]
        hidden[-1] = 0


def pull_back(layer: Layer, states: torch.Tensor, gradient: torch.Tensor) -> None:
    """Replace the gradient [N, T, D] at a layer's output by that at its input, and add up those of its weights.

    Args:
        states: the layer's input, [N, T, D].
    """
    import torch

    for first, batch in batches(gradient, GRADIENT_TOKENS):
        given = states[first : first + len(batch)].clone().requires_grad_()
        with torch.enable_grad():
            layer.run(given).backward(batch)
        batch.copy_(given.grad)


def add_saliences(scores: Scores, layer: Layer, trace: Trace, architecture: Architecture, number: int) -> None:
    """Add |g·w| of a layer's weights to the scores of the units that they go with, float64."""
    import torch

    widths = architecture.widths
    products = {
        name: torch.zeros_like(weight) if weight.grad is None else (weight.grad * weight).abs()
        for name, weight in layer.model.named_parameters()
    }
    layer.model.zero_grad()

    def add(width: str, instance: str, units: torch.Tensor, values: torch.Tensor) -> None:
        own = scores.setdefault(width, {})
        if instance not in own:
            own[instance] = torch.zeros(getattr(widths, width), dtype=torch.float64)
        own[instance].index_add_(0, units, values)

    for name, salience in on_disk(layer.model, products).items():
        template, numbers = split_name(name)
        if not numbers:
            continue
        numbers = (number, *numbers[1:])
        for binding in trace.on(template):
            units = binding.units(widths)
            own = units >= 0
            along = salience.movedim(binding.axis, 0).flatten(1) if salience.ndim > 1 else salience[:, None]
            units, values = units[own], along.sum(1, dtype=torch.float64).cpu()[own]
            instance = instance_of(binding, numbers)
            add(binding.width, instance, units, values)
            if binding.width == HEADS:
                add(GROUPS, instance, units // widths.heads_per_group, values)
        if template in trace.expert_templates:
            add(EXPERTS, str(number), torch.tensor(numbers[1:2]), salience.sum(dtype=torch.float64).cpu()[None])
