"""A dense twin without what a pruning removes: what it answers is what the pruned twin must answer."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune_cli.apply.reference.answers import Answers, answer
from llmprune_cli.coupling.products import Product, Products
from llmprune_cli.coupling.trace import Binding, Instance, Keep, Trace, kept_mask, new_name, renumbered
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.skeleton import on_disk, vectors_on_disk
from llmprune_cli.family.widths import Width, Widths
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.run.layer import unpacked
from llmprune_cli.run.norms import see_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNPICKED = -1e4  # weight of a router's row that no token picks


@dataclass(frozen=True)
class Kept:
    """What a pruning left of the dense twin."""

    trace: Trace
    before: Widths
    layers: tuple[int, ...]
    keep: Keep


def stored_buffers(model: PreTrainedModel) -> frozenset[str]:
    """The names on disk of what is stored beside the weights."""
    state = model.state_dict()
    return frozenset(on_disk(model, {name: own for name, own in model.named_buffers() if name in state}))


def silence_removed(folder: Path, kept: Kept, buffers: Collection[str]) -> None:
    """In a saved dense twin, zero whatever reads a removed head or neuron.

    The router's row of a removed expert, and what is added to its score, become so negative that no token with a
    positive sum over its channels picks it, or gives it weight in a softmax.
    """
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            template, numbers = split_name(name)
            if numbers and numbers[0] not in kept.layers:
                continue  # see `_layers_of_kept`
            for binding in kept.trace.on(template):
                reads = binding in kept.trace.readers
                routes = binding.width == Width.EXPERTS and Width.EXPERTS in kept.keep
                if tensor.ndim == 1 or tensor.numel() == tensor.shape[binding.axis]:  # what is added to the scores
                    routes &= name in buffers or tensor.ndim > 1
                else:
                    routes &= tensor.ndim == 2 and _is_router(kept.trace, template)
                if reads or routes:
                    place = binding.axis, tensor.shape[binding.axis]
                    mask = kept_mask(kept.trace, template, place, numbers, kept.keep, kept.before)
                    tensor.index_fill_(binding.axis, (~mask).nonzero().flatten(), 0 if reads else UNPICKED)
        save_file(tensors, path, metadata={"format": "pt"})


def _is_router(traced: Trace, template: str) -> bool:
    """Whether the tensor has a row of channels for every expert, and no neurons."""
    axes = {binding.axis: binding.width for binding in traced.on(template)}
    return axes.get(0) == Width.EXPERTS and axes.get(1) in (None, Width.HIDDEN) and template.endswith("weight")


def answer_without(dense: PreTrainedModel, pruned: PreTrainedModel, tokens: torch.Tensor, kept: Kept) -> Answers:
    """What the dense twin answers where norms see the kept elements only, and routers score no removed expert.

    Layers that went pass on what they are given. The removed channels' embeddings are zero as well, for families that
    read the residual stream without a norm.
    """
    with (
        torch.no_grad(),
        _norms_of_kept(dense, pruned, kept),
        _routers_of_kept(dense, kept),
        _layers_of_kept(dense, kept),
    ):
        if channels := kept.keep.get(Width.HIDDEN, {}).get(Instance()):
            embedding = next(dense.get_input_embeddings().parameters())
            removed = torch.ones(embedding.shape[1], dtype=torch.bool)
            removed[torch.tensor(channels)] = False
            embedding[:, removed] = 0
        return answer(dense, tokens)


def _routers_of_kept(dense: PreTrainedModel, kept: Kept) -> AbstractContextManager[object]:
    """While active, routers give removed experts a score that no token picks, whatever the norm before them.

    In a norm that takes the mean away the sum over the channels, which `silence_removed` relies on, has no sign.
    """
    if Width.EXPERTS not in kept.keep:
        return nullcontext()

    def score(product: Product) -> torch.Tensor | None:
        chosen = kept.keep[Width.EXPERTS].get(Instance(split_name(product.parameter)[1][0]))
        if chosen is None or product.result.shape[-1] != kept.before.num_experts:
            return None
        gone = torch.ones(kept.before.num_experts, dtype=torch.bool)
        gone[torch.tensor(chosen)] = False
        return product.result.masked_fill(gone, UNPICKED)

    routers = kept.trace.routers
    return Products(((name, own) for name, own in dense.named_parameters() if split_name(name)[0] in routers), score)


def _normed(traced: Trace, name: str, module: nn.Module) -> Binding | None:
    """The axis that a norm runs over: that of its weight, else of the channels; None for other modules.

    Args:
        name: of its weight on disk.
    """
    weight = getattr(module, "weight", None)
    if weight is not None:
        along = (binding for binding in traced.on(split_name(name)[0]) if weight.ndim == 1)
        return next((binding for binding in along if binding.axis == 0), None)
    if "Norm" in type(module).__name__ and not list(module.children()):
        return next((binding for binding in traced.of(Width.HIDDEN) if binding.is_global), None)
    return None


@contextmanager
def _norms_of_kept(model: PreTrainedModel, pruned: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """Let every norm of pruned elements see the kept ones only: the pruned norm with the dense one's weights."""
    small_modules, names, hooks = dict(pruned.named_modules()), vectors_on_disk(model), []
    for name, module in model.named_modules():
        numbers = split_name(name)[1]
        new = new_name(f"{name}.weight", kept.trace, renumbered(kept.layers), None)
        normed = _normed(kept.trace, names.get(f"{name}.weight", ""), module)
        if new is None or normed is None:
            continue
        weight = getattr(module, "weight", None)
        place = normed.axis, kept.before.hidden_size if weight is None else len(weight)
        mask = kept_mask(kept.trace, normed.template, place, numbers, kept.keep, kept.before)
        if bool(mask.all()):
            continue
        norm = copy.deepcopy(small_modules[new.removesuffix(".weight")])
        for parameter_name, parameter in norm.named_parameters(recurse=False):
            own = getattr(module, parameter_name)
            parameter.copy_(own[mask] if len(own) == len(mask) else own)
        hooks.append(see_kept(module, norm, mask, silences=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _layers_of_kept(model: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """Let layers that went pass on what they are given, whatever their norms, scales and residuals would make of it."""
    hooks = []
    for name, stack in model.named_modules():
        is_stack = isinstance(stack, nn.ModuleList) and len(stack) == kept.before.num_hidden_layers
        for number, layer in enumerate(stack if is_stack and not split_name(name)[1] else ()):
            if number not in kept.layers:
                hooks.append(layer.register_forward_hook(_pass_on, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pass_on(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    given = inputs[0] if inputs else named.get("hidden_states")
    made, _ = unpacked(output)
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor) or given.shape != made.shape:
        raise UnsupportedError(f"{type(layer).__name__} makes no hidden states of hidden states, so that none can go.")
    return given if made is output else type(output)((given, *output[1:]))
