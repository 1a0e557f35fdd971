"""Where a layer's readers are, and how what they make enters the residual stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from llmprune_cli.coupling.trace import Reader
from llmprune_cli.run.layer import Layer
from llmprune_cli.run.layered_model import LayeredModel

if TYPE_CHECKING:
    from llmprune_cli.coupling.products import Product

PROBE_TOKENS = 8  # that show how a reader's result enters the residual stream
TOLERANCE = 1e-3  # of that measurement, relative to its largest number
NORM_EPSILON = 1e-6  # of a norm behind a reader: the order that families use, too small for the probe to show
FACTOR_FLOOR = 1e-2  # of a norm: what is added to a channel's f² when it is divided by, relative to the mean of f²

Way = Literal["plain", "normed", "shared"]


@dataclass(frozen=True)
class Entry:
    """How a reader's result y [n, D] enters the residual stream: as q f ⊙ y, with a number q for each token.

    `plain`: q = 1. `normed`: q = 1/rms(y), where an RMSNorm follows the reader. `shared`: q is the weight that the
    router gives an expert.
    """

    way: Way
    factor: torch.Tensor  # f, [D]

    def contribution(self, result: torch.Tensor) -> torch.Tensor:
        """What y [..., D] adds to the stream, unless it is shared."""
        added = result * self.factor.to(result.device)
        return added * _inverse_rms(result) if self.way == "normed" else added

    def corrections(self, uses: Uses, missing: torch.Tensor) -> Iterator[Correction]:
        """What the products of one run have to make so that nothing is missing.

        With q fixed, W + ΔW adds q f ⊙ (ΔW x) to the stream, and least squares of the missing asks of ΔW to make
        missing/f of q x, besides q W x. (That is the norm's derivative but for the change of rms(y), which moves all
        channels of a token alike; to follow it, or to keep |y|, measured no better.) Experts share what a token misses
        in the ratio of their q²: the smallest changes that make up for it together.

        Args:
            missing: in the residual stream, [n, D].
        """
        factor = self.factor.to(missing.device)
        squared = factor.square()
        floor = FACTOR_FLOOR * float(squared.mean()) if self.way == "normed" else 0.0
        aim = missing * (factor / (squared + floor)).nan_to_num()
        if self.way == "shared":
            squares = torch.zeros(len(missing), device=missing.device)
            for part in uses.parts:
                squares.index_add_(0, part.tokens, part.weights.square())
            for part in uses.parts:
                if part.inputs is not None and part.made is not None:
                    ratio, weights = (part.weights.square() / squares[part.tokens]).nan_to_num(), part.weights[:, None]
                    aims = part.made * weights + aim[part.tokens] * ratio[:, None]
                    yield part.expert, part.inputs * weights, aims
            return
        for (expert, values, made), seen in zip(uses.as_they_are(), uses.products, strict=True):
            if self.way == "plain":
                yield expert, values, made + aim
            else:
                q = _inverse_rms(seen.result.flatten(0, -2).float())
                yield expert, values * q, made * q + aim


Correction = tuple["int | None", "torch.Tensor", "torch.Tensor"]  # expert; inputs q x [n, U]; q W x + missing/f [n, D]


@dataclass(frozen=True)
class Site:
    """A reader in one layer."""

    reader: Reader
    name: str  # of its parameter in the one-layer model
    entry: Entry | None  # None where its result enters in no way that is known
    ends_layer: bool  # the layer's output shows what is missing behind it: no later reader depends on it


@dataclass(frozen=True)
class _Part:
    """An expert's product in one run."""

    expert: int | None
    inputs: torch.Tensor | None  # [n, U]; None where they are not wanted
    made: torch.Tensor | None  # of these inputs, without a bias, [n, D]
    tokens: torch.Tensor  # [n]
    weights: torch.Tensor  # that the router gives it, [n]


class Uses:
    """The products of a reader in one run, and what becomes of them where experts hand them in."""

    def __init__(self, name: str, experts: Collection[int | None], bias: torch.Tensor | None = None) -> None:
        """Of the parameter with this name; the inputs of these experts are wanted.

        Args:
            bias: see `expert_bias`.
        """
        self.products: list[Product] = []  # with wanted inputs
        self._made: list[torch.Tensor] = []  # of these inputs, before the layer adds to it in place, [n, D]
        self.parts: list[_Part] = []
        self._name, self._experts, self._bias = name, experts, bias
        self._last: Product | None = None

    def watch(self, seen: Product) -> bool:
        """Take note of a product, and say whether it is one of the reader."""
        if seen.parameter != self._name:
            return False
        if seen.expert in self._experts:
            self.products.append(seen)
            self._made.append(seen.result.detach().flatten(0, -2).clone())
        self._last = seen
        return True

    def as_they_are(self) -> Iterator[Correction]:
        """What the products have made, without a bias: expert; inputs x [n, U]; W x [n, D]."""
        for seen, made in zip(self.products, self._made, strict=True):
            result = made.float() if seen.bias is None else made.float() - seen.bias
            yield seen.expert, seen.values.flatten(0, -2), result

    def collect(self, tokens: torch.Tensor, source: torch.Tensor) -> None:
        """Take note of what is made of the last product, and of where it goes."""
        seen, self._last = self._last, None
        if seen is not None and source.shape == seen.result.shape:
            result = seen.result.float()
            if self._bias is not None:
                result = result + self._bias[seen.expert]
            weights = (source.float() * result).sum(-1) / result.square().sum(-1)
            is_wanted = seen.expert in self._experts
            inputs, made = (seen.values, self._made[-1]) if is_wanted else (None, None)
            self.parts.append(_Part(seen.expert, inputs, made, tokens, weights.nan_to_num()))


def _inverse_rms(result: torch.Tensor) -> torch.Tensor:
    return (result.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()


def expert_bias(layer: Layer, name: str) -> torch.Tensor | None:
    """What an operation of its own adds behind the product of each expert, [E, D]; None where nothing is added.

    Args:
        name: of the stacked parameter; transformers names its bias after it.
    """
    return dict(layer.model.named_parameters()).get(f"{name}_bias")


def find_sites(model: LayeredModel, layer: Layer) -> list[Site]:
    """The readers that a layer has, in the order in which they run, and how each enters the residual stream.

    Measured on a few random hidden states: with the results of all readers but one set to zero, biases of experts
    included, that one is replaced by noise, and the output of the layer has to change as one of the ways to enter says.
    """
    readers = {r.parameter.replace("{}", "0", 1): r for r in model.trace.inputs if layer.has(r.parameter)}
    generator = torch.Generator().manual_seed(0)
    probe, noise = (torch.randn(1, PROBE_TOKENS, model.widths.hidden_size, generator=generator) for _ in range(2))
    noise *= torch.linspace(0.5, 2, PROBE_TOKENS)[:, None]  # tells a norm from a factor
    quiet = _respond(layer, readers, probe, noise, None)
    found = []
    for name in quiet.inputs:
        own = _respond(layer, readers, probe, noise, name)
        later = list(quiet.inputs)[list(quiet.inputs).index(name) + 1 :]
        is_seen = any(not torch.equal(own.inputs[other], quiet.inputs[other]) for other in later)
        entry = _entry(own, quiet, noise[0], layer.model.get_parameter(name).ndim == 3)
        ends_layer = not is_seen if entry is not None and entry.way == "shared" else not later
        found.append(Site(readers[name], name, entry, ends_layer))
    return found


@dataclass(frozen=True)
class _Response:
    """What a layer makes of a probe."""

    output: torch.Tensor  # [T, D]
    inputs: dict[str, torch.Tensor]  # of each reader, joined; in the order in which they run
    shares: torch.Tensor  # sum of the weights of a token's experts, [T]


def _respond(
    layer: Layer, readers: dict[str, Reader], probe: torch.Tensor, noise: torch.Tensor, changed: str | None
) -> _Response:
    """The response where one reader makes noise [1, T, D], its first row where it is experts, and the others zero."""
    inputs: dict[str, list[torch.Tensor]] = {}
    shares = torch.zeros(probe.shape[1])
    biases = {name: expert_bias(layer, name) for name in readers}

    def watch(seen: Product) -> torch.Tensor | None:
        """Keep what a reader is given, and put noise or zeros in the place of what it makes."""
        if seen.parameter not in readers or seen.axis != readers[seen.parameter].axis:
            return None
        inputs.setdefault(seen.parameter, []).append(seen.values.flatten().cpu())
        made = noise if seen.expert is None else noise[0, :1].expand(*seen.result.shape[:-1], -1)
        fits = seen.parameter == changed and seen.result.numel() == made.numel()
        result = made.to(seen.result.device).reshape(seen.result.shape) if fits else torch.zeros_like(seen.result)
        bias = biases[seen.parameter]
        return result if bias is None else result - bias[seen.expert]  # which the layer adds again

    def collect(tokens: torch.Tensor, source: torch.Tensor) -> None:
        if source.shape[-1] == probe.shape[-1]:
            shares.index_add_(0, tokens.cpu(), source.cpu().float() @ noise[0, 0] / noise[0, 0].square().sum())

    output = layer.run(probe, watch, collect)
    if output is None:
        raise AssertionError("a probed layer did not run to its end")
    return _Response(output[0], {name: torch.cat(values) for name, values in inputs.items()}, shares)


def _entry(loud: _Response, quiet: _Response, noise: torch.Tensor, is_stacked: bool) -> Entry | None:
    change = loud.output - quiet.output
    ways: dict[Way, torch.Tensor] = {"plain": noise, "normed": noise * _inverse_rms(noise)}
    if is_stacked:
        ways = {"shared": loud.shares[:, None] * noise[:1]}
    for way, made in ways.items():
        factor = (change * made).sum(0) / made.square().sum(0)
        gap = (change - factor * made).abs().max()
        if gap < TOLERANCE * (factor * made).abs().max():
            return Entry(way, factor)
    return None
