"""What transformers makes of a configuration, without memory: names and shapes, as in memory and as on disk."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.folder.tensors import Shape, split_name

REMEMBERED = 32  # configurations whose shapes are kept


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model's tensors, by their names on disk and by their parameters' names in memory."""

    disk: dict[str, Shape]  # a tied tensor appears once
    memory: dict[str, Shape]
    sharing: dict[int, int]  # query heads for each KV head, by the number of the layer, where its attention says so


@dataclass(frozen=True)
class Comparable:
    """A configuration that equals others of the same class and fields, so that what follows from it is kept by it."""

    kind: type
    fields: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Comparable:
        """The configuration as it is now."""
        return cls(type(config), config.to_json_string(use_diff=False), config)


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the `meta` device: every module and shape, no memory.

    Raises:
        UnsupportedError: transformers has no causal LM for this configuration.
        CheckpointError: the configuration's sizes contradict each other.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty tensors: sizes are checked elsewhere
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=is_remote(config))
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedError(
                f"transformers' AutoModelForCausalLM builds no {config.model_type}, so that nothing can be proven of "
                "it. Prune a causal language model of another family."
            ) from None
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    except Exception as error:  # every model class raises its own kind
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    return model


def is_remote(config: PretrainedConfig) -> bool:
    """Whether the configuration's own class came with the checkpoint; loading it was allowed only on request."""
    return type(config).__module__.startswith("transformers_modules")


def expected_index(config: PretrainedConfig) -> dict[str, Shape]:
    """Names and shapes of the tensors that transformers saves for a configuration; a tied tensor appears once.

    Raises:
        UnsupportedError, CheckpointError: see `build_skeleton`.
    """
    return shapes_of(config).disk


def shapes_of(config: PretrainedConfig) -> Shapes:
    """The shapes of the model of a configuration, which are asked for again and again.

    Raises:
        UnsupportedError, CheckpointError: see `build_skeleton`.
    """
    found = _shapes(Comparable.of(config))
    return Shapes(dict(found.disk), dict(found.memory), dict(found.sharing))


@lru_cache(maxsize=REMEMBERED)
def _shapes(comparable: Comparable) -> Shapes:
    model = build_skeleton(comparable.config)
    disk = {name: tuple(tensor.shape) for name, tensor in on_disk(model, model.state_dict()).items()}
    sharing = {}
    for name, module in model.named_modules():
        numbers, heads = split_name(name)[1], getattr(module, "num_key_value_groups", None)
        if numbers and isinstance(heads, int):
            sharing[numbers[0]] = heads
    return Shapes(disk, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, sharing)


def on_disk(model: PreTrainedModel, state: dict[str, Any]) -> dict[str, Any]:
    """Rename and regroup tensors named as in memory into those that `save_pretrained` writes.

    Works on anything shaped like the parameters: weights, gradients, shapes on `meta`.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    # of two names of one parameter a model lists the first alone, which may be the one that is not written
    unlisted = {source: state[name] for name, source in tied.items() if name in state and source not in state}
    state = {**state, **unlisted}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name not in tied and not any(pattern.search(name) for pattern in ignored)
    }
    converted: dict[str, Any] = revert_weight_conversion(model, kept)
    return converted


def vectors_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """What the vectors of a model are called on disk, by their names in memory."""
    vectors = {name: own for name, own in model.named_parameters() if own.ndim == 1}
    numbers = dict(enumerate(vectors))
    marked = {name: torch.full(vectors[name].shape, float(number)) for number, name in numbers.items()}
    stored = {name: mark for name, mark in on_disk(model, marked).items() if mark.numel()}
    alike = {name: mark.flatten()[0] for name, mark in stored.items() if bool((mark == mark.flatten()[0]).all())}
    return {numbers[int(number)]: name for name, number in alike.items()}
