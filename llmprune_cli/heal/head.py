"""The output projection of a model that is trained, whose weights are cast once for many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from llmprune_cli.run.layer import running_as

WAITING_ELEMENTS = 2**24  # of gradients of logits that wait to become one of the weights: 32 MiB in bfloat16
ROWS = 4096  # of that gradient that are formed together


@dataclass
class Head:
    """An output projection whose weights stand still for a while.

    Automatic differentiation would cast the weights for every few tokens, and form a gradient of their size for each.
    """

    module: nn.Linear
    weight: torch.Tensor  # in the dtype of the product, [V, D]
    bias: torch.Tensor | None  # [V]
    _made: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def run(self, given: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] to logits [..., V], which are noted where they have a gradient."""
        given = given.to(self.weight.dtype)
        logits = functional.linear(given, self.weight, self.bias)
        if logits.requires_grad:
            self._made.append((given, logits))
        return logits

    def taken(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What it was given, and what it made of it, since this was asked last."""
        made, self._made = self._made, []
        return made


@contextmanager
def cast_once(module: nn.Module | None, compute: torch.dtype) -> Iterator[Head | None]:
    """While active, an output projection multiplies with weights that were cast once, and notes what it makes.

    Args:
        compute: dtype of products.

    Yields:
        None where the projection is no plain one; then it runs as ever.
    """
    if type(module) is not nn.Linear:
        yield None
        return
    bias = None if module.bias is None else module.bias.detach().to(compute)
    head = Head(module, module.weight.detach().to(compute), bias)
    with running_as(module, head.run):
        yield head


class Gradients:
    """The gradients of a head's weights, of one part of the tokens after the other."""

    def __init__(self, weights: Sequence[torch.Tensor], head: Head | None) -> None:
        """Of those of its weights that are trained.

        Args:
            head: a plain projection, whose weights need no gradient from automatic differentiation.
        """
        self._weights, self._head = weights, head
        self._sums: dict[int, torch.Tensor] = {}
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def wanted(self) -> list[torch.Tensor]:
        """What the loss of a part that was just formed is to be differentiated by."""
        if self._head is None:
            return list(self._weights)
        made = self._head.taken()
        self._made = made if self._weights else []
        return [logits for _, logits in self._made]

    def add(self, found: Sequence[torch.Tensor | None]) -> None:
        """Take in the gradients by what was wanted; None where the loss does not depend on it."""
        if self._head is None:
            for place, more in enumerate(found):
                self._add_to(place, more)
            return
        for (given, _), gradient in zip(self._made, found, strict=True):
            if gradient is not None:
                self._waiting.append((given.detach().flatten(0, -2), gradient.flatten(0, -2)))
        self._made = []
        if sum(gradient.numel() for _, gradient in self._waiting) >= WAITING_ELEMENTS:
            self._form()

    def finished(self) -> list[torch.Tensor | None]:
        """The gradient of each weight; None where the loss does not depend on it."""
        self._form()
        return [self._sums.get(place) for place in range(len(self._weights))]

    def _form(self) -> None:
        if self._head is None or not self._waiting:
            return
        given, gradients = (torch.cat(own) for own in zip(*self._waiting, strict=True))
        self._waiting = []
        for place, weight in enumerate(self._weights):
            total = self._sums.setdefault(place, torch.zeros_like(weight))
            if weight is self._head.module.bias:
                total += gradients.sum(0, dtype=total.dtype)
                continue
            for own, part in zip(total.split(ROWS), gradients.split(ROWS, dim=1), strict=True):
                own += part.T @ given

    def _add_to(self, place: int, more: torch.Tensor | None) -> None:
        if more is not None:
            self._sums[place] = self._sums[place].add_(more) if place in self._sums else more
