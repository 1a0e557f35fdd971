"""Which unit is at each index of an axis: zero what reads units in a twin, and see whose gradients vanish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmprune_cli.coupling.products import Products
from llmprune_cli.coupling.step import Followers, Place, template_place
from llmprune_cli.coupling.twin import Twin, run_twin
from llmprune_cli.family.skeleton import on_disk, shapes_of
from llmprune_cli.family.widths import HEAD_COUNTS, Width, Widths
from llmprune_cli.folder.tensors import split_name


def read_units(twin: Twin, bound: Followers, width: str) -> tuple[list[Place], dict[Place, torch.Tensor]]:
    """What reads the neurons of one MLP, and the unit at each index of each axis.

    Usually one tensor reads them all. In a state-space layer a second reads those that the gates do not touch, so that
    only zeroing both silences what writes them.
    """
    widths = twin.architecture.widths
    count = getattr(widths, width)
    readers: list[Place] = []
    labels: dict[Place, torch.Tensor] = {}
    while True:
        reader = find_reader(twin, bound, widths, {width: count}, readers)
        if reader is None or reader in readers:
            return readers, labels
        readers.append(reader)
        labels = label_units(twin, bound, readers, width, count)
        told_apart = [bool((units >= 0).all()) for units in labels.values() if bool((units >= 0).any())]
        if all(told_apart):
            return readers, labels


def find_reader(
    twin: Twin, bound: Followers, widths: Widths, spaces: dict[str, int], others: Sequence[Place] = ()
) -> Place | None:
    """The parameter axis whose zeroing silences the most other axes: that is what reads the units.

    An axis that a product sums over beats all others: a gate silences a neuron too, but does not read it.

    Args:
        others: readers that are known already; then, as for channels, only what silences a matrix counts.
    """
    latent = twin.architecture.own_heads and Width.HEADS in spaces
    heads = Width.HEADS in spaces and not latent
    count = next(iter(spaces.values()))
    chunk = widths.head_dim if heads else 1
    # a whole KV group also silences keys and values, but with one group everything would be zero
    group = widths.heads_per_group if heads and widths.num_key_value_heads > 1 else 1
    known = [template_place(place) for place in others]
    with _zeroed(twin, bound, known, lambda _: range(group * chunk)):
        baseline = _dead(twin, bound)
    shapes = shapes_of(twin.architecture.config).disk
    matrices = {(split_name(name)[0], axis): len(shapes[name]) > 1 for name, axis in bound.disk}
    best, best_score = None, 99 if others or "hidden_size" in spaces else 0
    summed, seen = summed_axes(twin), set(known)
    for (name, axis), size in sorted(bound.memory.items(), key=lambda item: template_place(item[0]) not in summed):
        template = split_name(name)[0]
        fits = size == count * chunk if heads else size % count == 0
        fits &= all(bound.memory[other] == size for other in others)
        if not fits or twin.model.get_parameter(name).ndim < 2 or (template, axis) in seen:
            continue
        if best is not None and (template, axis) not in summed:
            break
        seen.add((template, axis))
        readers = [*known, (template, axis)]
        with _zeroed(twin, bound, readers, lambda own: range(own // count if latent else group * chunk)):
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


def label_units(
    twin: Twin, bound: Followers, readers: Sequence[Place], width: str, count: int
) -> dict[Place, torch.Tensor]:
    """The unit of `width` at each index of each bound axis, -1 where no single unit is responsible."""
    places = [template_place(reader) for reader in readers]

    def units(size: int) -> torch.Tensor:
        return torch.arange(size) // (size // count) if width in HEAD_COUNTS else torch.arange(size) % count

    def indices(bit: int, value: int) -> Callable[[int], torch.Tensor]:
        return lambda size: ((units(size) >> bit) & 1 == value).nonzero().flatten()

    labels = {place: torch.zeros(size, dtype=torch.long) for place, size in bound.disk.items()}
    valid = {place: torch.ones(size, dtype=torch.bool) for place, size in bound.disk.items()}
    for bit in range(max(1, (count - 1).bit_length())):
        with _zeroed(twin, bound, places, indices(bit, 1)):
            if_one = _dead(twin, bound)
        with _zeroed(twin, bound, places, indices(bit, 0)):
            if_zero = _dead(twin, bound)
        for axis in bound.disk:
            valid[axis] &= if_one[axis] ^ if_zero[axis]
            labels[axis] |= if_one[axis].long() << bit
    result = {axis: torch.where(valid[axis], labels[axis], -1) for axis in bound.disk}
    for place in places:
        result.update(reader_on_disk(twin, bound, place, units))
    return result


def reader_on_disk(
    twin: Twin, bound: Followers, reader: Place, units: Callable[[int], torch.Tensor]
) -> dict[Place, torch.Tensor]:
    """Where the reader's own axis lies on disk: write its unit numbers into it and see where they come out.

    Args:
        units: at each index of an axis of a size, which may differ from layer to layer.
    """
    template, axis = reader
    marked = {}
    for name, parameter in twin.model.named_parameters():
        mark = torch.zeros_like(parameter)
        if split_name(name)[0] == template and (name, axis) in bound.memory:
            shape = [1] * parameter.ndim
            shape[axis] = -1
            mark += (units(parameter.shape[axis]) + 1).reshape(shape)
        marked[name] = mark.detach()
    result = {}
    stored = on_disk(twin.model, marked)
    for name, disk_axis in bound.disk:
        moved = stored[name].movedim(disk_axis, 0).reshape(stored[name].shape[disk_axis], -1)
        if (moved > 0).all() and (moved == moved[:, :1]).all():
            result[name, disk_axis] = moved[:, 0].long() - 1
    return result


def summed_axes(twin: Twin) -> set[Place]:
    """The axes of parameter templates that products sum over."""
    found: set[Place] = set()
    with Products(twin.model.named_parameters(), lambda seen: found.add((split_name(seen.parameter)[0], seen.axis))):
        run_twin(twin)
    return found


@contextmanager
def _zeroed(
    twin: Twin, bound: Followers, readers: Sequence[Place], indices: Callable[[int], Iterable[Any]]
) -> Iterator[None]:
    """Zero slices of some parameter templates' axes in every layer where these are bound, for the time being.

    Args:
        indices: to zero of an axis of a size.
    """
    named = [
        (name, parameter, dict(readers).get(split_name(name)[0])) for name, parameter in twin.model.named_parameters()
    ]
    zeroed = [(own, axis) for name, own, axis in named if axis is not None and (name, axis) in bound.memory]
    saved = [parameter.detach().clone() for parameter, _ in zeroed]
    with torch.no_grad():
        for parameter, axis in zeroed:
            index = torch.as_tensor(list(indices(parameter.shape[axis])), dtype=torch.long)
            parameter.index_fill_(axis, index, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), before in zip(zeroed, saved, strict=True):
                parameter.copy_(before)


def _dead(twin: Twin, bound: Followers) -> dict[Place, torch.Tensor]:
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


def idle_templates(twin: Twin) -> frozenset[str]:
    """The tensors on disk that take no part in what the model makes of its tokens, such as attention to an encoder."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in twin.model.named_modules()
    ]
    twin.model.zero_grad()
    twin.model(input_ids=twin.tokens, use_cache=False).logits.sum().backward()
    for hook in hooks:
        hook.remove()
    acts = {
        name: torch.full_like(own, float(own.grad is not None or name.rpartition(".")[0] in called)).detach()
        for name, own in twin.model.named_parameters()
    }
    stored = on_disk(twin.model, acts).items()
    acting = {split_name(name)[0] for name, act in stored if bool(act.any())}
    return frozenset(split_name(name)[0] for name, _ in stored) - acting


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
