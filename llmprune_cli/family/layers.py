"""Decoder layers: which are alike, and how a configuration speaks of fewer of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.widths import Width, field_changes, read_layers
from llmprune_cli.folder.tensors import Shape, split_name

# Fields that name layers by number, and how the names of others end that do.
NUMBERED = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers", "global_attn_layers")
NUMBERED_ENDS = ("_layers", "_layer_ids", "_layer_idx", "_layer_indices", "_idxs")
# Fields that count the first layers, which differ; and the number of the last one that has experts.
LEADING = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "moe_layer_start_index")
LAST_SPARSE = "moe_layer_end_index"
KV_SHARED = "num_kv_shared_layers"  # counts the last layers, which take the keys and values of earlier ones
# Lists in which a layer may take what the last one before it of another kind has computed: the first kind of the two.
BORROWING = {"indexer_types": ("shared", "full")}
SPARSE_STEP = "decoder_sparse_step"  # every n-th layer is a mixture of experts, but for `mlp_only_layers`
# Fields that say which layers are special by a rhythm: every period-th, starting at the offset; and the list of kinds
# of layers that is read in their place where a configuration has one.
PERIODIC = (
    ("attn_layer_period", "attn_layer_offset", "layers_block_type"),
    ("expert_layer_period", "expert_layer_offset", ""),
)
CYCLES = ("block_types",)  # lists of kinds of layers that are repeated as often as there are layers
ROOT_OF_DEPTH = "scale_depth"  # what layers are multiplied by is this divided by the root of their number
# Fields that count layers behind the last one, which predict further tokens; transformers leaves their weights out.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
BY_LAYER = ("no_rope_layers",)  # lists with an item for each layer that are named like lists of numbers
# Lists that are not about layers, whatever their length.
NOT_LAYERS = ("token_id", "_limit", "_multipliers", "id2label", "label2id")


def find_layer_kinds(config: PretrainedConfig, shapes: dict[str, Shape]) -> tuple[int, ...]:
    """For every layer, the number of the first layer with the same tensors and the same per-layer settings.

    Args:
        shapes: of the model's tensors on disk, by name.

    Raises:
        UnsupportedError: some layers have no tensors, as where the same few run again and again.
    """
    tensors: list[list[tuple[str, tuple[int, ...], Shape]]] = [[] for _ in range(read_layers(config))]
    for name, shape in shapes.items():
        template, numbers = split_name(name)
        if numbers and numbers[0] < len(tensors):
            tensors[numbers[0]].append((template, numbers[1:], shape))
    bare = sum(not own for own in tensors)
    if 0 < bare < len(tensors):
        raise UnsupportedError(
            f"{config.model_type} counts {len(tensors)} layers and has tensors of {len(tensors) - bare}: layers that "
            "run several times are not supported."
        )
    lists = [value for name, value in config.to_dict().items() if _is_per_layer(config, name, value)]
    first: dict[Any, int] = {}
    kinds = []
    for layer, own in enumerate(tensors):
        kind = (frozenset(own), tuple(str(value[layer]) for value in lists))
        kinds.append(first.setdefault(kind, layer))
    return tuple(kinds)


def sample_layers(config: PretrainedConfig, kinds: Sequence[int], each: int) -> tuple[int, ...]:
    """The first `each` layers of every kind, two layers at least where the model has them.

    Where the configuration cannot describe those alone, the first layers of the model up to the last of them.
    """
    counts: dict[int, int] = {}
    picked = []
    for layer, kind in enumerate(kinds):
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= each or (layer == 1 and len(set(kinds)) == 1):
            picked.append(layer)
    return tuple(picked) if can_keep_layers(config, picked) else tuple(range(picked[-1] + 1))


def layer_changes(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The fields to set so that a configuration describes only some of its layers, in their order.

    What has one item for each layer is cut, layer numbers are renumbered, counts of leading or last layers are
    recounted, a scale by their number stays what it was, a rhythm of sparse layers becomes the list of its dense ones,
    a list that is repeated is written out, and any other rhythm gets the period that fits.

    Raises:
        ValueError: no period fits the layers that are kept, or one of them takes what another has computed that goes.
    """
    position = {layer: new for new, layer in enumerate(kept)}
    changes: dict[str, Any] = field_changes(config, Width.LAYERS, len(kept))
    settings = config.to_dict()
    for name, value in settings.items():
        if _names_layers(config, name, value):
            changes[name] = [position[layer] for layer in value if layer in position]
        elif _is_by_layer(config, name, value):
            changes[name] = {str(position[int(key)]): own for key, own in value.items() if int(key) in position}
        elif name in LEADING and isinstance(value, int):
            changes[name] = sum(layer < value for layer in kept)
        elif name == LAST_SPARSE and isinstance(value, int):
            changes[name] = sum(layer <= value for layer in kept) - 1
        elif name == KV_SHARED and value:
            changes[name] = sum(layer >= read_layers(config) - value for layer in kept)
        elif _is_per_layer(config, name, value):
            items = [value[layer] for layer in kept]
            changes[name] = "".join(items) if isinstance(value, str) else items
        elif name in CYCLES and value:
            changes[name] = [value[layer % len(value)] for layer in kept]
    if scale := settings.get(ROOT_OF_DEPTH):
        changes[ROOT_OF_DEPTH] = scale * math.sqrt(len(kept) / read_layers(config))
    _check_lenders(settings, read_layers(config), kept)
    step = getattr(config, SPARSE_STEP, 1)
    if isinstance(step, int) and step > 1:
        named = set(getattr(config, "mlp_only_layers", None) or ())
        dense = [layer for layer in kept if (layer + 1) % step or layer in named]
        changes.update({SPARSE_STEP: 1, "mlp_only_layers": [position[layer] for layer in dense]})
    for period, offset, listed in PERIODIC:
        every, start = getattr(config, period, None), getattr(config, offset, None)
        if isinstance(every, int) and isinstance(start, int) and not isinstance(settings.get(listed), list):
            changes.update(zip((period, offset), _rhythm(kept, every, start, period), strict=True))
    return changes


def can_keep_layers(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether a configuration can describe only these of its layers."""
    try:
        layer_changes(config, kept)
    except ValueError:
        return False
    return True


def _rhythm(kept: Sequence[int], period: int, offset: int, name: str) -> tuple[int, int]:
    """The period and offset of the special layers once the kept ones are numbered anew, the old period if it fits.

    Raises:
        ValueError: they follow none.
    """
    special = [layer % period == offset for layer in kept]
    for every in (period, *range(1, len(kept) + 2)):
        for start in range(every):
            if special == [layer % every == start for layer in range(len(kept))]:
                return every, start
    raise ValueError(f"no {name} describes the layers that would stay. Drop whole periods, or the last layers")


def further_layers(config: PretrainedConfig) -> range:
    """The numbers of the layers behind the last one, which predict further tokens."""
    counts = [value for name in FURTHER_LAYERS if isinstance(value := getattr(config, name, None), int)]
    layers = read_layers(config)
    return range(layers, layers + max(counts, default=0))


def every_nth(special: Sequence[bool]) -> int | None:
    """The n for which exactly every n-th layer is special, more than there are layers if none is; None for no such."""
    numbers = range(1, len(special) + 2)
    return next((n for n in numbers if [not layer % n for layer in range(1, len(special) + 1)] == [*special]), None)


def _check_lenders(settings: dict[str, Any], layers: int, kept: Sequence[int]) -> None:
    """Hold every layer that takes what another one has computed against the layers that stay.

    Raises:
        ValueError: it would take that of another layer, or find none.
    """
    taken = []  # layers that borrow, and those that they borrow from
    for name, (borrows, lends) in BORROWING.items():
        kinds = settings.get(name) or []
        taken += [(layer, _last(kinds[:layer], lends)) for layer, kind in enumerate(kinds) if kind == borrows]
    first_shared = layers - (settings.get(KV_SHARED) or 0)
    kinds = settings.get("layer_types") or [""] * layers
    taken += [(layer, _last(kinds[:first_shared], kinds[layer])) for layer in range(first_shared, layers)]
    for layer, lender in taken:
        if layer in kept and lender is not None and lender not in kept:
            raise ValueError(f"layer {layer} takes what layer {lender} computes, which would go. Drop both or neither")


def _last(kinds: Sequence[str], kind: str) -> int | None:
    """The last layer of a kind."""
    return max((layer for layer, own in enumerate(kinds) if own == kind), default=None)


def _names_layers(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Whether a setting is a list of layer numbers: by its name, or in ascending order and named like one."""
    if not isinstance(value, list):
        return False
    numbers = range(read_layers(config))
    ascending = all(type(item) is int and item in numbers for item in value) and value == sorted(set(value))
    is_usual = name.endswith(NUMBERED_ENDS) and ascending and (len(value) < len(numbers) or value == [*numbers])
    return name in NUMBERED or (is_usual and name not in BY_LAYER and len(value) > 0)


def _is_by_layer(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Whether a setting is a dictionary whose keys are layer numbers."""
    if not isinstance(value, dict) or not value or name.endswith(NOT_LAYERS):
        return False
    numbers = [str(key) for key in value]
    return all(number.isdecimal() and int(number) < read_layers(config) for number in numbers)


def _is_per_layer(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Whether a setting has one item for each layer: a list, or a letter for each in a pattern."""
    is_listed = isinstance(value, list) or (isinstance(value, str) and name.endswith("_pattern"))
    if not is_listed or len(value) != read_layers(config):
        return False
    return name not in (*NUMBERED, "architectures") and not name.endswith(NOT_LAYERS) and not name.startswith("mtp_")
