"""Layer by layer: which of a teacher's layers a student's layer stands for, and how far apart their streams are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.widths import read_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.manifest import Manifest
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.run.layer import unpacked


def stands_for(pruned: Checkpoint, manifest: Manifest | None, teacher: Checkpoint, option: str) -> tuple[int, ...]:
    """For each layer of a pruned model, the last of the teacher's layers that it stands for.

    These are the layer that it was, and those behind it that went.

    Args:
        option: that asks for it.

    Raises:
        UnsupportedError: the residual streams have different widths.
        CheckpointError: nothing says which layers went.
    """
    own, its = read_widths(pruned.config), read_widths(teacher.config)
    if own.hidden_size != its.hidden_size:
        raise UnsupportedError(
            f"{option} compares residual streams, and that of {pruned.source} has {own.hidden_size:,} channels and not "
            f"{its.hidden_size:,} as its teacher's. Leave it out."
        )
    said = manifest.layers if manifest is not None else None
    kept = said if said is not None else tuple(range(its.num_hidden_layers))
    are_in_order = all(first < second for first, second in pairwise((-1, *kept, its.num_hidden_layers)))
    if len(kept) != own.num_hidden_layers or not are_in_order:
        raise CheckpointError(
            f"Nothing says which of the {its.num_hidden_layers} layers of {teacher.source} the "
            f"{own.num_hidden_layers} of {pruned.source} were, which {option} has to know. Leave it out."
        )
    return (*(following - 1 for following in kept[1:]), its.num_hidden_layers - 1)


def relative_error(own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ‖h − h′‖²/‖h′‖², of a student's and a teacher's residual stream, [B, T, D]."""
    wanted = wanted.float()
    return ((own.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


@contextmanager
def following(model: nn.Module, layers: Sequence[int] | None) -> Iterator[list[torch.Tensor]]:
    """While active, what the residual stream is behind these decoder layers, [B, T, D], is kept when the model runs.

    Args:
        layers: their numbers in ascending order; None for all.
    """
    streams: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        streams.append(unpacked(output)[0])

    modules = decoder_layers(model)
    with ExitStack() as stack:
        for number in range(len(modules)) if layers is None else layers:
            stack.callback(modules[number].register_forward_hook(keep).remove)
        yield streams


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Those of a model, in order."""
    numbered = (split_name(name) for name, _ in model.named_parameters())
    place = next(template for template, numbers in numbered if numbers).split(".{}")[0]
    layers = model.get_submodule(place)
    assert isinstance(layers, nn.ModuleList), place
    return layers
