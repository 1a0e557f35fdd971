"""Which units each tensor axis is made of, independent of the model's sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import FailFast
from pydantic_core import core_schema

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.widths import HEAD_COUNTS, Width, Widths
from llmprune_cli.folder.tensors import Shape, split_name

GLOBAL_WIDTHS = (Width.HIDDEN, Width.LAYERS)  # one choice for the whole model; all else is chosen per layer


@dataclass(frozen=True)
class Instance:
    """One of the places that choose among the units of a width for themselves; in documents text, such as `3.7#1`."""

    layer: int | None = None  # None where one choice holds for the whole model
    within: tuple[int, ...] = ()  # numbers that follow the layer's in names of tensors, such as that of an expert
    component: int = 0  # see `Binding`

    def __str__(self) -> str:
        numbers = () if self.layer is None else (self.layer, *self.within)
        return ".".join(map(str, numbers)) + (f"#{self.component}" if self.component else "")

    @classmethod
    def parse(cls, text: str) -> Instance:
        """The instance that `str` writes so.

        Raises:
            ValueError: it writes none so.
        """
        if re.fullmatch(r"([0-9]+(\.[0-9]+)*)?(#[0-9]+)?", text):
            numbers, _, component = text.partition("#")
            layer, *within = map(int, numbers.split(".")) if numbers else (None,)
            found = cls(layer, tuple(within), int(component or 0))
            if str(found) == text:
                return found
        raise ValueError(f"{text!r} names no place that chooses units, such as '3' for layer 3 or '' for the model")

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> core_schema.CoreSchema:
        text = core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema())
        own = core_schema.is_instance_schema(cls)
        return core_schema.json_or_python_schema(text, own, serialization=core_schema.to_string_ser_schema())


Numbers = Annotated[tuple[int, ...], FailFast()]  # of a long list, the first element that is wrong is enough
Keep = dict[str, dict[Instance, Numbers]]  # width → instance → sorted indices of the units that stay


@dataclass(frozen=True)
class Binding:
    """One axis of one tensor template, made of the units of one width.

    The units along the axis are `blocks`, in order. Channels and neurons: each block is one run of all units
    (`stride` 1) or every unit repeated (`interleaved`). Heads: each block is one head of P elements, named by its
    number, or -1 where the elements belong to another width (the keys and values of a fused projection).
    """

    template: str  # tensor name with {} for numbers
    axis: int
    width: str  # a field of Widths
    copies: int = 1  # times that every unit occurs along the axis; 0 where that differs from layer to layer
    interleaved: bool = False
    heads: tuple[int, ...] = ()
    component: int = 0  # which of several MLPs in a layer share the width; of the hidden size, 0 is the residual stream

    @property
    def is_global(self) -> bool:
        """Whether one choice of units holds for the whole model."""
        return self.width in GLOBAL_WIDTHS and not self.component

    def units(self, widths: Widths, size: int) -> torch.Tensor:
        """The unit at each index of the axis, -1 where this width has no say; shape [axis size].

        Args:
            size: of the axis, as far as a layer has units of its own size.
        """
        if self.heads:
            return torch.tensor(self.heads).repeat_interleave(widths.head_dim)
        units = torch.arange(getattr(widths, self.width))
        copies = self.copies or size // len(units)
        return units.repeat_interleave(copies) if self.interleaved else units.repeat(copies)

    def elements(self, widths: Widths, size: int) -> torch.Tensor:
        """The element of its unit that each index holds, counting repeats of the unit; shape [axis size].

        A gate|up projection holds element 0 of every neuron in its first half and element 1 in its second; a query
        projection holds elements 0 … P-1 of every head.
        """
        units = self.units(widths, size)
        order = torch.argsort(units, stable=True)
        ordered = units[order]
        starts = torch.searchsorted(ordered, ordered)
        result = torch.empty_like(units)
        result[order] = torch.arange(len(units)) - starts
        return result


@dataclass(frozen=True)
class Reader:
    """A weight whose products are all that the rest of the model sees of some units, or one of several such weights.

    Heads lie along its axis one after the other, P elements each; neurons one element each.
    """

    parameter: str  # name in memory, with {} for numbers
    axis: int  # that is summed over
    width: str  # query heads, KV groups or a width of neurons
    component: int = 0  # see `Binding`


@dataclass(frozen=True)
class Trace:
    """What the twin says about an architecture."""

    bindings: tuple[Binding, ...]
    inputs: tuple[Reader, ...]  # the weights that can make up for units that go
    readers: tuple[Binding, ...]  # the axes on disk whose zeros silence heads and neurons: of `inputs` and `joint`
    scored: frozenset[str]  # templates whose weights count in the importance of a unit
    expert_templates: frozenset[str]  # templates whose second number is that of an expert
    routers: frozenset[str]  # weights that score the experts: names in memory, with {} for numbers
    refused: dict[str, str]  # width → why it cannot be pruned
    joint: tuple[Reader, ...] = ()  # the weights that read heads and neurons, but cannot make up for any that go

    def of(self, width: str) -> tuple[Binding, ...]:
        """The bindings of one width."""
        return tuple(binding for binding in self.bindings if binding.width == width)

    def on(self, template: str) -> tuple[Binding, ...]:
        """The bindings of one tensor template."""
        return self._by_template.get(template, ())

    @cached_property
    def _by_template(self) -> dict[str, tuple[Binding, ...]]:
        return {template: tuple(b for b in self.bindings if b.template == template) for template in self._templates}

    @cached_property
    def _templates(self) -> frozenset[str]:
        return frozenset(binding.template for binding in self.bindings)

    def limited_to(self, widths: tuple[str, ...]) -> Trace:
        """The same trace with the bindings of some widths only."""
        return replace(
            self,
            bindings=tuple(binding for binding in self.bindings if binding.width in widths),
            expert_templates=self.expert_templates if Width.EXPERTS in widths else frozenset(),
        )

    def fitting(self, shapes: dict[str, Shape], widths: Widths) -> Trace:
        """The same trace, which refuses the widths that a real checkpoint's shapes follow by other rules."""
        try:
            self.check(shapes, widths)
        except UnsupportedError:
            pass
        else:
            return self
        refused: dict[str, str] = {}
        for width in sorted({str(binding.width) for binding in self.bindings}):
            try:
                self.limited_to((width,)).check(shapes, widths)
            except UnsupportedError as error:
                together = HEAD_COUNTS if width in HEAD_COUNTS else (width,)
                refused |= dict.fromkeys(map(str, together), str(error).removesuffix("."))
        others = tuple({binding.width for binding in self.bindings} - refused.keys())
        return replace(self.limited_to(others), refused={**self.refused, **refused})

    def check(self, shapes: dict[str, Shape], widths: Widths) -> None:
        """Hold the bindings against a real checkpoint's shapes.

        Raises:
            UnsupportedError: an axis has another size than its units say.
        """
        sizes: dict[tuple[Binding, int], int] = {}
        for name, shape in shapes.items():
            for binding in self.on(split_name(name)[0]):
                size = shape[binding.axis] if binding.axis < len(shape) else 0
                key = binding, 0 if binding.copies else size
                made = sizes[key] if key in sizes else sizes.setdefault(key, len(binding.units(widths, size)))
                if size != made:
                    raise UnsupportedError(
                        f"{name}: axis {binding.axis} has {size or 'no'} elements where its units "
                        f"({binding.width}) make {made}. This layout is not supported."
                    )


def instance_of(binding: Binding, numbers: tuple[int, ...]) -> Instance:
    """Which choice of units a tensor with these numbers in its name follows: the model's, its layer's, its expert's."""
    if binding.is_global:
        return Instance()
    layer = numbers[0] if numbers else None
    return Instance(layer, () if binding.width == Width.EXPERTS else numbers[1:], binding.component)


def reader_instance(trace: Trace, reader: Reader, number: int, expert: int | None) -> Instance:
    """Which choice of units a reader follows, see `instance_of`; experts stacked on disk share one."""
    if reader.width == Width.HEADS:
        return Instance(number)
    same = (b for b in trace.readers if b.width == reader.width and b.component == reader.component)
    binding = next(same)
    numbers = (number,) if expert is None else (number, expert)
    return instance_of(binding, numbers[: binding.template.count("{}")])


def kept_mask(
    trace: Trace, template: str, place: tuple[int, int], numbers: tuple[int, ...], keep: Keep, before: Widths
) -> torch.Tensor:
    """Which indices of an axis stay in the tensor with this template and these numbers; bool [axis size].

    Args:
        place: the axis, and its size.
    """
    axis, size = place
    bindings = [binding for binding in trace.on(template) if binding.axis == axis]
    mask = torch.ones(size, dtype=torch.bool)
    for binding in bindings:
        chosen = keep.get(binding.width, {}).get(instance_of(binding, numbers))
        if chosen is not None:
            lookup = torch.zeros(getattr(before, binding.width) + 1, dtype=torch.bool)
            lookup[torch.tensor(chosen, dtype=torch.long)] = True
            lookup[-1] = True  # units of -1: this width has no say
            mask &= lookup[binding.units(before, size)]
    return mask


def renumbered(kept: Iterable[int]) -> dict[int, int]:
    """Old number → new number, of what stays."""
    return {old: new for new, old in enumerate(kept)}


def new_name(
    name: str, trace: Trace, layers: dict[int, int], experts: dict[Instance, dict[int, int]] | None
) -> str | None:
    """A tensor's name once the remaining layers and experts are numbered anew; None for one that goes.

    Args:
        layers: old number → new number of the layers that stay.
        experts: the same for the experts of each layer; None keeps all.
    """
    template, numbers = split_name(name)
    if not numbers:
        return name
    if numbers[0] not in layers:
        return None
    new = [layers[numbers[0]], *numbers[1:]]
    if experts is not None and template in trace.expert_templates:
        chosen = experts[Instance(numbers[0])]
        if numbers[1] not in chosen:
            return None
        new[1] = chosen[numbers[1]]
    return template.format(*new)
