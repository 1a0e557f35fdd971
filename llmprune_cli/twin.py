"""A small model of the same architecture, used to find out which indices belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmprune_cli.architecture import (
    Architecture,
    Widths,
    build_skeleton,
    field_changes,
    on_disk,
    reconfigure,
    shallow_config,
    split_name,
)
from llmprune_cli.errors import LlmpruneError, UnsupportedError
from llmprune_cli.groups import Binding, Trace

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 24  # length of the twin's input
VOCABULARY = 32
EXPERTS = 3
EXPERT_FIELDS = ("num_local_experts", "num_experts", "num_experts_per_tok")
SEED = 20241  # of the twin's weights; any seed must give the same trace

Place = tuple[str, int]  # (tensor name or template, axis)


@dataclass(frozen=True)
class Twin:
    """A float64 model with real head counts and small everything else."""

    architecture: Architecture  # the twin's own
    model: PreTrainedModel
    tokens: torch.Tensor  # [1, TOKENS]


def build_twin(architecture: Architecture, head_dim: int, channels_per_head: int, neurons: int) -> Twin:
    """Build a two-layer twin with random weights.

    Raises:
        UnsupportedError: transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    real, config = architecture.widths, shallow_config(architecture.config)
    heads = real.num_attention_heads
    hidden_size = heads * (channels_per_head if architecture.explicit_head_dim else head_dim)
    layers = min(2, real.num_hidden_layers)
    widths = Widths(hidden_size, heads, real.num_key_value_heads, head_dim, neurons, layers)
    changes: dict[str, Any] = {
        **field_changes(config, "hidden_size", hidden_size),
        **field_changes(config, "intermediate_size", neurons),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * TOKENS,
        **({"head_dim": head_dim} if architecture.explicit_head_dim else {}),
        **_small_fields(config, head_dim),
    }
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
    twin_architecture = replace(architecture, config=small, widths=widths)
    return Twin(twin_architecture, model, tokens)


def small_head_dims(config: PretrainedConfig) -> tuple[int, int]:
    """Two small head dims of which the position encoding turns a whole number of pairs, at least one."""
    rotary = getattr(config, "rope_parameters", None) or {}
    fraction = rotary.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    fits = [size for size in range(4, 257, 2) if int(size * fraction) >= 2 and int(size * fraction) % 2 == 0]
    return fits[0], fits[1]


def _small_fields(config: PretrainedConfig, head_dim: int) -> dict[str, Any]:
    """Fields that must follow the small sizes: token ids, per-dimension RoPE factors, activations with dead zones."""
    changes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name.endswith("_token_id"):
            changes[name] = {"bos_token_id": 1, "eos_token_id": 2}.get(name)
        elif name == "rope_parameters" and isinstance(value, dict):
            changes[name] = _cut_lists(value, head_dim // 2)
        elif name in EXPERT_FIELDS and isinstance(value, int):
            changes[name] = EXPERTS  # as many as are picked: an expert that no token reaches would look unread
        elif value in ("relu", "relu2") and ("act" in name):
            changes[name] = "gelu"  # a neuron that never fires would look like one that nothing reads
        elif name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"):
            changes[name] = 0.0
    return changes


def _cut_lists(value: dict[str, Any], length: int) -> dict[str, Any]:
    def cut(item: Any) -> Any:
        return _cut_lists(item, length) if isinstance(item, dict) else item[:length] if isinstance(item, list) else item

    return {name: cut(item) for name, item in value.items()}


# --- trace ---------------------------------------------------------------------------------------------------------


def trace(architecture: Architecture) -> Trace:
    """Find the coupled axes of an architecture and the unit at each of their indices.

    Which axes: those whose size follows a width when the width takes one step. Which indices: zeroing what reads a unit
    makes the gradient of exactly that unit's rows vanish. Units are told apart by a binary code, with two passes for
    each bit, so that a row which several units need is never taken for one unit's own.

    Raises:
        UnsupportedError: no twin can be built.
    """
    import torch

    twin = build_twin(architecture, small_head_dims(architecture.config)[0], channels_per_head=3, neurons=12)
    widths = twin.architecture.widths
    followers = {
        "hidden_size": _step(twin, "hidden_size", widths.num_attention_heads),
        "head_dim": _step(twin, "head_dim", 2) if architecture.explicit_head_dim else None,
        "intermediate_size": _step(twin, "intermediate_size", 1),
    }
    followers["head_dim"] = followers["head_dim"] or followers["hidden_size"]
    found: list[Binding] = []
    readers: list[Binding] = []
    refused: dict[str, str] = {}
    for width, spaces in (
        ("intermediate_size", {"intermediate_size": widths.intermediate_size}),
        ("head_dim", _head_spaces(widths)),
    ):
        bound = followers[width]
        if bound is None or not bound.disk:
            refused.update(dict.fromkeys(spaces, f"no tensor axis of {architecture.config.model_type} follows it"))
            continue
        reader = _find_reader(twin, bound, widths, spaces)
        labels = {name: _labels(twin, bound, reader, name, count, widths) for name, count in spaces.items()}
        loose = width == "head_dim" and not architecture.explicit_head_dim
        if loose and widths.num_key_value_heads == 1:
            _leave_channels_out(labels, widths)
        bindings, reason = _bind(bound, labels, widths, loose, _output_axis(twin.model))
        found += bindings
        marked = _reader_on_disk(twin, bound, (split_name(reader[0])[0], reader[1]), torch.arange(bound.memory[reader]))
        places = {(split_name(name)[0], axis) for name, axis in marked}
        readers += [binding for binding in bindings if (binding.template, binding.axis) in places]
        refused.update(dict.fromkeys(spaces, reason) if reason else {})
    taken = {(binding.template, binding.axis) for binding in found}
    hidden = followers["hidden_size"]
    if hidden is None or not hidden.disk:
        refused["hidden_size"] = f"no tensor axis of {architecture.config.model_type} follows it"
    else:
        bindings, reason = _bind_channels(hidden, taken, widths)
        found += bindings
        refused.update({"hidden_size": reason} if reason else {})
    return Trace(tuple(found), tuple(readers), _scored(twin), refused)


def _head_spaces(widths: Widths) -> dict[str, int]:
    return {name: getattr(widths, name) for name in ("num_attention_heads", "num_key_value_heads")}


@dataclass(frozen=True)
class _Followers:
    """The axes whose size follows a width."""

    disk: dict[Place, int]  # (tensor name on disk, axis) → size
    memory: dict[Place, int]


def _step(twin: Twin, width: str, increment: int) -> _Followers | None:
    """Compare two skeletons whose configurations differ by the next legal step of one width."""
    config = twin.architecture.config
    before = _shapes(config)
    for steps in (1, 2, 4, 8):
        size = getattr(twin.architecture.widths, width) + increment * steps
        try:
            after = _shapes(reconfigure(config, field_changes(config, width, size)))
        except (ValueError, LlmpruneError):
            continue
        return _Followers(_changed(before[0], after[0]), _changed(before[1], after[1]))
    return None


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


def _find_reader(twin: Twin, bound: _Followers, widths: Widths, spaces: dict[str, int]) -> Place:
    """The parameter axis whose zeroing silences the most other axes: that is what reads the units."""
    count = spaces.get("intermediate_size", widths.num_attention_heads)
    chunk = 1 if "intermediate_size" in spaces else widths.head_dim
    group = 1 if "intermediate_size" in spaces else widths.heads_per_group
    baseline = _dead(twin, bound)
    shapes = _shapes(twin.architecture.config)[0]
    matrix = {(name, axis): len(shapes[name]) > 1 for name, axis in bound.disk}
    best, best_score = None, 0
    seen = set()
    for (name, axis), size in bound.memory.items():
        template = split_name(name)[0]
        if size != count * chunk or twin.model.get_parameter(name).ndim < 2 or (template, axis) in seen:
            continue
        seen.add((template, axis))
        with _zeroed(twin, (template, axis), range(group * chunk)):
            dead = _dead(twin, bound)
        silenced = [place for place in bound.disk if bool((dead[place] & ~baseline[place]).any())]
        score = sum(100 if matrix[place] else 1 for place in silenced)  # a norm or bias alone proves little
        if score > best_score:
            best, best_score = (name, axis), score
    if best is None:
        names = ", ".join(sorted({split_name(name)[0] for name, _ in bound.disk})[:4])
        raise UnsupportedError(f"Nothing that reads the units of {names} was found in the twin.")
    return best


@contextmanager
def _zeroed(twin: Twin, reader: Place, indices: Any) -> Iterator[None]:
    """Zero slices of a parameter template's axis in every layer, for the time being."""
    import torch

    template, axis = reader
    index = torch.as_tensor(list(indices), dtype=torch.long)
    saved = [(p, p.detach().clone()) for name, p in twin.model.named_parameters() if split_name(name)[0] == template]
    with torch.no_grad():
        for parameter, _ in saved:
            parameter.index_fill_(axis, index, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in saved:
                parameter.copy_(before)


def _dead(twin: Twin, bound: _Followers) -> dict[Place, torch.Tensor]:
    """For each bound axis on disk, the indices whose gradient vanishes altogether."""
    import torch

    model = twin.model
    model.zero_grad()
    logits = model(input_ids=twin.tokens, use_cache=False).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).sin_().reshape(logits.shape)
    (logits * weights).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    stored = on_disk(model, gradients)
    return {(name, axis): _silent(stored[name], axis) for name, axis in bound.disk}


def _silent(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    moved = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
    return (moved == 0).all(dim=1)


def _labels(
    twin: Twin, bound: _Followers, reader: Place, width: str, count: int, widths: Widths
) -> dict[Place, torch.Tensor]:
    """The unit of `width` at each index of each bound axis, -1 where no single unit is responsible."""
    import torch

    place = (split_name(reader[0])[0], reader[1])
    units = torch.arange(bound.memory[reader]) // (bound.memory[reader] // count)
    labels = {place: torch.zeros(size, dtype=torch.long) for place, size in bound.disk.items()}
    valid = {place: torch.ones(size, dtype=torch.bool) for place, size in bound.disk.items()}
    for bit in range(max(1, (count - 1).bit_length())):
        ones = (units >> bit) & 1 == 1
        with _zeroed(twin, place, ones.nonzero().flatten()):
            if_one = _dead(twin, bound)
        with _zeroed(twin, place, (~ones).nonzero().flatten()):
            if_zero = _dead(twin, bound)
        for axis in bound.disk:
            valid[axis] &= if_one[axis] ^ if_zero[axis]
            labels[axis] |= if_one[axis].long() << bit
    result = {axis: torch.where(valid[axis], labels[axis], -1) for axis in bound.disk}
    return {**result, **_reader_on_disk(twin, bound, place, units)}


def _reader_on_disk(twin: Twin, bound: _Followers, reader: Place, units: torch.Tensor) -> dict[Place, torch.Tensor]:
    """Where the reader's own axis lies on disk: write its unit numbers into it and see where they come out."""
    import torch

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
    bound: _Followers, labels: dict[str, dict[Place, torch.Tensor]], widths: Widths, loose: bool, output_axis: int
) -> tuple[list[Binding], str]:
    """Turn labels into bindings, one for each template and axis; the second value says why that failed."""
    found: dict[tuple[str, int, str], Binding] = {}
    for name, axis in bound.disk:
        template = split_name(name)[0]
        by_width = {width: spaces[name, axis] for width, spaces in labels.items()}
        by_width = _with_bias(name, output_axis, by_width, labels)
        if loose and all(bool((units < 0).all()) for units in by_width.values()):
            continue  # not an axis of heads but one of channels, whose size follows theirs
        made = _bind_neurons if "intermediate_size" in by_width else _bind_heads
        bindings = made(template, axis, by_width, widths)
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


def _bind_neurons(template: str, axis: int, by_width: dict[str, torch.Tensor], widths: Widths) -> list[Binding] | None:
    labels, count = by_width["intermediate_size"], widths.intermediate_size
    for interleaved in (False, True):
        binding = Binding(template, axis, "intermediate_size", len(labels) // count, interleaved)
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
    import torch
    from torch import nn

    kinds: dict[int, bool] = {}
    for module in twin.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            counts = parameter.ndim >= 2 or (isinstance(module, nn.LayerNorm) and name == "weight")
            counts = counts and not isinstance(module, nn.Embedding)
            kinds[id(parameter)] = kinds.get(id(parameter), False) or counts
    marked = {
        name: torch.full_like(parameter, float(kinds[id(parameter)])).detach()
        for name, parameter in twin.model.named_parameters()
    }
    return frozenset(split_name(name)[0] for name, mark in on_disk(twin.model, marked).items() if mark.flatten()[0] > 0)
