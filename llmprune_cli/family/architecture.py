"""A configuration's rules: which widths can change, and what has to change with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from llmprune_cli.errors import LlmpruneError, UnsupportedError
from llmprune_cli.family.cache import Cached
from llmprune_cli.family.exceptions import FAMILIES, Family
from llmprune_cli.family.layers import find_layer_kinds, layer_changes, sample_layers
from llmprune_cli.family.skeleton import expected_index, shapes_of
from llmprune_cli.family.widths import (
    EXPERT_GROUPS,
    HEAD_COUNTS,
    NEURONS,
    PICKED,
    Width,
    Widths,
    field_changes,
    neuron_fields,
    read_layers,
    read_widths,
    varied_widths,
)
from llmprune_cli.folder.tensors import Shape

EXPERT_ALIGNMENT = 8  # torch's grouped matrix product wants rows of whole 16 bytes; 8 elements of two bytes are that


@dataclass(frozen=True)
class Architecture:
    """A configuration together with what was found out about its rules."""

    config: PretrainedConfig
    widths: Widths
    explicit_head_dim: bool  # the model reads `head_dim`, so query heads need not fill the hidden size
    hidden_follows_heads: bool  # the hidden size is query heads × head dim
    hidden_multiple_of_heads: bool  # the configuration refuses other hidden sizes
    layer_kinds: tuple[int, ...]  # for every layer, the first layer with the same tensors and per-layer settings
    kv_heads: tuple[int, ...] = ()  # KV heads of every layer, where layers have several numbers of them
    cached: tuple[Cached, ...] | None = None  # what every layer keeps of a token; None where that is not known

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
        counts = (getattr(self.config, name, None) for name in PICKED)
        return next((count for count in counts if isinstance(count, int)), 1)

    @property
    def expert_groups(self) -> int:
        """Groups of neighbouring experts that the router ranks before it picks, 1 where it does not."""
        return next((count for name in EXPERT_GROUPS if (count := getattr(self.config, name, None))), 1)

    def kv_heads_in(self, layer: int | None) -> int:
        """KV heads of a layer."""
        return self.kv_heads[layer] if self.kv_heads and layer is not None else self.widths.num_key_value_heads

    def cached_numbers(self, widths: Widths, layers: Sequence[int], once: bool = False) -> int | None:
        """How many numbers a model of these widths and layers keeps of a token; None where that is not known.

        Args:
            once: see `Cached.numbers`.
        """
        if self.cached is None:
            return None
        return sum(self.cached[layer].numbers(widths, once) for layer in layers)

    def step_of(self, width: str) -> int:
        """What sizes of a width must be a multiple of, by the kernels that stock software runs experts with."""
        return EXPERT_ALIGNMENT if self.widths.num_experts and width in ("hidden_size", self.expert_neurons) else 1


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
    try:
        shallow = reconfigure(config, layer_changes(config, layers))
    except ValueError as error:
        raise UnsupportedError(f"{config.model_type} cannot have only some of its layers: {error}") from error
    before = expected_index(shallow)
    headless = not widths.num_attention_heads
    kv_heads = _kv_heads(config, kinds, {layers[place]: heads for place, heads in shapes_of(shallow).sharing.items()})
    own_heads = (
        headless or getattr(config, "kv_lora_rank", None) is not None or have_own_heads(config) or bool(kv_heads)
    )
    others = [] if own_heads else [widths.head_dim + 2, widths.head_dim - 2]  # of which a family may refuse one
    explicit = any(_moves(shallow, before, {"head_dim": dim, **rotary_changes(config, dim)}) for dim in others)
    free = Architecture(shallow, replace(widths, num_hidden_layers=len(layers)), explicit, False, False, ())
    one, more = (replace(free.widths, hidden_size=widths.hidden_size + n) for n in (1, widths.num_attention_heads))
    multiple = not headless and not _accepts(free, one) and _accepts(free, more)
    fill = widths.num_attention_heads * widths.head_dim == widths.hidden_size
    return Architecture(config, widths, explicit, not explicit and not own_heads and fill, multiple, kinds, kv_heads)


def legal_heads(architecture: Architecture, groups: int) -> list[int]:
    """The numbers of query heads that so many KV groups, and the KV heads of every layer, can share evenly."""
    step = math.lcm(*architecture.kv_heads)
    return [heads for n in range(architecture.widths.heads_per_group) if (heads := groups * (n + 1)) % step == 0]


def most_heads(architecture: Architecture, groups: int, limit: int) -> int:
    """The largest legal number of query heads within a limit, the least where none is."""
    legal = legal_heads(architecture, groups)
    return max((heads for heads in legal if heads <= limit), default=legal[0])


def _kv_heads(config: PretrainedConfig, kinds: tuple[int, ...], sharing: dict[int, int]) -> tuple[int, ...]:
    """KV heads of every layer; none where all have the same number.

    Args:
        sharing: query heads for each KV head, by layers of every kind.
    """
    widths = read_widths(config)
    if Width.HEADS in varied_widths(config):
        return ()
    usual = widths.heads_per_group
    found = tuple(widths.num_attention_heads // sharing.get(kind, usual) for kind in kinds)
    return found if len(set(found)) > 1 else ()


def have_own_heads(config: PretrainedConfig) -> bool:
    """Whether layers have several numbers or sizes of heads."""
    return not varied_widths(config).isdisjoint((*HEAD_COUNTS, Width.HEAD_DIM))


def with_true_neurons(config: PretrainedConfig, shapes: dict[str, Shape]) -> PretrainedConfig:
    """The same configuration with the intermediate size that its model has, where it is unsaid or would be rounded."""
    unsaid = neuron_fields(config)
    if unsaid and all(getattr(config, name) is None for name in unsaid):
        before, usual = expected_index(config), 4 * config.hidden_size
        read = (name for name in unsaid if _moves(config, before, {name: 2 * usual}))
        name = next(read, None)
        return reconfigure(config, {name: usual}) if name and not _moves(config, before, {name: usual}) else config
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


def _accepts(architecture: Architecture, widths: Widths) -> bool:
    try:
        with_widths(architecture, widths)
    except ValueError:
        return False
    return True


def with_widths(architecture: Architecture, widths: Widths, layers: tuple[int, ...] | None = None) -> PretrainedConfig:
    """A copy of the configuration that has other widths; `head_dim` is written out where the model reads it.

    Args:
        layers: numbers of the layers that stay, as many as `widths` says; None keeps all.

    Raises:
        ValueError: the configuration refuses these widths.
    """
    config, changes = architecture.config, {}
    if layers is not None and len(layers) < read_layers(config):
        config = reconfigure(config, layer_changes(config, layers))
    for width in widths.changed_from(architecture.widths):
        if width != "num_hidden_layers":
            changes.update(field_changes(config, width, getattr(widths, width)))
    if architecture.explicit_head_dim:
        changes["head_dim"] = widths.head_dim
    return reconfigure(config, changes)


def reconfigure(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A checked copy of a configuration with some fields changed.

    Raises:
        ValueError: the configuration's own rules refuse the change.
    """
    changed = type(config)(**config.to_dict())  # `from_dict` would write it out as text each time, for a log
    try:
        for name, value in changes.items():
            setattr(changed, name, value)
        if hasattr(changed, "validate"):
            changed.validate()
        result = type(config)(**changed.to_dict())
        for name, value in changes.items():
            if isinstance(value, list) and getattr(result, name) != value:
                raise ValueError(f"it has a rule of its own for {name}, which would become {getattr(result, name)}")
        return result
    except Exception as error:  # every family raises its own kind
        last_line = (str(error).strip() or repr(error)).splitlines()[-1]
        raise ValueError(last_line.strip().removeprefix("ValueError: ")) from error


def has_layers(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether a configuration can describe only these of its layers, and does not make others of them."""
    try:
        reconfigure(config, layer_changes(config, kept))
    except ValueError:
        return False
    return True


def rotary_changes(config: PretrainedConfig, head_dim: int) -> dict[str, Any]:
    """The fields to set so that per-dimension factors of the position encoding fit a head dim, and sections add up."""
    rotary = getattr(config, "rope_parameters", None)
    if not isinstance(rotary, dict):
        return {}
    pairs = math.ceil(int(head_dim * rotary_fraction(config)) / 2)

    def fit(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fit(item) for name, item in value.items()}
        if not isinstance(value, list) or not value:
            return value
        if all(isinstance(item, int) for item in value) and len(value) < sum(value):
            return _sections(value, pairs)
        return (value + value[-1:] * pairs)[:pairs]

    return {"rope_parameters": fit(rotary)}


def _sections(sizes: list[int], total: int) -> list[int]:
    """Sections of pairs that turn by different positions, in about the same shares of another number of pairs."""
    others = [total * size // sum(sizes) for size in sizes[1:]]
    return [total - sum(others), *others]


def rotary_fraction(config: PretrainedConfig) -> float:
    """The share of a head's elements that the position encoding turns."""
    rotary = getattr(config, "rope_parameters", None) or {}
    fraction: float = rotary.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return fraction
