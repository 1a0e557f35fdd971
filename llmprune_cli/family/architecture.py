"""What a configuration says: named widths, tensor names and shapes on disk, and which sizes are legal."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, LlmpruneError, UnsupportedError
from llmprune_cli.family.exceptions import FAMILIES, Family
from llmprune_cli.family.layers import find_layer_kinds, layer_changes, sample_layers
from llmprune_cli.folder.tensors import Shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The names that configurations give to each width, most usual first; one that keeps several changes them together.
FIELDS = {
    "hidden_size": ("hidden_size", "word_embed_proj_dim"),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "shared_expert_intermediate_size": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "num_hidden_layers": ("num_hidden_layers",),
}
HEADS = ("num_attention_heads", "num_key_value_heads")
OPTIONAL = ("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts")
NEURONS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_ALIGNMENT = 8  # torch's grouped matrix product wants rows of whole 16 bytes; 8 elements of two bytes are that


@dataclass(frozen=True)
class Widths:
    """The sizes that every layer shares."""

    hidden_size: int  # D, channels of the residual stream
    num_attention_heads: int  # H, query heads; 0 where no layer has attention, as the next two
    num_key_value_heads: int  # K, KV groups
    head_dim: int  # P
    intermediate_size: int  # F, neurons of the MLP; of every expert where the family has no width of its own for them
    num_hidden_layers: int  # L
    moe_intermediate_size: int = 0  # neurons of a routed expert; 0 where the model has no such width
    shared_expert_intermediate_size: int = 0  # neurons of the expert that every token passes
    num_experts: int = 0  # E, routed experts

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head; 1 where there are none."""
        return self.num_attention_heads // self.num_key_value_heads if self.num_key_value_heads else 1

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
    hidden_follows_heads: bool  # the hidden size is query heads × head dim
    hidden_multiple_of_heads: bool  # the configuration refuses other hidden sizes
    layer_kinds: tuple[int, ...]  # for every layer, the first layer with the same tensors and per-layer settings

    @property
    def own_heads(self) -> bool:
        """Whether the heads have sizes that follow no width (latent attention), or there are none."""
        return not self.explicit_head_dim and not self.hidden_follows_heads

    @property
    def expert_neurons(self) -> str:
        """The width that counts the neurons of a routed expert; empty where there are no experts."""
        return "" if not self.widths.num_experts else NEURONS[1] if self.widths.moe_intermediate_size else NEURONS[0]

    @property
    def experts_per_token(self) -> int:
        """Routed experts that the router picks for a token."""
        names = ("num_experts_per_tok", "moe_topk", "moe_k")
        return next(
            (getattr(self.config, name) for name in names if isinstance(getattr(self.config, name, None), int)), 1
        )

    @property
    def expert_groups(self) -> int:
        """Groups of neighbouring experts that the router ranks before it picks, 1 where it does not."""
        return getattr(self.config, "n_group", None) or 1

    def step_of(self, width: str) -> int:
        """What sizes of a width must be a multiple of, by the kernels that stock software runs experts with."""
        return EXPERT_ALIGNMENT if self.widths.num_experts and width in ("hidden_size", self.expert_neurons) else 1


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
    headless = found["num_attention_heads"] is None
    if headless:  # a state-space model; what it calls heads is not attention's
        found.update(num_attention_heads=0, num_key_value_heads=0, head_dim=0)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        found["num_key_value_heads"] = 1  # Falcon's first layout, whatever num_kv_heads says
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for width in ("hidden_size", "num_hidden_layers"):
        if found[width] is None:
            raise UnsupportedError(f"{config.model_type} has no {width}, so its layers cannot be pruned evenly.")
    if found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // max(found["num_attention_heads"], 1)
    if found["intermediate_size"] is None:
        found["intermediate_size"] = 4 * found["hidden_size"]
    for width in OPTIONAL:
        found[width] = found[width] or 0
    may_be_none = (*OPTIONAL, *HEADS, "head_dim") if headless else OPTIONAL
    for width, value in found.items():
        if isinstance(value, list | tuple):
            raise UnsupportedError(f"{config.model_type} gives every layer its own {width}, which is not supported.")
        if not isinstance(value, int) or isinstance(value, bool) or value < (width not in may_be_none):
            raise CheckpointError(f"config.json has {width} = {value!r}; it must be a positive whole number.")
    if not headless and found["num_attention_heads"] % found["num_key_value_heads"]:
        heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
        raise CheckpointError(f"config.json has {heads} query heads for {groups} KV heads, which do not divide them.")
    return Widths(**found)


def _read(config: PretrainedConfig, width: str) -> Any:
    return next((getattr(config, name) for name in FIELDS[width] if hasattr(config, name)), None)


def with_widths(architecture: Architecture, widths: Widths, layers: tuple[int, ...] | None = None) -> PretrainedConfig:
    """A copy of the configuration that has other widths; `head_dim` is written out where the model reads it.

    Args:
        layers: numbers of the layers that stay, as many as `widths` says; None keeps all.

    Raises:
        ValueError: the configuration refuses these widths.
    """
    config, changes = architecture.config, {}
    for width in widths.changed_from(architecture.widths):
        if width != "num_hidden_layers":
            changes.update(field_changes(config, width, getattr(widths, width)))
    if architecture.explicit_head_dim:
        changes["head_dim"] = widths.head_dim
    if layers is not None and len(layers) < config.num_hidden_layers:
        changes.update(layer_changes(config, layers))
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
        last_line = (str(error).strip() or repr(error)).splitlines()[-1]
        raise ValueError(last_line.strip().removeprefix("ValueError: ")) from error


def discover(config: PretrainedConfig, shapes: dict[str, Shape]) -> Architecture:
    """Find out a configuration's rules by trying them on a skeleton that has one layer of every kind.

    Args:
        shapes: of the model's tensors on disk, by name.

    Raises:
        UnsupportedError: transformers cannot build the model, or it has no uniform widths.
        CheckpointError: contradicting sizes.
    """
    config = with_true_neurons(config, shapes)
    widths = read_widths(config)
    kinds = find_layer_kinds(config, shapes)
    layers = sample_layers(config, kinds, 1)
    shallow = reconfigure(config, layer_changes(config, layers))
    before = expected_index(shallow)
    longer = widths.head_dim + 2
    headless = not widths.num_attention_heads
    explicit = not headless and _moves(shallow, before, {"head_dim": longer, **rotary_changes(config, longer)})
    own_heads = headless or (not explicit and getattr(config, "kv_lora_rank", None) is not None)
    free = Architecture(shallow, replace(widths, num_hidden_layers=len(layers)), explicit, False, False, ())
    multiple = not headless and not _accepts(free, replace(free.widths, hidden_size=widths.hidden_size + 1))
    return Architecture(config, widths, explicit, not explicit and not own_heads, multiple, kinds)


def with_true_neurons(config: PretrainedConfig, shapes: dict[str, Shape]) -> PretrainedConfig:
    """The same configuration with the intermediate size that its model has, where the model would round another."""
    family = FAMILIES.get(config.model_type, Family())
    if not getattr(config, family.rounds_neurons, False) or family.neurons not in shapes:
        return config
    neurons = {"intermediate_size": shapes[family.neurons][0]}
    return reconfigure(config, {family.rounds_neurons: False, **neurons})


def _moves(config: PretrainedConfig, before: dict[str, Shape], changes: dict[str, Any]) -> bool:
    """Whether a change of fields changes any tensor's shape."""
    try:
        return expected_index(reconfigure(config, changes)) != before
    except (ValueError, LlmpruneError):
        return False


def rotary_changes(config: PretrainedConfig, head_dim: int) -> dict[str, Any]:
    """The fields to set so that per-dimension factors of the position encoding fit a head dim."""
    rotary = getattr(config, "rope_parameters", None)
    if not isinstance(rotary, dict):
        return {}
    pairs = math.ceil(int(head_dim * rotary_fraction(config)) / 2)

    def fit(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fit(item) for name, item in value.items()}
        return (value + value[-1:] * pairs)[:pairs] if isinstance(value, list) and value else value

    return {"rope_parameters": fit(rotary)}


def rotary_fraction(config: PretrainedConfig) -> float:
    """The share of a head's elements that the position encoding turns."""
    rotary = getattr(config, "rope_parameters", None) or {}
    fraction: float = rotary.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return fraction


def _accepts(architecture: Architecture, widths: Widths) -> bool:
    try:
        with_widths(architecture, widths)
    except ValueError:
        return False
    return True


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the `meta` device: every module and shape, no memory.

    Raises:
        UnsupportedError: transformers has no causal LM for this configuration.
        CheckpointError: the configuration's sizes contradict each other.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty tensors: sizes are checked elsewhere
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=_is_remote(config))
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedError(f"{config.model_type} is not a causal language model in transformers.") from None
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    except Exception as error:  # every model class raises its own kind
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
