"""Importance of units by the gradient of the calibration loss: a forward and a backward sweep, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from llmprune_cli.choose.activity import block_influence
from llmprune_cli.choose.measuring import Activity, Measuring
from llmprune_cli.coupling.trace import Instance, instance_of
from llmprune_cli.family.skeleton import on_disk
from llmprune_cli.family.widths import NEURONS, Width
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.plan.units import Scores
from llmprune_cli.processes import Processes
from llmprune_cli.repair.dense_goals import walk_dense
from llmprune_cli.run.divergence import check_loss, predicted
from llmprune_cli.run.layer import Ends, Layer, batches, windows_together
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import DenseStates

GRADIENT_TOKENS = 1024  # that run through a layer together while its intermediate results are kept for the way back


def measure_taylor(measuring: Measuring) -> Activity:
    """Units by what their removal costs in loss, to first order: see `measure_gradients`."""
    model, listener = measuring.bench.model, measuring.bench.listener

    def measure() -> Activity:
        own = model.processes.share(measuring.windows, windows_together(measuring.windows, GRADIENT_TOKENS))
        walks = measuring.bench.dense.covering(own) is None
        listener.stage("Measuring gradients", model.layers * (2 if walks else 1))
        return measure_gradients(model, measuring.windows, measuring.bench.dense, listener.advance)

    return measuring.remembered("taylor", measure)


def measure_gradients(
    model: LayeredModel, windows: torch.Tensor, states: DenseStates, progress: Callable[[int], None]
) -> Activity:
    """Score every unit by what its removal costs in loss, to first order.

    Σ |g·w| over all weights w that go with the unit, where g is the gradient of the mean negative log-likelihood of the
    next token over all windows (LLM-Pruner, arXiv 2305.11627, the first-order term of equation 5, summed over the
    group). A channel's weights are those of all layers; the embedding and the output projection have no say. Neurons of
    an expert that no token reached are ranked by Σ w². A layer: see `block_influence`.

    The input of every layer is kept in a file. In memory are one layer with its gradients, and one hidden state or
    gradient for each token.

    Args:
        windows: token ids, [N, T], of which each process runs its share.
        states: what the model has made of these windows already, or else where that is to be kept.
        progress: told after each layer, on the way forth and on the way back.
    """
    processes, tokens, windows = model.processes, windows[:, 1:].numel(), model.share(windows, GRADIENT_TOKENS)
    with torch.inference_mode(False), torch.no_grad():
        kept = walk_dense(model, windows, states, progress, is_needed=True)
        assert kept is not None
        around = ((kept.read((number, "")), kept.read((number + 1, ""))) for number in range(model.layers))
        influence = [block_influence(before, behind, processes) for before, behind in around]
        stream = kept.read((model.layers, "")).float()
        items = model.load_layer(model.layers - 1).returned_items(stream)
        loss_gradient(model.load_ends(exact=True, compute=model.compute), stream, items, windows, tokens)
        scores: Scores = {}
        for number in reversed(range(model.layers)):
            layer = model.load_layer(number)
            gradients = pull_back(layer, kept.read((number, "")), stream)
            _add_up(gradients, layer, processes)
            add_saliences(scores, model, layer, number, gradients)
            progress(1)
    return Activity(scores, tuple(influence))


def loss_gradient(ends: Ends, states: torch.Tensor, items: int, windows: torch.Tensor, tokens: int) -> None:
    """Replace the hidden states [N, T, D] behind the last layer by the gradient of the loss with respect to them.

    The loss is the negative log-likelihood of each token of the windows [N, T] but the first.

    Args:
        items: see `Layer.returned_items`.
        tokens: that are predicted in all processes, over whom the loss is a mean.
    """
    ends.model.requires_grad_(False)
    for window, places, wanted in predicted(ends, windows):
        part = states[window : window + 1, places]
        given = part.clone().requires_grad_()
        with torch.enable_grad():
            loss = functional.cross_entropy(ends.logits(given, items)[0], wanted, reduction="sum")
            loss = loss / tokens
        check_loss(float(loss))
        part.copy_(torch.autograd.grad(loss, given)[0])
    states[:, -1] = 0


def pull_back(layer: Layer, states: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Replace the gradient [N, T, D] at a layer's output by that at its input.

    Args:
        states: the layer's input, [N, T, D].

    Returns:
        The sums of the gradients of the layer's weights, float32, by name in `Layer.model`, of those that had any.
    """
    sums: dict[str, torch.Tensor] = {}
    for first, batch in batches(gradient, GRADIENT_TOKENS):
        given = states[first : first + len(batch)].to(torch.float32, copy=True).requires_grad_()
        with torch.enable_grad():
            output = layer.run(given)
        assert output is not None
        output.backward(batch)
        assert given.grad is not None
        batch.copy_(given.grad)
        for name, weight in layer.model.named_parameters():
            if weight.grad is not None:
                own, weight.grad = weight.grad.float(), None
                sums[name] = sums[name].add_(own) if name in sums else own
    return sums


def _add_up(gradients: dict[str, torch.Tensor], layer: Layer, processes: Processes) -> None:
    """Add up the gradients of a layer's weights over all processes; no token of some may have reached an expert."""
    reached = {name for own in processes.gather([*gradients]) for name in own}
    for name, weight in layer.model.named_parameters():
        if name in reached:
            gradients.setdefault(name, torch.zeros_like(weight, dtype=torch.float32))
            processes.sum_(gradients[name])


def add_saliences(
    scores: Scores, model: LayeredModel, layer: Layer, number: int, gradients: dict[str, torch.Tensor]
) -> None:
    """Add |g·w| of a layer's weights to the scores of the units that they go with, float64 [units].

    Args:
        gradients: by name in `Layer.model`; replaced by |g·w|.
    """
    trace, widths = model.trace, model.widths
    products = {
        name: gradients[name].mul_(weight).abs_() if name in gradients else weight.new_zeros(weight.shape)
        for name, weight in layer.model.named_parameters()
    }
    stored = layer.stored()

    def add(width: str, instance: Instance, units: torch.Tensor, values: torch.Tensor) -> None:
        own = scores.setdefault(width, {})
        own.setdefault(instance, torch.zeros(getattr(widths, width), dtype=torch.float64)).index_add_(0, units, values)

    for name, salience in on_disk(layer.model, products).items():
        template, numbers = split_name(name)
        if not numbers:
            continue
        numbers = (number, *numbers[1:])
        for binding in trace.on(template):
            unreached = binding.width in NEURONS and not salience.any()
            along = (stored[name].float().square() if unreached else salience).movedim(binding.axis, 0)
            units = binding.units(widths, len(along))
            own = units >= 0
            sums = _with_float64(along.reshape(len(along), -1)).sum(1, dtype=torch.float64)
            units, values = units[own], sums.cpu()[own]
            instance = instance_of(binding, numbers)
            add(binding.width, instance, units, values)
            if binding.width == Width.HEADS:
                add(Width.GROUPS, instance, units // widths.heads_per_group, values)
        if template in trace.expert_templates:
            total = _with_float64(salience).sum(dtype=torch.float64).cpu()
            add(Width.EXPERTS, Instance(number), torch.tensor(numbers[1:2]), total[None])


def _with_float64(values: torch.Tensor) -> torch.Tensor:
    """The same on a device that has float64: on the CPU, where they are on an Apple GPU."""
    return values.cpu() if values.device.type == "mps" else values
