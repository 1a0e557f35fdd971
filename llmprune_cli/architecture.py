"""What a configuration says: named widths, tensor names and shapes on disk, and which sizes are legal."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The names that configurations give to each width, most usual first; one that keeps several changes them together.
FIELDS = {
    "hidden_size": ("hidden_size", "word_embed_proj_dim"),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "num_hidden_layers": ("num_hidden_layers",),
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Widths:
    """The sizes that every layer shares."""

    hidden_size: int  # D, channels of the residual stream
    num_attention_heads: int  # H, query heads
    num_key_value_heads: int  # K, KV groups
    head_dim: int  # P
    intermediate_size: int  # F, neurons of the MLP
    num_hidden_layers: int  # L

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    def changed_from(self, before: Widths) -> tuple[str, ...]:
        """Names of the widths that differ."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(before, f.name))

    def to_json(self) -> dict[str, int]:
        """Plain dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Architecture:
    """A configuration together with what was found out about its rules."""

    config: PretrainedConfig
    widths: Widths
    explicit_head_dim: bool  # the model reads `head_dim`, so query heads need not fill the hidden size
    hidden_multiple_of_heads: bool  # the configuration refuses other hidden sizes


def field_changes(config: PretrainedConfig, width: str, size: int) -> dict[str, int]:
    """The fields to set so that a configuration has a width of this size."""
    present = [name for name in FIELDS[width] if hasattr(config, name)]
    return {name: size for name in present if getattr(config, name) == getattr(config, present[0])} or {width: size}


def read_widths(config: PretrainedConfig) -> Widths:
    """The widths of a configuration.

    Raises:
        UnsupportedError: a width is missing, or not the same for every layer.
        CheckpointError: a width is not a positive number.
    """
    found = {width: _read(config, width) for width in FIELDS}
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        found["num_key_value_heads"] = 1  # Falcon's first layout, whatever num_kv_heads says
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for width in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        if found[width] is None:
            raise UnsupportedError(f"{config.model_type} has no {width}, so its layers cannot be pruned evenly.")
    if found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // max(found["num_attention_heads"], 1)
    if found["intermediate_size"] is None:
        found["intermediate_size"] = 4 * found["hidden_size"]
    for width, value in found.items():
        if isinstance(value, list | tuple):
            raise UnsupportedError(f"{config.model_type} gives every layer its own {width}, which is not supported.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json has {width} = {value!r}; it must be a positive whole number.")
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
        raise CheckpointError(f"config.json has {heads} query heads for {groups} KV heads, which do not divide them.")
    return Widths(**found)


def _read(config: PretrainedConfig, width: str) -> Any:
    return next((getattr(config, name) for name in FIELDS[width] if hasattr(config, name)), None)


def with_widths(architecture: Architecture, widths: Widths) -> PretrainedConfig:
    """A copy of the configuration that has other widths; `head_dim` is written out where the model reads it.

    Raises:
        ValueError: the configuration refuses these widths.
    """
    config, changes = architecture.config, {}
    for width in widths.changed_from(architecture.widths):
        changes.update(field_changes(config, width, getattr(widths, width)))
    if architecture.explicit_head_dim:
        changes["head_dim"] = widths.head_dim
    return reconfigure(config, changes)


def reconfigure(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A checked copy of a configuration with some fields changed.

    Raises:
        ValueError: the configuration's own rules refuse the change.
    """
    changed = type(config).from_dict(config.to_dict())
    try:
        for name, value in changes.items():
            setattr(changed, name, value)
        if hasattr(changed, "validate"):
            changed.validate()
        return type(config).from_dict(changed.to_dict())
    except Exception as error:  # every family raises its own kind
        raise ValueError(str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)) from error


def discover(config: PretrainedConfig) -> Architecture:
    """Find out a configuration's rules by trying them on a two-layer skeleton.

    Raises:
        UnsupportedError: transformers cannot build the model, or it has no uniform widths.
        CheckpointError: contradicting sizes.
    """
    widths = read_widths(config)
    shallow = Architecture(shallow_config(config), replace(widths, num_hidden_layers=2), False, False)
    before = expected_index(shallow.config)
    try:
        after = expected_index(reconfigure(shallow.config, {"head_dim": widths.head_dim + 2}))
        explicit = before != after
    except (ValueError, UnsupportedError):
        explicit = False
    tied = not _accepts(shallow, replace(widths, hidden_size=widths.hidden_size + 1), explicit)
    return Architecture(config, widths, explicit, tied)


def _accepts(architecture: Architecture, widths: Widths, explicit_head_dim: bool) -> bool:
    probe = replace(architecture, explicit_head_dim=explicit_head_dim)
    try:
        with_widths(probe, replace(widths, num_hidden_layers=2))
    except ValueError:
        return False
    return True


def shallow_config(config: PretrainedConfig, layers: int = 2) -> PretrainedConfig:
    """The same configuration with fewer layers; per-layer lists are cut to the first ones."""
    depth = config.num_hidden_layers
    lists = {
        name: value[:layers]
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == depth and name != "architectures"
    }
    return reconfigure(config, {**lists, "num_hidden_layers": min(layers, depth)})


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the `meta` device: every module and shape, no memory.

    Raises:
        UnsupportedError: transformers has no causal LM for this configuration.
        CheckpointError: the configuration's sizes contradict each other.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty tensors: sizes are checked elsewhere
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=_is_remote(config))
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedError(f"{config.model_type} is not a causal language model in transformers.") from None
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    except (RuntimeError, TypeError, AttributeError, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    return model


def _is_remote(config: PretrainedConfig) -> bool:
    """Whether the configuration's own class came with the checkpoint; loading it was allowed only on request."""
    return type(config).__module__.startswith("transformers_modules")


def expected_index(config: PretrainedConfig) -> dict[str, Shape]:
    """Names and shapes of the tensors that transformers saves for a configuration; a tied tensor appears once.

    Raises:
        UnsupportedError, CheckpointError: see `build_skeleton`.
    """
    model = build_skeleton(config)
    return {name: tuple(tensor.shape) for name, tensor in on_disk(model, model.state_dict()).items()}


def on_disk(model: PreTrainedModel, state: dict[str, Any]) -> dict[str, Any]:
    """Rename and regroup tensors named as in memory into those that `save_pretrained` writes.

    Works on anything shaped like the parameters: weights, gradients, shapes on `meta`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name not in tied and not any(pattern.search(name) for pattern in ignored)
    }
    converted: dict[str, Any] = revert_weight_conversion(model, kept)
    return converted


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor name's template and its numbers: `model.layers.3.mlp.up_proj.weight` gives `…layers.{}.mlp…`, (3,)."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    return ".".join("{}" if part.isdigit() else part for part in parts), numbers
