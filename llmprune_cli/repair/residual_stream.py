"""How an architecture meets its residual stream: which norm feeds which weight, and what writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import normalize

from llmprune_cli.coupling.step import Place
from llmprune_cli.coupling.trace import Trace
from llmprune_cli.coupling.twin import build_twin, trace_sizes
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.family.exceptions import FAMILIES, Family
from llmprune_cli.family.skeleton import on_disk
from llmprune_cli.folder.tensors import split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune_cli.coupling.products import Product

EXACT = 1e-3  # how closely, relative to its size, a value in float32 has to be what it is taken for
OTHERWISE = "Leave --rotate out: channels can still be dropped."


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the channels: x ↦ x / rms(x) ⊙ (weight + offset)."""

    weight: str  # template on disk
    offset: float  # what the model adds to the stored weight


@dataclass(frozen=True)
class ResidualStream:
    """What reads the residual stream; all else that has its channels, but for norms, writes it."""

    readers: dict[str, Norm]  # template on disk → the norm that feeds it
    axes: dict[str, int]  # template on disk → its axis of channels

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm once."""
        return tuple(dict.fromkeys(self.readers.values()))


def find_residual_stream(architecture: Architecture, trace: Trace) -> ResidualStream:
    """Watch a twin run: a weight reads the norm whose output it is multiplied with; what no norm feeds writes.

    Raises:
        UnsupportedError: a norm that no weight reads, or one of another kind than RMSNorm; a weight that several norms
            feed, or that has channels of its own in each layer; embeddings that are scaled by the width.
    """
    bindings = trace.of("hidden_size")
    axes = {binding.template: binding.axis for binding in bindings}
    own = [binding.template for binding in bindings if not binding.is_global]
    if own:
        raise _unsupported(architecture, f"{own[0]} has channels of its own")
    if FAMILIES.get(architecture.config.model_type, Family()).scaled_embedding:
        raise _unsupported(architecture, "it scales embeddings by its width")
    twin = build_twin(architecture, trace_sizes(architecture.config))
    model = twin.model.float()  # where a model casts to float32, a tensor is then still the same
    origins = _origins(model, axes)
    inputs, calls = _watch(model, twin.tokens, {memory for memories in origins.values() for memory in memories})
    fed = {module for modules in inputs.values() for module in modules}
    for module, call in calls.items():
        if module not in fed and list(call[0].parameters()):
            raise _unsupported(
                architecture,
                f"{module} scales what enters the residual stream, channel by channel, and no weight "
                "behind it could do that instead",
            )
    norms = {module: _norm(architecture, module, calls[module], origins) for module in sorted(fed)}
    by_parameter: dict[str, Norm] = {}
    for (name, _), modules in inputs.items():
        if len(modules) > 1:
            raise _unsupported(architecture, f"several norms feed {name}")
        by_parameter[name] = norms[min(modules)]
    readers = {}
    for template, memories in origins.items():
        feeding = {by_parameter.get(memory) for memory in memories}
        if len(feeding) > 1:
            raise _unsupported(architecture, f"{template} reads the residual stream and writes it")
        norm = feeding.pop()
        if norm is not None:
            readers[template] = norm
    return ResidualStream(readers, axes)


def _unsupported(architecture: Architecture, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{architecture.config.model_type} cannot be rotated: {reason}. {OTHERWISE}")


def _origins(model: PreTrainedModel, templates: dict[str, int]) -> dict[str, frozenset[str]]:
    """For templates on disk, the parameters in memory that their tensors are made of; {} for numbers in both."""
    names = [name for name, _ in model.named_parameters()]
    marked = {name: torch.full_like(model.get_parameter(name), number).detach() for number, name in enumerate(names)}
    found: dict[str, frozenset[str]] = {}
    for name, tensor in on_disk(model, marked).items():
        template = split_name(name)[0]
        if template in templates:
            memories = frozenset(split_name(names[int(number)])[0] for number in tensor.unique())
            found[template] = found.get(template, frozenset()) | memories
    return found


Call = tuple["nn.Module", "torch.Tensor", "torch.Tensor"]  # a module, what it got and what it gave, [T, D]


def _watch(
    model: PreTrainedModel, tokens: torch.Tensor, channels: set[str]
) -> tuple[dict[Place, set[str]], dict[str, Call]]:
    """Run a model: which norms feed each weight, and one call of each norm."""
    from llmprune_cli.coupling.products import Products

    calls: dict[str, list[Call]] = {}
    inputs: dict[Place, set[str]] = {}

    def watch(seen: Product) -> None:
        values = seen.values.detach().flatten(0, -2)
        for module, made in calls.items():
            if len(values) and any(_are_rows_of(values, output) for _, _, output in made):
                inputs.setdefault((split_name(seen.parameter)[0], seen.axis), set()).add(module)

    with torch.no_grad(), _recording(model, channels, calls), Products(model.named_parameters(), watch):
        model(input_ids=tokens, use_cache=False)
    return inputs, {module: made[0] for module, made in calls.items()}


@contextmanager
def _recording(model: PreTrainedModel, channels: set[str], calls: dict[str, list[Call]]) -> Iterator[None]:
    """Record the calls of modules that have no other parameters than vectors of channels, and of norms without any."""
    hooks = []
    for name, module in model.named_modules():
        template, own = split_name(name)[0], dict(module.named_parameters())
        has_channels = all(p.ndim == 1 and f"{template}.{n}" in channels for n, p in own.items())
        if list(module.children()) or not has_channels or not (own or "Norm" in type(module).__name__):
            continue

        def record(module: nn.Module, args: Any, output: torch.Tensor, template: str = template) -> None:
            got, gave = (tensor.detach().flatten(0, -2) for tensor in (args[0], output))
            calls.setdefault(template, []).append((module, got, gave))

        hooks.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _are_rows_of(values: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether every row of values [n, D] is a row of an output [T, D], times some factor."""
    if values.shape[-1] != output.shape[-1]:
        return False
    cosines = normalize(values.float(), dim=-1) @ normalize(output.float(), dim=-1).T
    return bool((cosines.abs().amax(-1) > 1 - EXACT / 10).all())


def _norm(architecture: Architecture, module: str, call: Call, origins: dict[str, frozenset[str]]) -> Norm:
    """What kind of norm a module is.

    Raises:
        UnsupportedError: it has no weights, or is no RMSNorm.
    """
    own, got, gave = call
    stored = {memory: template for template, memories in origins.items() for memory in memories}
    weight = stored.get(f"{module}.weight")
    if weight is None:
        raise _unsupported(architecture, f"{module} has no weights, which would have to make up for its fewer channels")
    weights: Any = own.weight
    normalized = got / got.square().mean(-1, keepdim=True).sqrt()
    for offset in (0.0, 1.0):
        expected = normalized * (weights + offset)
        if bool((expected - gave).abs().max() < EXACT * gave.abs().max()):
            return Norm(weight, offset)
    raise _unsupported(architecture, f"{module} is no RMSNorm: it subtracts the mean, or adds a bias")
