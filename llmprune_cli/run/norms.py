"""Norms over elements of which some go: what they make of those that stay does not depend on the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from llmprune_cli.coupling.trace import Keep, kept_mask
from llmprune_cli.family.skeleton import vectors_on_disk
from llmprune_cli.family.widths import Width
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.run.layer import Layer
from llmprune_cli.run.layered_model import LayeredModel


def see_kept(module: nn.Module, norm: nn.Module, kept: torch.Tensor, silences: bool) -> RemovableHandle:
    """Let a norm give what a smaller one makes of the kept elements, until the handle is removed.

    Args:
        norm: the smaller one.
        kept: which elements stay, bool [elements].
        silences: whether the others become zero; else they are what the norm makes of all.
    """

    def replace_output(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or output.shape[-1] != len(kept):
            return None  # it runs over something else than these elements
        result = torch.zeros_like(output) if silences else output.clone()
        result[..., kept] = norm(inputs[0][..., kept])
        return result

    return module.register_forward_hook(replace_output)


def see_kept_units(model: LayeredModel, layer: Layer, number: int, keep: Keep) -> None:
    """Let a layer's norms over heads or neurons see those that stay, as in the model that is written.

    The others are still what the norm makes of all, for the weights that make up for them.

    Args:
        number: of the layer in the model.
    """
    within = {width: chosen for width, chosen in keep.items() if width != Width.HIDDEN}
    names = vectors_on_disk(layer.model) if within else {}
    for name, module in layer.block.named_modules(prefix=layer.prefix[:-1]):
        if f"{name}.weight" not in names:
            continue
        template, numbers = split_name(names[f"{name}.weight"])
        place, numbers = (0, len(module.weight)), (number, *numbers[1:])
        kept = kept_mask(model.trace, template, place, numbers, within, model.widths)
        if not bool(kept.all()):
            see_kept(module, _cut(module, kept), kept.to(layer.device), silences=False)


def _cut(module: nn.Module, kept: torch.Tensor) -> nn.Module:
    """The same norm, of the kept elements."""
    norm = copy.deepcopy(module)
    for parameter in norm.parameters(recurse=False):
        parameter.data = parameter.data[kept.to(parameter.device)]
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (int(kept.sum()),)
    return norm
