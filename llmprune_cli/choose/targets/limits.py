"""What the widths of a target must not exceed, and what they can reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import PlanError, UnsupportedError
from llmprune_cli.folder.tensors import DTYPES, split_name
from llmprune_cli.plan.predict import predicted_tensors
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.sizes import Budget, size_text

HALF_BYTES = 2  # of a number in llama.cpp's KV cache

Weigh = Callable[[Target], int]  # bytes of the weights in another type than they are stored in


class Limit(Protocol):
    """What is asked of a target; `str` says it in words that follow "leave"."""

    @property
    def less(self) -> str:
        """What to ask for where nothing meets it."""

    @property
    def share(self) -> float:
        """How large a part of the whole model it leaves, of its size or of its time."""

    @property
    def spared(self) -> tuple[int, int]:
        """Parameters and bytes of tokens that go as well, so that nothing else has to go for them."""

    def fits(self, target: Target) -> bool:
        """Whether it is met."""

    def sparing(self, spared: tuple[int, int]) -> Self:
        """The same where tokens go, see `spared`."""

    def check(self, least: Target, remedy: str) -> None:
        """Refuse what leaves the model as it is, or cannot be reached.

        Args:
            least: what the search reaches.
            remedy: what else to do where that is not enough.

        Raises:
            PlanError: see above.
        """


def whole_target(subject: Subject) -> Target:
    """The model as it is."""
    return Target(subject.widths, tuple(range(subject.widths.num_hidden_layers)), ())


def measure_size(subject: Subject, target: Target) -> tuple[int, int]:
    """Parameters and bytes after pruning."""
    dtypes = {split_name(entry.name)[0]: DTYPES[entry.dtype].size_bytes for entry in subject.checkpoint.entries}
    shapes = {entry.name: entry.shape for entry in subject.checkpoint.entries}
    parameters = sum(entry.numel for entry in subject.surroundings)
    size = sum(entry.size_bytes for entry in subject.surroundings)
    for name, shape in predicted_tensors(shapes, subject.trace, subject.widths, target).items():
        count = math.prod(shape)
        parameters += count
        size += count * dtypes[split_name(name)[0]]
    return parameters, size


@dataclass(frozen=True)
class SizeLimit:
    """The size that a model must not exceed."""

    most: float
    of: Callable[[Target], float]
    unit: str
    whole: Target
    spared: tuple[int, int] = (0, 0)  # see `Limit`
    less = "more"

    def __str__(self) -> str:
        return f"at most {self._amount(self.most)}"

    @property
    def share(self) -> float:
        """See `Limit`."""
        return self.most / self.of(self.whole)

    def fits(self, target: Target) -> bool:
        """See `Limit`."""
        return self.left_of(target) <= self.most

    def left_of(self, target: Target) -> float:
        """The size without the tokens that go."""
        return self.of(target) - self._of_both(self.spared)

    def share_of(self, weight: tuple[int, int]) -> float:
        """What part of some parameters and bytes would have to go for the limit alone."""
        return (self.of(self.whole) - self.most) / self._of_both(weight)

    def sparing(self, spared: tuple[int, int]) -> SizeLimit:
        """See `Limit`."""
        return replace(self, spared=spared)

    def check(self, least: Target, remedy: str) -> None:
        """See `Limit`."""
        reached, whole = self.left_of(least), self.of(self.whole)
        percent = f" ({math.ceil(1000 * reached / whole) / 10:g}%)" if self.unit == "parameters" else ""
        reachable = f"Ask for {self._amount(reached)}{percent} up to less than {self._amount(whole)}"
        if self.most >= whole:
            raise PlanError(
                f"The model has {self._amount(whole)}, so a target of {self._amount(self.most)} removes nothing. "
                f"{reachable}."
            )
        if self.most < reached:
            raise PlanError(
                f"No uniform widths leave {self}; the least that the search reaches is {self._amount(reached)}. "
                f"{reachable}, or {remedy}."
            )

    def _of_both(self, weight: tuple[int, int]) -> int:
        return weight[0 if self.unit == "parameters" else 1]

    def _amount(self, amount: float) -> str:
        return f"{amount:,.0f} {self.unit.replace('bytes', f'bytes ({size_text(amount)})')}"


def size_limit(subject: Subject, budget: Budget, weigh: Weigh | None = None) -> SizeLimit:
    """The limit that a number of parameters or bytes sets; bytes may count the cache of keys and values, too.

    Args:
        weigh: bytes in the type that the budget counts in; None counts them as stored.

    Raises:
        UnsupportedError: it counts a cache, and what that holds is not known.
    """
    whole = whole_target(subject)
    limit = budget.limit(*measure_size(subject, whole))
    if budget.kind != "bytes":
        return SizeLimit(limit, lambda target: measure_size(subject, target)[0], "parameters", whole)
    if budget.context is not None and subject.architecture.cached is None:
        raise UnsupportedError(
            f"What {subject.architecture.config.model_type} keeps of a token in its KV cache is not known here, so a "
            "target cannot count it. Leave --context out, and ask for that much less."
        )
    widest = max(subject.checkpoint.entries, key=lambda entry: entry.numel)
    number = HALF_BYTES if budget.dtype is not None else widest.size_bytes // widest.numel

    def size_bytes(target: Target) -> float:
        once = budget.dtype is not None  # as llama.cpp keeps a KV head
        of_token = subject.architecture.cached_numbers(target.widths, target.layers, once) or 0
        weights = weigh(target) if weigh is not None else measure_size(subject, target)[1]
        return weights + of_token * number * (budget.context or 0)

    return SizeLimit(limit, size_bytes, f"bytes{budget.counted}", whole)
