"""Importance of units by what they do on calibration text: one pass of the dense model, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from llmprune_cli.choose.measuring import Activity, Measuring
from llmprune_cli.coupling.step import Place
from llmprune_cli.coupling.trace import Instance, Reader, instance_of, reader_instance
from llmprune_cli.family.widths import NEURONS, Width, Widths
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.plan.units import Scores
from llmprune_cli.processes import Processes
from llmprune_cli.repair.dense_goals import advance_and_keep, keep_dense, stream_dtype
from llmprune_cli.run.layer import Layer, batches, check_states
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import DenseStates, new_states

if TYPE_CHECKING:
    from llmprune_cli.coupling.products import Product


def measure_activation(measuring: Measuring) -> Activity:
    """Units by their activation: see `measure_activity`."""
    return measuring.remembered("activation", lambda: _walk(measuring, "activation"))


def measure_range(measuring: Measuring) -> Activity:
    """Units by activation norm times weight range: see `measure_activity`."""
    return measuring.remembered("range", lambda: _walk(measuring, "range"))


def _walk(measuring: Measuring, importance: str) -> Activity:
    model, folder, listener = measuring.bench.model, measuring.bench.offload_dir, measuring.bench.listener
    listener.stage("Measuring activity", model.layers)
    with torch.inference_mode():
        windows, states = model.share(measuring.windows), measuring.bench.dense
        keep_dense(states, windows, model)
        stream = model.embed(windows, folder, stream_dtype(model))
        return measure_activity(model, stream, importance, listener.advance, states, folder)


def measure_activity(
    model: LayeredModel,
    stream: torch.Tensor,
    importance: str,
    progress: Callable[[int], None],
    states: DenseStates | None = None,
    folder: Path | None = None,
) -> Activity:
    """Score every unit by its share in what reads it, and every layer by how far it turns the residual stream.

    A neuron u by `activation`: ‖W_u‖²·E[x_u²] over the column W_u that reads it, the squared norm of its mean
    contribution (Wanda, arXiv 2306.11695, equation 1, squared and summed over the outputs, as in FLAP, arXiv
    2312.11983). By `range`: (Σ r_u)²·E[x_u²], where r_u is `max + |min|` of its weights in each tensor that carries it,
    as a share of the largest there (optipfair's data-driven choice for gated MLPs, for any family). A head is the sum
    over its elements, a KV group over its heads. A channel is the sum over all weights that read the residual stream,
    each weight's scores divided by their mean; experts that are stacked are one weight, of which each reads its own
    tokens. An expert: the mean over its tokens of the norm of its router-weighted
    output (REAP, arXiv 2510.13999, equation 9). A layer: see `block_influence`.

    Args:
        importance: `activation` or `range`.
        stream: hidden states before the first layer, [N, T, D], of this process's share of the windows; afterwards
            those behind the last one.
        progress: told after each layer.
        states: that are to keep what the model makes of the windows, begun with them.
        folder: of a second stream, see `new_states`.
    """
    trace, widths = model.trace, model.widths
    scores: Scores = defaultdict(dict)
    channels = torch.zeros(widths.hidden_size, dtype=torch.float64)
    before, influence = new_states(stream.shape, folder, stream.dtype), []
    tokens = int(model.processes.add_up(stream[..., 0].numel())[0])
    for number in range(model.layers):
        layer = model.load_layer(number)
        inputs = _Inputs()
        before.copy_(stream)
        advance_and_keep(model, layer, number, stream, states, inputs.seen, inputs.collected)
        check_states(stream, f"Layer {number}")
        inputs.share_with(model.processes)
        influence.append(block_influence(before, stream, model.processes))
        ranges = unit_ranges(model, layer, number) if importance == "range" else {}
        reading = {(r.parameter.replace("{}", "0", 1), r.axis): r for r in trace.inputs if layer.has(r.parameter)}
        for (name, axis), reader in reading.items():
            weight = layer.model.get_parameter(name)
            for expert in range(len(weight)) if weight.ndim == 3 else (None,):
                squares = inputs.squares.get((name, axis, expert))
                columns = _column_norms(weight if expert is None else weight[expert], axis == weight.ndim - 1)
                instance = reader_instance(trace, reader, number, expert)
                spread = ranges.get((reader.width, instance))
                factor = columns if spread is None else spread.square()
                _add_units(scores, reader, instance, widths, factor, squares, tokens)
        for share in _channel_shares(layer, inputs, reading, len(channels)):
            channels += share / share.mean().clamp_min(torch.finfo(share.dtype).tiny)
        if inputs.expert_norms:
            scores[Width.EXPERTS][Instance(number)] = inputs.expert_means(widths.num_experts)
        progress(1)
    scores[Width.HIDDEN][Instance()] = channels
    return Activity(dict(scores), tuple(influence))


def _channel_shares(layer: Layer, inputs: _Inputs, reading: Collection[Place], channels: int) -> Iterator[torch.Tensor]:
    """What each weight that reads the residual stream says of its channels, float64 [D]; experts together.

    Args:
        reading: weights that read something else, of the same size perhaps, with the axis that is summed over.
    """
    shares: dict[Place, torch.Tensor] = {}
    for (name, axis, expert), squares in inputs.squares.items():
        if (name, axis) in reading or len(squares) != channels:
            continue
        weight = layer.model.get_parameter(name)
        share = _column_norms(weight if expert is None else weight[expert], axis == weight.ndim - 1) * squares
        shares[name, axis] = shares[name, axis] + share if (name, axis) in shares else share
    yield from shares.values()


def block_influence(before: torch.Tensor, after: torch.Tensor, processes: Processes) -> float:
    """1 − E[cos(h_in, h_out)] over all tokens, of all processes, of a layer's input and output, [N, T, D].

    ShortGPT, arXiv 2403.03853, equation 1.
    """
    cosines = 0.0
    for first, batch in batches(before):
        behind = after[first : first + len(batch)]
        cosines += float(cosine_similarity(batch.float(), behind.float(), dim=-1).sum(dtype=torch.float64))
    total, count = processes.add_up(cosines, before[..., 0].numel())
    return 1 - total / count


def unit_ranges(model: LayeredModel, layer: Layer, number: int) -> dict[tuple[str, Instance], torch.Tensor]:
    """For each width of neurons and each choice of them: the sum of `max + |min|` over a neuron's weights.

    One term for each tensor that carries the neurons (one for each half of a fused gate|up), divided by its largest;
    float64 [units].
    """
    trace, widths = model.trace, model.widths
    found: dict[tuple[str, Instance], torch.Tensor] = {}
    for name, tensor in layer.stored().items():
        template, numbers = split_name(name)
        for binding in trace.on(template):
            if binding.width not in NEURONS or tensor.ndim < 2:
                continue
            rows = tensor.movedim(binding.axis, 0).reshape(tensor.shape[binding.axis], -1).cpu().float()
            spread = (rows.max(1).values + rows.min(1).values.abs()).double()
            units, elements = (of(widths, len(rows)) for of in (binding.units, binding.elements))
            key = binding.width, instance_of(binding, (number, *numbers[1:]))
            total = found.setdefault(key, torch.zeros(getattr(widths, binding.width), dtype=torch.float64))
            for copy in range(binding.copies):
                own = elements == copy
                total.index_add_(0, units[own], spread[own] / spread[own].max().clamp_min(torch.finfo().tiny))
    return found


class _Inputs:
    """Sums of squares of what a layer's weights are multiplied with, and norms of what its experts hand in."""

    def __init__(self) -> None:
        self.squares: dict[tuple[str, int, int | None], torch.Tensor] = {}
        self.expert_norms: dict[int, torch.Tensor] = {}  # their sum and number, float64 [2]
        self._norms: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._expert: int | None = None
        self._last: tuple[torch.Tensor | None, torch.Tensor] = None, torch.empty(0)  # what several weights read in turn

    def seen(self, seen: Product) -> None:
        key = seen.parameter, seen.axis, seen.expert
        if self._last[0] is not seen.values:
            values = seen.values.reshape(-1, seen.values.shape[-1]).to(torch.float32, copy=True)
            self._last = seen.values, values.square_().sum(0).cpu().double()
        squares = self._last[1].clone()
        self.squares[key] = self.squares[key] + squares if key in self.squares else squares
        self._expert = seen.expert

    def collected(self, tokens: torch.Tensor, source: torch.Tensor) -> None:
        if self._expert is not None and source.is_floating_point():
            self._norms[self._expert].append(source.float().norm(dim=-1).cpu())
            self._expert = None

    def expert_means(self, experts: int) -> torch.Tensor:
        """The mean norm of what each expert hands in, float64 [E]."""
        means = torch.zeros(experts, dtype=torch.float64)
        for expert, (total, count) in self.expert_norms.items():
            means[expert] = total / count
        return means

    def share_with(self, processes: Processes) -> None:
        """Add up what all processes have seen."""
        for expert, norms in self._norms.items():
            every = torch.cat(norms).double()
            self.expert_norms[expert] = torch.stack([every.sum(), every.new_tensor(len(every))])
        self.squares = processes.sum_by_name(self.squares)
        self.expert_norms = processes.sum_by_name(self.expert_norms)


def _column_norms(matrix: torch.Tensor, last: bool) -> torch.Tensor:
    """Squared norms of what each input of a weight is multiplied with, float64; inputs along the last axis or not."""
    return matrix.float().square().sum(-2 if last else -1).cpu().double()


def _add_units(
    scores: Scores,
    reader: Reader,
    instance: Instance,
    widths: Widths,
    factor: torch.Tensor,
    squares: torch.Tensor | None,
    tokens: int,
) -> None:
    """Add what one reader says to the scores of the units that it reads.

    Args:
        instance: see `reader_instance`.
        factor: what the mean square of each input, or of each unit, is multiplied with.
        squares: sum of squares of each input; None for an expert that no token reached, whose own units are then ranked
            by the factor alone.
    """
    if reader.width == Width.HEADS:
        if squares is not None:
            by_head = (factor * squares / tokens).view(widths.num_attention_heads, -1).sum(1)
            scores[Width.HEADS][instance] = by_head
            scores[Width.GROUPS][instance] = by_head.view(widths.num_key_value_heads, -1).sum(1)
        return
    own, count = scores[reader.width], getattr(widths, reader.width)
    if squares is None:
        own.setdefault(instance, factor.view(-1, count).sum(0) / tokens**2)
        return
    if len(factor) != len(squares):
        squares = squares.view(-1, count).sum(0)
    share = (factor * squares / tokens).view(-1, count).sum(0)
    own[instance] = own[instance] + share if instance in own else share
