"""The output projection of a model that is trained, whose weights are cast once for many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llmprune_cli.run.layer import running_as

WAITING_ELEMENTS = 2**24  # of gradients of logits, beyond which they become one of the weights
ROWS = 4096  # of that gradient that are formed together


class _Projection(torch.autograd.Function):
    """A product with weights that stand still; its gradient by the result is noted."""

    @staticmethod
    def forward(context: Any, given: torch.Tensor, head: Head) -> torch.Tensor:
        context.head = head
        context.save_for_backward(given)
        return functional.linear(given, head.weight, head.bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        (given,) = context.saved_tensors
        if context.head.is_learned:
            context.head.waiting.append((given.flatten(0, -2), gradient.flatten(0, -2)))
        return gradient @ context.head.weight, None


@dataclass
class Head:
    """An output projection whose weights stand still for a while.

    Automatic differentiation would cast the weights for every few tokens, and form a gradient of their size for each.
    """

    module: nn.Linear
    weight: torch.Tensor  # in the dtype of the product, [V, D]
    bias: torch.Tensor | None  # [V]
    is_learned: bool
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # hidden states, gradients of logits

    def run(self, given: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] to logits [..., V]."""
        logits: torch.Tensor = _Projection.apply(given.to(self.weight.dtype), self)  # type: ignore[no-untyped-call]
        return logits


@contextmanager
def cast_once(module: nn.Module | None, compute: torch.dtype) -> Iterator[Head | None]:
    """While active, an output projection multiplies with weights that were cast once.

    Args:
        compute: dtype of products.

    Yields:
        None where the projection is no plain one; then it runs as ever.
    """
    if type(module) is not nn.Linear:
        yield None
        return
    bias = None if module.bias is None else module.bias.detach().to(compute)
    is_learned = any(own.requires_grad for own in module.parameters())
    head = Head(module, module.weight.detach().to(compute), bias, is_learned)
    with running_as(module, head.run):
        yield head


class Gradients:
    """The gradients of a head's weights, of one part of the tokens after the other."""

    def __init__(self, weights: Sequence[torch.Tensor], head: Head | None) -> None:
        """Of those of its weights that are trained.

        Args:
            head: a plain projection, which notes what automatic differentiation does not see.
        """
        self._weights, self._head = weights, head
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, found: Sequence[torch.Tensor | None]) -> None:
        """Take in a part: what automatic differentiation has for each weight, and what the head has noted of it."""
        for place, more in enumerate(found):
            if more is not None:
                self._sums[place] = self._sums[place].add_(more) if place in self._sums else more
        if self._head is not None and sum(own.numel() for _, own in self._head.waiting) >= WAITING_ELEMENTS:
            self._form()

    def finished(self) -> list[torch.Tensor | None]:
        """The gradient of each weight; None where the loss does not depend on it."""
        self._form()
        return [self._sums.get(place) for place in range(len(self._weights))]

    def _form(self) -> None:
        if self._head is None or not self._head.waiting:
            return
        given, gradients = (torch.cat(own) for own in zip(*self._head.waiting, strict=True))
        self._head.waiting.clear()
        for place, weight in enumerate(self._weights):
            if place not in self._sums:
                self._sums[place] = torch.zeros_like(weight)
            total = self._sums[place]
            if weight is self._head.module.bias:
                total += gradients.sum(0, dtype=total.dtype)
                continue
            for own, part in zip(total.split(ROWS), gradients.split(ROWS, dim=1), strict=True):
                own += part.T @ given
