"""A small model of the same architecture, used to find out which indices belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmprune_cli.coupling.trace import GLOBAL_WIDTHS, Binding, Reader, Trace
from llmprune_cli.errors import LlmpruneError, UnsupportedError, first_line
from llmprune_cli.family.architecture import (
    HEADS,
    NEURONS,
    Architecture,
    Widths,
    build_skeleton,
    field_changes,
    on_disk,
    reconfigure,
    rotary_changes,
    rotary_fraction,
)
from llmprune_cli.family.layers import layer_changes, sample_layers
from llmprune_cli.folder.tensors import split_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 24  # length of the twin's input
WINDOW = 6  # of sliding attention, so that it matters within the input
VOCABULARY = 32
SEED = 20241  # of the twin's weights; any seed must give the same trace
# Sizes of latent attention in the twin, and how many heads it has there (they are not traced).
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 8,
    "v_head_dim": 4,
    "head_dim": 4,
}
LATENT_HEADS = 8
# What state-space layers call their expansion, heads, head dim and groups; heads × head dim is expansion × hidden size.
STATE_SPACE_HEADS = (
    ("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("expand", "num_heads", "head_dim", "n_groups"),
)
ROTARY = "rotary frequencies follow the head dim, so that fewer elements would turn at other speeds"
PARTLY_ROTARY = "the share of a head that turns, its speeds and the scale of attention follow the head dim"
UNROTATED = "the scale of attention follows the head dim, so that fewer elements would be weighed differently"

Place = tuple[str, int]  # (tensor name or template, axis)


@dataclass(frozen=True)
class TwinSizes:
    """How small a twin is; its heads are as many and as grouped as the model's."""

    head_dim: int
    channels_per_head: int
    neurons: int
    experts: int
    experts_per_token: int
    layers_per_kind: int


@dataclass(frozen=True)
class Twin:
    """A float64 model with real head counts and small everything else."""

    architecture: Architecture  # the twin's own
    model: PreTrainedModel
    tokens: torch.Tensor  # [1, TOKENS]


def trace_sizes(config: PretrainedConfig) -> TwinSizes:
    """Small, and with as many experts as are picked: an expert that no token reaches would look unread."""
    return TwinSizes(_small_head_dims(config)[0], 3, 12, experts=3, experts_per_token=3, layers_per_kind=1)


def proof_sizes(config: PretrainedConfig, drops_layers: bool) -> TwinSizes:
    """Other sizes than those that were traced, large enough to lose half of every width."""
    layers = 2 if drops_layers else 1
    return TwinSizes(_small_head_dims(config)[1], 8, 24, experts=8, experts_per_token=2, layers_per_kind=layers)


def build_twin(architecture: Architecture, sizes: TwinSizes) -> Twin:
    """Build a twin with random weights that has layers of every kind.

    Raises:
        UnsupportedError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    real = architecture.widths
    layers = sample_layers(architecture.config, architecture.layer_kinds, sizes.layers_per_kind)
    config = reconfigure(architecture.config, layer_changes(architecture.config, layers))
    if architecture.own_heads and real.num_attention_heads:
        real = replace(real, num_attention_heads=LATENT_HEADS, num_key_value_heads=LATENT_HEADS)
    heads = real.num_attention_heads or LATENT_HEADS
    hidden_per_head = sizes.head_dim if architecture.hidden_follows_heads else sizes.channels_per_head
    widths = replace(
        real,
        hidden_size=heads * hidden_per_head,
        head_dim=real.head_dim if architecture.own_heads else sizes.head_dim,
        num_hidden_layers=len(layers),
        num_experts=sizes.experts if real.num_experts else 0,
        **{width: sizes.neurons + 2 * n for n, width in enumerate(NEURONS) if getattr(real, width)},
    )
    changes: dict[str, Any] = {}
    for width in ("hidden_size", "num_attention_heads", "num_key_value_heads", *NEURONS, "num_experts"):
        if getattr(real, width) and (width not in HEADS or architecture.own_heads):
            changes.update(field_changes(config, width, getattr(widths, width)))
    changes.update(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        **({"head_dim": sizes.head_dim} if _writes_head_dim(architecture) else {}),
        **_small_fields(config, sizes, widths.hidden_size),
    )
    try:
        small = reconfigure(config, changes)
        torch_state = torch.random.get_rng_state()
        model = (
            AutoModelForCausalLM.from_config(small, attn_implementation="eager", experts_implementation="eager")
            .double()
            .eval()
        )
        torch.random.set_rng_state(torch_state)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"No small twin of {config.model_type} can be built ({error}).") from error
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    tokens = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
    own_kinds = tuple(layers.index(architecture.layer_kinds[layer]) for layer in layers)
    return Twin(replace(architecture, config=small, widths=widths, layer_kinds=own_kinds), model, tokens)


def _writes_head_dim(architecture: Architecture) -> bool:
    """Whether `head_dim` has to be set: where it is free, or must be hidden size / heads and is written out."""
    written = architecture.hidden_follows_heads and architecture.config.to_dict().get("head_dim")
    return architecture.explicit_head_dim or bool(written)


def _small_head_dims(config: PretrainedConfig) -> tuple[int, int]:
    """Two small head dims of which the position encoding turns a whole number of pairs, at least one."""
    fraction = rotary_fraction(config)
    fits = [size for size in range(4, 257, 2) if int(size * fraction) >= 2 and int(size * fraction) % 2 == 0]
    return fits[0], fits[1]


def _small_fields(config: PretrainedConfig, sizes: TwinSizes, hidden_size: int) -> dict[str, Any]:
    """Fields that must follow the small sizes: token ids, per-dimension RoPE factors, routing, dead activations."""
    changes: dict[str, Any] = rotary_changes(config, sizes.head_dim)
    for names in STATE_SPACE_HEADS:
        expand, heads, head_dim, groups = (getattr(config, name, None) for name in names)
        if heads and head_dim and expand and heads * head_dim == expand * config.hidden_size:
            changes.update({names[1]: groups or 1, names[2]: expand * hidden_size // (groups or 1)})
    for name, value in config.to_dict().items():
        if name.endswith("_token_id"):
            changes[name] = {"bos_token_id": 1, "eos_token_id": 2}.get(name)
        elif name in LATENT and isinstance(value, int) and hasattr(config, "kv_lora_rank"):
            changes[name] = LATENT[name]
        elif name in ("num_experts_per_tok", "moe_topk", "moe_k") and isinstance(value, int):
            changes[name] = sizes.experts_per_token
        elif name == "n_group" and value:
            changes.update(n_group=min(value, 2 if sizes.experts % 2 == 0 else 1), topk_group=1)
        elif name == "sliding_window" and value:
            changes[name] = WINDOW
        elif value in ("relu", "relu2") and ("act" in name):
            changes[name] = "gelu"  # a neuron that never fires would look like one that nothing reads
        elif name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"):
            changes[name] = 0.0
    return changes


def settle_head_dim(architecture: Architecture) -> Architecture:
    """Take back that query heads need not fill the hidden size where a twin of such sizes does not run.

    Raises:
        UnsupportedError: no twin can be built, or none runs.
    """
    try:
        _run(build_twin(architecture, trace_sizes(architecture.config)))
    except UnsupportedError:
        if not architecture.explicit_head_dim:
            raise
        architecture = replace(architecture, explicit_head_dim=False, hidden_follows_heads=True)
        _run(build_twin(architecture, trace_sizes(architecture.config)))
    return architecture


def _run(twin: Twin) -> None:
    try:
        with torch.no_grad():
            twin.model(input_ids=twin.tokens, use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        family = twin.architecture.config.model_type
        raise UnsupportedError(f"A small twin of {family} does not run ({first_line(error)}).") from error


# --- trace ---------------------------------------------------------------------------------------------------------


def trace(architecture: Architecture) -> Trace:
    """Find the coupled axes of an architecture and the unit at each of their indices.

    Which axes: those whose size follows a width when the width takes one step. Which indices: zeroing what reads a unit
    makes the gradient of exactly that unit's rows vanish. Units are told apart by a binary code, with two passes for
    each bit, so that a row which several units need is never taken for one unit's own.

    Raises:
        UnsupportedError: no twin can be built.
    """
    twin = build_twin(architecture, trace_sizes(architecture.config))
    widths = twin.architecture.widths
    family = architecture.config.model_type
    found: list[Binding] = []
    readers: list[Binding] = []
    inputs: list[Reader] = []
    refused: dict[str, str] = {}
    hidden = _step(twin, "hidden_size", 1 if architecture.own_heads else widths.num_attention_heads)
    for width in NEURONS:
        if not getattr(widths, width):
            continue
        bound = _step(twin, width, 1)
        if bound is None or not bound.disk:
            refused[width] = f"no tensor axis of {family} follows it" if bound else _own_rule(twin, width)
            continue
        bindings, own_readers, own_inputs, reason = _trace_units(twin, bound, width)
        found += bindings
        readers += own_readers
        inputs += own_inputs
        refused.update({width: reason} if reason else {})
    bound = _step(twin, "head_dim", 2) if architecture.explicit_head_dim else None
    bound = bound or (hidden if architecture.hidden_follows_heads else None)
    spaces = _head_spaces(widths)
    if bound is None or not bound.disk:
        reason = f"the heads of {family} have sizes of their own (latent attention), which stay whole"
        refused.update(dict.fromkeys(spaces, reason))
    else:
        bindings, own_readers, own_inputs, reason = _trace_heads(twin, bound)
        found += bindings if reason else [*bindings, *_bind_whole_heads(twin, bound)]
        readers += own_readers
        inputs += own_inputs
        refused.update(dict.fromkeys(spaces, reason) if reason else {})
    experts, expert_templates, routers, reason = _bind_experts(twin)
    found += experts
    refused.update({"num_experts": reason} if reason else {})
    taken = {(binding.template, binding.axis) for binding in found}
    if hidden is None or not hidden.disk:
        refused["hidden_size"] = f"no tensor axis of {family} follows it" if hidden else _own_rule(twin, "hidden_size")
    else:
        inner, own_readers, _, reason = _trace_units(twin, _within_layers(hidden, taken), "hidden_size")
        taken |= {(binding.template, binding.axis) for binding in inner}
        bindings, other_reason = _bind_channels(hidden, taken, widths)
        reason = reason or other_reason
        found += [] if reason else [*inner, *bindings]
        readers += [] if reason else own_readers
        refused.update({"hidden_size": reason} if reason else {})
    refused["head_dim"] = _why_head_dim_stays(architecture)
    return Trace(tuple(found), tuple(inputs), tuple(readers), _scored(twin), expert_templates, routers, refused)


def _trace_units(twin: Twin, bound: _Followers, width: str) -> tuple[list[Binding], list[Binding], list[Reader], str]:
    """The bindings of a width of neurons, those of them that read, the weights that do, and why it failed.

    Several MLPs may share the width: one reader after the other is found, until every axis has one. Of the axes that
    follow the hidden size only those within a layer are bound here, such as the channels of a convolution: what reads
    those silences matrices, which nothing does to the channels of the residual stream.
    """
    widths, found, readers, inputs = twin.architecture.widths, [], [], []
    remaining, component = dict(bound.disk), int(width in GLOBAL_WIDTHS)
    while remaining:
        rest = replace(bound, disk=remaining)
        unit_readers, labels = _read_units(twin, rest, width)
        if not unit_readers and width in GLOBAL_WIDTHS:
            break
        if not unit_readers:
            return [], [], [], f"nothing that reads the units of {split_name(next(iter(remaining))[0])[0]} was found"
        explained = {place: size for place, size in remaining.items() if bool((labels[place] >= 0).any())}
        explained = _with_biases(explained, remaining, _output_axis(twin.model))
        part = replace(bound, disk=explained)
        bindings, reason = _bind(part, {width: labels}, widths, False, _output_axis(twin.model), component)
        if reason or not explained:
            return [], [], [], reason or "no axis carries its units"
        found += bindings
        readers += [binding for reader in unit_readers for binding in _reading(twin, part, reader, bindings)]
        inputs += _inputs(twin, unit_readers, width, component)
        remaining = {place: size for place, size in remaining.items() if place not in explained}
        component += 1
    return found, readers, inputs, ""


def _why_head_dim_stays(architecture: Architecture) -> str:
    if architecture.hidden_follows_heads:
        return "it follows the hidden size"
    if not getattr(architecture.config, "rope_parameters", None):
        return UNROTATED
    return ROTARY if rotary_fraction(architecture.config) == 1 else PARTLY_ROTARY


def _within_layers(bound: _Followers, taken: set[Place]) -> _Followers:
    """Those axes that lie within layers and are not taken; outside, what reads channels silences the last layer.

    None where no tensor leads from channels to channels: then layers have none of their own.
    """

    def inside(places: dict[Place, int]) -> dict[Place, int]:
        return {place: size for place, size in places.items() if split_name(place[0])[1]}

    free = inside({place: size for place, size in bound.disk.items() if _template_place(place) not in taken})
    names = [name for name, _ in free]
    return replace(bound, disk=free if len(set(names)) < len(names) else {}, memory=inside(bound.memory))


def _read_units(twin: Twin, bound: _Followers, width: str) -> tuple[list[Place], dict[Place, torch.Tensor]]:
    """What reads the neurons of one MLP, and the unit at each index of each axis.

    Usually one tensor reads them all. In a state-space layer a second reads those that the gates do not touch, so that
    only zeroing both silences what writes them.
    """
    widths = twin.architecture.widths
    count = getattr(widths, width)
    readers: list[Place] = []
    labels: dict[Place, torch.Tensor] = {}
    while True:
        reader = _find_reader(twin, bound, widths, {width: count}, readers)
        if reader is None or reader in readers:
            return readers, labels
        readers.append(reader)
        labels = _labels(twin, bound, readers, width, count)
        told_apart = [bool((units >= 0).all()) for units in labels.values() if bool((units >= 0).any())]
        if all(told_apart):
            return readers, labels


def _with_biases(explained: dict[Place, int], remaining: dict[Place, int], output_axis: int) -> dict[Place, int]:
    """The same axes with those of the biases that run along them."""

    def is_explained(name: str, axis: int) -> bool:
        weight = name.removesuffix("bias") + "weight"
        return (name, axis) in explained or (name.endswith(".bias") and (weight, output_axis) in explained)

    return {(name, axis): size for (name, axis), size in remaining.items() if is_explained(name, axis)}


def _trace_heads(twin: Twin, bound: _Followers) -> tuple[list[Binding], list[Binding], list[Reader], str]:
    """The bindings of query heads and KV groups, those of them that read, the weight that does, and why it failed."""
    architecture = twin.architecture
    widths, spaces = architecture.widths, _head_spaces(architecture.widths)
    reader = _find_reader(twin, bound, widths, spaces)
    if reader is None:
        return [], [], [], "nothing that reads its heads was found"
    labels = {name: _labels(twin, bound, [reader], name, count) for name, count in spaces.items()}
    loose = architecture.hidden_follows_heads
    if loose and widths.num_key_value_heads == 1:
        _leave_channels_out(labels, widths)
    bindings, reason = _bind(bound, labels, widths, loose, _output_axis(twin.model))
    inputs = _inputs(twin, [reader], "num_attention_heads")
    return bindings, _reading(twin, bound, reader, bindings), inputs, reason


def _bind_whole_heads(twin: Twin, bound: _Followers) -> list[Binding]:
    """Axes with one element for each head, such as attention sinks: they follow the heads, but not the head dim."""
    architecture = twin.architecture
    if not architecture.explicit_head_dim:
        return []
    widths, config = architecture.widths, architecture.config
    counts = {"num_attention_heads": widths.num_attention_heads, "num_key_value_heads": widths.num_key_value_heads}
    found = {}
    more = (widths.num_attention_heads + widths.heads_per_group, widths.num_key_value_heads + 1)
    changes: dict[str, Any] = {"head_dim": widths.head_dim}
    for width, size in zip(counts, more, strict=True):
        changes.update(field_changes(config, width, size))
    for steps in (0, 1):  # where the hidden size must be a multiple of the heads, both move
        hidden = field_changes(config, "hidden_size", widths.hidden_size // widths.num_attention_heads * more[0])
        try:
            after = _shapes(reconfigure(config, {**changes, **(hidden if steps else {})}))[0]
        except (ValueError, LlmpruneError):
            continue
        before = _shapes(config)[0]
        for (name, axis), size in _changed(before, after).items():
            for width, count in counts.items():
                if size == count and after[name][axis] == changes.get(width, 0) and (name, axis) not in bound.disk:
                    binding = Binding(split_name(name)[0], axis, width)
                    found[binding.template, axis] = binding
        break
    return list(found.values())


def _reading(twin: Twin, bound: _Followers, reader: Place, bindings: list[Binding]) -> list[Binding]:
    """Those bindings whose axis on disk is the reader's."""
    units = torch.arange(bound.memory[reader])
    marked = _reader_on_disk(twin, bound, _template_place(reader), units)
    places = {(split_name(name)[0], axis) for name, axis in marked}
    return [binding for binding in bindings if (binding.template, binding.axis) in places]


def _bind_experts(twin: Twin) -> tuple[list[Binding], frozenset[str], frozenset[str], str]:
    """The axes along which experts are stacked, the templates that name each expert, the routers, and why it failed."""
    none: frozenset[str] = frozenset()
    count = twin.architecture.widths.num_experts
    if not count:
        return [], none, none, ""
    bound = _step(twin, "num_experts", 1)
    if bound is None or not (bound.disk or bound.new):
        return [], none, none, "no tensor follows the number of experts"
    found = {}
    for (name, axis), size in bound.disk.items():
        if size != count:
            reason = f"axis {axis} of {split_name(name)[0]} has {size} elements for {count} experts"
            return [], none, none, reason
        found[split_name(name)[0], axis] = Binding(split_name(name)[0], axis, "num_experts")
    templates = frozenset(split_name(name)[0] for name in bound.new)
    for name in bound.new:
        numbers = split_name(name)[1]
        if len(numbers) != 2 or numbers[1] != count:
            return [], none, none, f"{name} is not numbered by layer and expert"
    routers = frozenset(split_name(name)[0] for name, _ in bound.memory if twin.model.get_parameter(name).ndim == 2)
    return list(found.values()), templates, routers, ""


def _head_spaces(widths: Widths) -> dict[str, int]:
    return {name: getattr(widths, name) for name in HEADS if getattr(widths, name)}


@dataclass(frozen=True)
class _Followers:
    """The axes whose size follows a width."""

    disk: dict[Place, int]  # (tensor name on disk, axis) → size
    memory: dict[Place, int]
    new: tuple[str, ...]  # tensors on disk that the larger width adds


def _step(twin: Twin, width: str, increment: int) -> _Followers | None:
    """Compare two skeletons whose configurations differ by the next legal step of one width."""
    config = twin.architecture.config
    before = _shapes(config)
    for steps in (1, 2, 4, 8):
        changes = field_changes(config, width, getattr(twin.architecture.widths, width) + increment * steps)
        if width == "hidden_size" and twin.architecture.hidden_follows_heads:
            head_dim = twin.architecture.widths.head_dim + steps
            changes.update(rotary_changes(config, head_dim))
            changes.update({"head_dim": head_dim} if _writes_head_dim(twin.architecture) else {})
        try:
            after = _shapes(reconfigure(config, changes))
        except (ValueError, LlmpruneError):
            continue
        new = tuple(name for name in after[0] if name not in before[0])
        return _Followers(_changed(before[0], after[0]), _changed(before[1], after[1]), new)
    return None


def _own_rule(twin: Twin, width: str) -> str:
    """Why no other size of a width can be had, in the words of the configuration or the model."""
    config = twin.architecture.config
    try:
        build_skeleton(reconfigure(config, field_changes(config, width, 2 * getattr(twin.architecture.widths, width))))
    except (ValueError, LlmpruneError) as error:
        return f"it cannot change alone ({re.sub(r' [(][0-9]+[)]', '', str(error)).rstrip('.')})"
    return "it cannot change alone"


def _shapes(config: PretrainedConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    model = build_skeleton(config)
    state = model.state_dict()
    disk = {name: tuple(tensor.shape) for name, tensor in on_disk(model, state).items()}
    return disk, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _changed(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> dict[Place, int]:
    return {
        (name, axis): size
        for name, shape in before.items()
        for axis, size in enumerate(shape)
        if name in after and len(after[name]) == len(shape) and after[name][axis] != size
    }


def _find_reader(
    twin: Twin, bound: _Followers, widths: Widths, spaces: dict[str, int], others: Sequence[Place] = ()
) -> Place | None:
    """The parameter axis whose zeroing silences the most other axes: that is what reads the units.

    An axis that a product sums over beats all others: a gate silences a neuron too, but does not read it.

    Args:
        others: readers that are known already; then, as for channels, only what silences a matrix counts.
    """
    heads = "num_attention_heads" in spaces
    count = spaces["num_attention_heads"] if heads else next(iter(spaces.values()))
    chunk = widths.head_dim if heads else 1
    # a whole KV group also silences keys and values, but with one group everything would be zero
    group = widths.heads_per_group if heads and widths.num_key_value_heads > 1 else 1
    known = [_template_place(place) for place in others]
    with _zeroed(twin, known, range(group * chunk)):
        baseline = _dead(twin, bound)
    shapes = _shapes(twin.architecture.config)[0]
    matrices = {(split_name(name)[0], axis): len(shapes[name]) > 1 for name, axis in bound.disk}
    best, best_score = None, 99 if others or "hidden_size" in spaces else 0
    summed, seen = _summed_axes(twin), set(known)
    for (name, axis), size in sorted(bound.memory.items(), key=lambda item: _template_place(item[0]) not in summed):
        template = split_name(name)[0]
        fits = size == count * chunk if heads else size % count == 0
        fits &= all(bound.memory[other] == size for other in others)
        if not fits or twin.model.get_parameter(name).ndim < 2 or (template, axis) in seen:
            continue
        if best is not None and (template, axis) not in summed:
            break
        seen.add((template, axis))
        with _zeroed(twin, [*known, (template, axis)], range(group * chunk)):
            dead = _dead(twin, bound)
        everywhere: dict[Place, bool] = {}  # a reader of heads or neurons silences them in every layer
        for name_on_disk, axis_on_disk in bound.disk:
            silenced = bool((dead[name_on_disk, axis_on_disk] & ~baseline[name_on_disk, axis_on_disk]).any())
            group_of = split_name(name_on_disk)[0], axis_on_disk
            everywhere[group_of] = everywhere.get(group_of, True) and silenced
        # a norm or bias alone proves little
        score = sum(100 if matrices[place] else 1 for place, silent in everywhere.items() if silent)
        if score > best_score:
            best, best_score = (name, axis), score
    return best


def _inputs(twin: Twin, readers: Sequence[Place], width: str, component: int = 0) -> list[Reader]:
    """The weights that can make up for units: what several weights read, none of them can make up for alone."""
    places = [_template_place(place) for place in readers]
    return [Reader(*place, width, component) for place in places if len(places) == 1 and place in _summed_axes(twin)]


def _summed_axes(twin: Twin) -> set[Place]:
    """The axes of parameter templates that products sum over."""
    from llmprune_cli.coupling.products import Products

    found: set[Place] = set()
    with Products(twin.model.named_parameters(), lambda seen: found.add((split_name(seen.parameter)[0], seen.axis))):
        _run(twin)
    return found


def _template_place(place: Place) -> Place:
    return split_name(place[0])[0], place[1]


@contextmanager
def _zeroed(twin: Twin, readers: Sequence[Place], indices: Any) -> Iterator[None]:
    """Zero the same slices of some parameter templates' axes in every layer, for the time being."""
    axes = dict(readers)
    index = torch.as_tensor(list(indices), dtype=torch.long)
    named = [(split_name(name)[0], parameter) for name, parameter in twin.model.named_parameters()]
    zeroed = [(parameter, axes[template]) for template, parameter in named if template in axes]
    saved = [parameter.detach().clone() for parameter, _ in zeroed]
    with torch.no_grad():
        for parameter, axis in zeroed:
            parameter.index_fill_(axis, index, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), before in zip(zeroed, saved, strict=True):
                parameter.copy_(before)


def _dead(twin: Twin, bound: _Followers) -> dict[Place, torch.Tensor]:
    """For each bound axis on disk, the indices whose gradient vanishes altogether."""
    model = twin.model
    model.zero_grad()
    with _fixed_norms():
        logits = model(input_ids=twin.tokens, use_cache=False).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).sin_().reshape(logits.shape)
    (logits * weights).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    stored = on_disk(model, gradients)
    return {(name, axis): _silent(stored[name], axis) for name, axis in bound.disk}


def _fixed_norms() -> AbstractContextManager[None]:
    """Hold the statistics of RMSNorms fixed, so that a norm over all heads does not make each feel every other."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            return result.detach() if function in (torch.rsqrt, torch.Tensor.rsqrt) else result

    return Mode()


def _silent(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    moved = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
    return (moved == 0).all(dim=1)


def _labels(
    twin: Twin, bound: _Followers, readers: Sequence[Place], width: str, count: int
) -> dict[Place, torch.Tensor]:
    """The unit of `width` at each index of each bound axis, -1 where no single unit is responsible."""
    places = [_template_place(reader) for reader in readers]
    size = bound.memory[readers[0]]
    units = torch.arange(size) // (size // count) if width in HEADS else torch.arange(size) % count
    labels = {place: torch.zeros(size, dtype=torch.long) for place, size in bound.disk.items()}
    valid = {place: torch.ones(size, dtype=torch.bool) for place, size in bound.disk.items()}
    for bit in range(max(1, (count - 1).bit_length())):
        ones = (units >> bit) & 1 == 1
        with _zeroed(twin, places, ones.nonzero().flatten()):
            if_one = _dead(twin, bound)
        with _zeroed(twin, places, (~ones).nonzero().flatten()):
            if_zero = _dead(twin, bound)
        for axis in bound.disk:
            valid[axis] &= if_one[axis] ^ if_zero[axis]
            labels[axis] |= if_one[axis].long() << bit
    result = {axis: torch.where(valid[axis], labels[axis], -1) for axis in bound.disk}
    for place in places:
        result.update(_reader_on_disk(twin, bound, place, units))
    return result


def _reader_on_disk(twin: Twin, bound: _Followers, reader: Place, units: torch.Tensor) -> dict[Place, torch.Tensor]:
    """Where the reader's own axis lies on disk: write its unit numbers into it and see where they come out."""
    template, axis = reader
    marked = {}
    for name, parameter in twin.model.named_parameters():
        mark = torch.zeros_like(parameter)
        if split_name(name)[0] == template:
            shape = [1] * parameter.ndim
            shape[axis] = -1
            mark += (units + 1).reshape(shape)
        marked[name] = mark.detach()
    result = {}
    stored = on_disk(twin.model, marked)
    for name, disk_axis in bound.disk:
        moved = stored[name].movedim(disk_axis, 0).reshape(stored[name].shape[disk_axis], -1)
        if (moved > 0).all() and (moved == moved[:, :1]).all():
            result[name, disk_axis] = moved[:, 0].long() - 1
    return result


def _leave_channels_out(labels: dict[str, dict[Place, torch.Tensor]], widths: Widths) -> None:
    """With one KV head, silencing it silences whole tensors, their channel axes too: take those labels back."""
    for place, units in labels["num_attention_heads"].items():
        if len(units) == widths.hidden_size and bool((units < 0).all()):
            labels["num_key_value_heads"][place].fill_(-1)


def _output_axis(model: PreTrainedModel) -> int:
    """The axis of a weight that its bias runs along: 1 in GPT-2's transposed `Conv1D`, else 0."""
    return int(any(type(module).__name__ == "Conv1D" for module in model.modules()))


def _bind(
    bound: _Followers,
    labels: dict[str, dict[Place, torch.Tensor]],
    widths: Widths,
    loose: bool,
    output_axis: int,
    component: int = 0,
) -> tuple[list[Binding], str]:
    """Turn labels into bindings, one for each template and axis; the second value says why that failed."""
    found: dict[tuple[str, int, str], Binding] = {}
    for name, axis in bound.disk:
        template = split_name(name)[0]
        by_width = {width: spaces[name, axis] for width, spaces in labels.items()}
        by_width = _with_bias(name, output_axis, by_width, labels)
        if loose and all(bool((units < 0).all()) for units in by_width.values()):
            continue  # not an axis of heads but one of channels, whose size follows theirs
        if "num_attention_heads" in by_width:
            bindings = _bind_heads(template, axis, by_width, widths)
        else:
            ((width, units),) = by_width.items()
            bindings = _bind_neurons(Binding(template, axis, width, component=component), units, widths)
        if bindings is None:
            if bound.disk[name, axis] == widths.head_dim:
                continue  # a norm over one head's elements, shared by all heads
            return [], f"the units along axis {axis} of {template} could not be told apart"
        for binding in bindings:
            if found.setdefault((template, axis, binding.width), binding) != binding:
                return [], f"axis {axis} of {template} is laid out differently from layer to layer"
    return list(found.values()), "" if found else "no axis carries its units"


def _with_bias(
    name: str, output_axis: int, own: dict[str, torch.Tensor], labels: dict[str, dict[Place, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """A bias follows the rows of its weight (a key bias has no gradient without a position encoding)."""
    if not name.endswith(".bias"):
        return own
    size = len(next(iter(own.values())))
    weight = name.removesuffix("bias") + "weight"
    mates = {width: spaces.get((weight, output_axis)) for width, spaces in labels.items()}
    if all(mate is not None and len(mate) == size for mate in mates.values()):
        return {width: mate for width, mate in mates.items() if mate is not None}
    return own


def _bind_neurons(bare: Binding, labels: torch.Tensor, widths: Widths) -> list[Binding] | None:
    for interleaved in (False, True):
        copies = len(labels) // getattr(widths, bare.width)
        binding = replace(bare, copies=copies, interleaved=interleaved)
        units = binding.units(widths)
        if len(units) == len(labels) and bool((units == labels).all()):
            return [binding]
    return None


def _bind_heads(template: str, axis: int, by_width: dict[str, torch.Tensor], widths: Widths) -> list[Binding] | None:
    size = len(by_width["num_attention_heads"])
    if size % widths.head_dim:
        return None
    heads = _by_head(by_width["num_attention_heads"], widths.head_dim)
    groups = _by_head(by_width["num_key_value_heads"], widths.head_dim)
    if heads is None or groups is None:
        return None
    heads_per_group = widths.heads_per_group
    if heads_per_group == 1:
        heads = groups  # one name for a head and its group
    if all(unit < 0 for unit in heads) and all(unit < 0 for unit in groups):
        # a norm over all heads lets every row feel every unit: take the plain order, which the proof then checks
        if size == widths.num_attention_heads * widths.head_dim:
            heads = tuple(range(widths.num_attention_heads))
        elif size == widths.num_key_value_heads * widths.head_dim:
            groups = tuple(range(widths.num_key_value_heads))
        else:
            return None
    # a row of one query head is bound to that head alone: a removed group takes its heads with it
    groups = tuple(group if head < 0 else -1 for head, group in zip(heads, groups, strict=True))
    if any(head < 0 and group < 0 for head, group in zip(heads, groups, strict=True)):
        return None
    made = {"num_attention_heads": heads, "num_key_value_heads": groups}
    return [Binding(template, axis, width, heads=units) for width, units in made.items() if max(units) >= 0]


def _by_head(labels: torch.Tensor, head_dim: int) -> tuple[int, ...] | None:
    blocks = labels.reshape(-1, head_dim)
    if not bool((blocks == blocks[:, :1]).all()):
        return None
    return tuple(blocks[:, 0].tolist())


def _bind_channels(bound: _Followers, taken: set[Place], widths: Widths) -> tuple[list[Binding], str]:
    found = {}
    for (name, axis), size in bound.disk.items():
        template = split_name(name)[0]
        if (template, axis) in taken:
            continue
        if size != widths.hidden_size:
            return [], f"axis {axis} of {template} has {size} elements for {widths.hidden_size} channels"
        found[template, axis] = Binding(template, axis, "hidden_size")
    return list(found.values()), ""


def _scored(twin: Twin) -> frozenset[str]:
    """Templates of the tensors that count in importance: weights of linear maps and of LayerNorm, as in torch-pruning.

    Biases, RMSNorm and embeddings do not count; an embedding that is tied to the output projection does, as the latter.
    """
    kinds: dict[int, bool] = {}
    for module in twin.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            counts = parameter.ndim >= 2 or (isinstance(module, nn.LayerNorm) and name == "weight")
            counts = counts and not isinstance(module, nn.Embedding) and not name.endswith("bias")
            kinds[id(parameter)] = kinds.get(id(parameter), False) or counts
    marked = {
        name: torch.full_like(parameter, float(kinds[id(parameter)])).detach()
        for name, parameter in twin.model.named_parameters()
    }
    return frozenset(split_name(name)[0] for name, mark in on_disk(twin.model, marked).items() if mark.flatten()[0] > 0)
