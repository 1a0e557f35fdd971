"""Adapters: small matrices of low rank that are trained beside those of a model, and added to them at the end."""

from __future__ import annotations

import warnings
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.folder.tensors import split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE = 2  # of adapters: alpha by rank
HELD = "held"  # the model's name within what peft is given
ROUNDING = 1e-5  # between two ways of computing one product


@dataclass(frozen=True)
class Adapters:
    """What is trained in the place of a model's matrices."""

    wrapping: Any  # peft's, of the model, whose modules it replaces
    model: PreTrainedModel
    bare: tuple[str, ...]  # tensors of the decoder layers, of two dimensions or more, that were to have some: none fit
    bare_share: float  # of the weights of the decoder layers that these are
    summed_bytes: int  # of the stacked matrices, to which their adapters are added in every step

    def merge(self) -> None:
        """Add them to what they are beside, and leave the model as it was built."""
        self.wrapping.merge_and_unload()

    def idle(self) -> dict[str, int]:
        """Those that learned nothing, since no gradient ever reached them: what they are beside, and their numbers."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, own in self.model.named_parameters():
            if own.requires_grad:
                found.setdefault(name.partition(".lora_")[0], []).append(own)
        # The second one of each two is zero at first, so that nothing is added.
        return {name: sum(own.numel() for own in both) for name, both in found.items() if not both[1].any()}


def adapt(model: PreTrainedModel, names: Set[str], rank: int, seed: int) -> Adapters:
    """Put adapters beside every matrix of the decoder layers among the parameters of these names, and train them alone.

    Args:
        seed: of the random numbers that they begin with, whatever else has drawn some before.

    Raises:
        UnsupportedError: there are none.
    """
    from peft import LoraConfig, get_peft_model

    within = {name: own for name, own in model.named_parameters() if name in names and split_name(name)[1]}
    layers, stacks = matrices(model, within.keys())
    if not layers and not stacks:
        raise UnsupportedError(f"{model.config.model_type} has no matrices for --lora. Leave it out.")
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        lora_dropout=0.0,
        target_modules=[f"{HELD}.{name}" for name in layers],
        target_parameters=[f"{HELD}.{name}" for name in stacks],
    )
    adapted = {*stacks, *(f"{name}.weight" for name in layers)}
    bare = {name: own.numel() for name, own in within.items() if own.ndim > 1 and name not in adapted}
    share = sum(bare.values()) / sum(own.numel() for own in within.values())
    summed = sum(within[name].nbytes for name in stacks)
    held = nn.ModuleDict({HELD: model})  # in a model of transformers peft takes some names for older ones of others
    place = next(model.parameters()).device
    with torch.random.fork_rng([place] if place.type == "cuda" else []), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers by older names
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # it sees by itself which layers are transposed
        return Adapters(get_peft_model(held, config), model, tuple(bare), share, summed)


def matrices(model: nn.Module, names: Set[str]) -> tuple[list[str], list[str]]:
    """The linear layers whose weights have these names, and the stacked matrices of experts that have them.

    One that several modules share is none of them: what is added for one would be added for all.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    holders: dict[int, int] = {}
    for _, own in model.named_parameters(remove_duplicate=False):
        holders[id(own)] = holders.get(id(own), 0) + 1
    alone = [(name, own) for name, own in model.named_parameters() if name in names and holders[id(own)] == 1]
    layers, stacks = [], []
    for name, own in alone:
        path, _, kind = name.rpartition(".")
        if isinstance(modules[path], nn.Linear | Conv1D):
            layers += [path] if kind == "weight" and _only_multiplies(modules[path]) else []
        elif own.ndim == 3 and "expert" in type(modules[path]).__name__.lower():
            stacks.append(name)
    return layers, stacks


def _only_multiplies(layer: Any) -> bool:
    """Whether a linear layer does nothing else: routers and grouped ones that are derived from it do."""
    if type(layer) is nn.Linear:
        return True
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    values = torch.linspace(-1, 1, weight.shape[1], device=weight.device)[None]
    with torch.no_grad():
        expected = nn.functional.linear(values, weight, layer.bias)
        try:
            result = layer(values)
        except (RuntimeError, ValueError, IndexError):  # it wants values of other shapes
            return False
    return isinstance(result, torch.Tensor) and torch.allclose(result, expected, ROUNDING, ROUNDING)
