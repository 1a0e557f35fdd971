"""The widths of a model: their names, and the fields by which configurations say them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, with_config

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.exceptions import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Width(StrEnum):
    """The names of widths: the fields of `Widths`, and what plans and options call them."""

    HIDDEN = "hidden_size"
    HEADS = "num_attention_heads"
    GROUPS = "num_key_value_heads"
    HEAD_DIM = "head_dim"
    NEURONS = "intermediate_size"
    EXPERT_NEURONS = "moe_intermediate_size"
    SHARED_NEURONS = "shared_expert_intermediate_size"
    EXPERTS = "num_experts"
    LAYERS = "num_hidden_layers"


# The names that configurations give to each width, most usual first but for those of a decoder, beside which stand an
# encoder's; one that keeps several changes them together.
FIELDS: dict[str, tuple[str, ...]] = {
    Width.HIDDEN: ("hidden_size", "word_embed_proj_dim", "block_dim", "conv_dim", "conv_dim_out"),  # LFM2's last three
    Width.HEADS: ("decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads"),
    Width.GROUPS: ("num_key_value_heads", "num_kv_heads"),
    Width.HEAD_DIM: ("head_dim",),
    Width.NEURONS: (
        *("decoder_ffn_dim", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
        *("dff", "dim_ff", "d_inner", "feed_forward_size"),
    ),
    Width.EXPERT_NEURONS: ("moe_intermediate_size",),
    Width.SHARED_NEURONS: ("shared_expert_intermediate_size", "shared_intermediate_size"),
    Width.EXPERTS: ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    Width.LAYERS: ("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
}
PICKED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")  # experts of a token
EXPERT_GROUPS = ("n_group", "num_expert_group")
# Fields that may be several times a width.
MULTIPLES: dict[str, str] = {Width.HIDDEN: "attention_hidden_size", Width.LAYERS: "num_hidden_layers"}
HEAD_COUNTS = (Width.HEADS, Width.GROUPS)
NEURONS = (Width.NEURONS, Width.EXPERT_NEURONS, Width.SHARED_NEURONS)
OPTIONAL = (Width.EXPERT_NEURONS, Width.SHARED_NEURONS, Width.EXPERTS)


@with_config(ConfigDict(extra="forbid"))
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


def read_widths(config: PretrainedConfig) -> Widths:
    """The widths of a configuration.

    Raises:
        UnsupportedError: a width is missing.
        CheckpointError: a width is not a positive number.
    """
    found = {width: _read(config, width) for width in FIELDS}
    headless = found["num_attention_heads"] is None
    if headless:  # a state-space model; what it calls heads is not attention's
        found.update(num_attention_heads=0, num_key_value_heads=0, head_dim=0)
    if not getattr(config, "new_decoder_architecture", True):  # Falcon's first layouts, whatever num_kv_heads says
        found["num_key_value_heads"] = 1 if config.multi_query else found["num_attention_heads"]
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for width in ("hidden_size", "num_hidden_layers"):
        if found[width] is None:
            raise UnsupportedError(f"{config.model_type} has no {width}, so its layers cannot be pruned evenly.")
    if found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // max(found["num_attention_heads"], 1)
    if found["intermediate_size"] is None:  # without a field of that name, neurons follow something else
        found["intermediate_size"] = 4 * found["hidden_size"] if neuron_fields(config) else 0
    if getattr(config, "attribute_map", {}).get("intermediate_size") in FIELDS[Width.EXPERT_NEURONS]:
        found["intermediate_size"] = 0  # another name of the experts' neurons: no layer is dense
    for width in OPTIONAL:
        found[width] = found[width] or 0
    may_be_none = (*OPTIONAL, Width.NEURONS, *((*HEAD_COUNTS, Width.HEAD_DIM) if headless else ()))
    for width, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (width not in may_be_none):
            raise CheckpointError(f"config.json has {width} = {value!r}; it must be a positive whole number.")
    if not headless and found["num_attention_heads"] % found["num_key_value_heads"]:
        heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
        raise CheckpointError(f"config.json has {heads} query heads for {groups} KV heads, which do not divide them.")
    return Widths(**found)


def _fields(config: PretrainedConfig, width: str) -> tuple[str, ...]:
    own = FAMILIES.get(config.model_type, Family()).layers if width == Width.LAYERS else ""
    return (own,) if own else FIELDS[width]


def _read(config: PretrainedConfig, width: str) -> Any:
    found = next((value for name in _fields(config, width) if (value := getattr(config, name, None)) is not None), None)
    return found[0] if isinstance(found, list | tuple) and found else found  # see `varied_widths`


def read_layers(config: PretrainedConfig) -> int:
    """How many layers a model has; 0 where its configuration does not say."""
    return _read(config, Width.LAYERS) or 0


def varied_widths(config: PretrainedConfig) -> frozenset[str]:
    """The widths that are not the same in every layer, by a list of sizes or by settings of single layers."""
    single = getattr(config, "per_layer_attributes", None) or set()
    varied = {width for width, names in FIELDS.items() if not single.isdisjoint(names)}
    varied |= {width for width, sizes in _sizes_by_layer(config) if len(set(sizes)) > 1}
    return frozenset(map(str, varied))


def _sizes_by_layer(config: PretrainedConfig) -> Iterator[tuple[str, list[int]]]:
    for width, lists in ((width, _lists(config, width)) for width in FIELDS):
        for sizes in lists.values():
            yield width, sizes


def _lists(config: PretrainedConfig, width: str) -> dict[str, list[int]]:
    """The fields that give every layer its own size of a width, such as `num_attention_heads_per_layer`."""
    usual = (*FIELDS[width], *(f"{name}_per_layer" for name in FIELDS[width]))
    found = {name: getattr(config, name, None) for name in usual}
    return {name: list(value) for name, value in found.items() if isinstance(value, list | tuple) and value}


def neuron_fields(config: PretrainedConfig) -> list[str]:
    """The fields that count the neurons of an MLP, if only with None for four times the hidden size."""
    return [name for name in FIELDS[Width.NEURONS] if hasattr(config, name)]


def field_changes(config: PretrainedConfig, width: str, size: int) -> dict[str, Any]:
    """The fields to set so that a configuration has a width of this size."""
    lists = {name: [size] * len(sizes) for name, sizes in _lists(config, width).items()}
    made = {name for name in FIELDS[width] if isinstance(getattr(type(config), name, None), property)}  # of others
    present = [name for name in _fields(config, width) if name not in made and getattr(config, name, None) is not None]
    if width == Width.GROUPS and not getattr(config, "new_decoder_architecture", True):
        present = ["num_kv_heads"]  # which Falcon reads
    alike = {name: size for name in present if getattr(config, name) == getattr(config, present[0])}
    return (alike or {str(width): size}) | lists | _multiple(config, width, size)


def _multiple(config: PretrainedConfig, width: str, size: int) -> dict[str, int]:
    """What is several times a width, for another one, such as Zamba's doubled input of attention."""
    name = MULTIPLES.get(width)
    if name is None or name in _fields(config, width):  # which may be an encoder's
        return {}
    times, rest = divmod(getattr(config, name, None) or 0, _read(config, width))
    return {name: times * size} if times > 1 and not rest else {}
