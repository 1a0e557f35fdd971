"""Whether the layers that stay remain what they were once they are numbered anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.architecture import reconfigure
from llmprune_cli.family.layers import layer_changes
from llmprune_cli.family.skeleton import REMEMBERED, Comparable, build_skeleton
from llmprune_cli.family.widths import read_layers
from llmprune_cli.folder.tensors import split_name

Described = dict[tuple[str, tuple[int, ...]], dict[str, Any]]  # by template and further numbers
PLAIN = (bool, int, float, str, type(None))  # what a module keeps of its settings
ABOUT_NEIGHBOURS = ("next_", "prev_")  # how attributes begin that say what the layer behind or before does


def check_kept_layers(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Build the model with all of its layers and with those that stay, without memory, and compare these.

    Every module of a kept layer must have the same class, shapes and settings, but for its number. This finds a setting
    that places kinds of layers and that nothing here knows of.

    Raises:
        UnsupportedError: one differs.
    """
    try:
        smaller = reconfigure(config, layer_changes(config, kept))
        before, after = _describe(config), _describe(smaller)
    except (ValueError, CheckpointError) as error:
        raise UnsupportedError(f"{config.model_type} cannot have only some of its layers: {error}") from error
    position = {layer: new for new, layer in enumerate(kept)}
    counted = {read_layers(config): len(kept), **position}
    for old, new in position.items():
        one, other = before.get(old, {}), after.get(new, {})
        for place in one.keys() | other.keys():
            for name, value in one.get(place, {}).items():
                found = other.get(place, {}).get(name)
                if not _are_alike(value, found, counted):
                    template, numbers = place
                    raise UnsupportedError(
                        f"{config.model_type} makes another layer of layer {old} where it becomes layer {new}: "
                        f"{name} of {template.format(old, *numbers)} is {value}, and would be {found}. Drop other "
                        "layers, or the last ones."
                    )


def remain_alike(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether `check_kept_layers` refuses nothing; a search asks of the same layers again and again."""
    return len(kept) == read_layers(config) or _remain_alike(Comparable.of(config), tuple(kept))


@lru_cache(maxsize=REMEMBERED)
def _remain_alike(comparable: Comparable, kept: tuple[int, ...]) -> bool:
    try:
        check_kept_layers(comparable.config, kept)
    except UnsupportedError:
        return False
    return True


def _describe(config: PretrainedConfig) -> dict[int, Described]:
    """The modules of each layer by its number: class, shapes and plain settings."""
    modules = dict(build_skeleton(config).named_modules())
    length = read_layers(config)
    lists = [f"{name}." for name, own in modules.items() if isinstance(own, nn.ModuleList) and len(own) == length]
    layers: dict[int, Described] = {}
    for name, module in modules.items():
        template, numbers = split_name(name)
        if any(name.startswith(prefix) for prefix in lists) and numbers:
            layers.setdefault(numbers[0], {})[template, numbers[1:]] = _settings(module)
    return layers


def _settings(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if not name.startswith(("_", *ABOUT_NEIGHBOURS))}
    plain = {name: value for name, value in own.items() if isinstance(value, PLAIN)}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    return {"class": type(module).__name__, **plain, **shapes}


def _are_alike(before: Any, after: Any, follows: dict[int, int]) -> bool:
    """Whether a setting stays, or follows as the number of a layer or of all layers does."""
    if type(before) is type(after) is float:
        return math.isclose(before, after, rel_tol=1e-6)
    return before == after or (type(before) is type(after) is int and follows.get(before) == after)
