"""Which uniform widths a target size is best spent on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from llmprune_cli.architecture import NEURONS
from llmprune_cli.checkpoint import DTYPE_BYTES
from llmprune_cli.errors import PlanError
from llmprune_cli.names import split_name
from llmprune_cli.plan import Target, WidthRequest, predicted_tensors, resolve
from llmprune_cli.subject import Subject

ROUND_TO = 64  # neurons that stay, at most: what kernels like
DEPTHS = (0.0, 0.07, 0.14, 0.21, 0.3, 0.4, 0.5)  # shares of the layers whose removal is considered
LEAST_NEURONS = Fraction(1, 5)  # a smaller share of an MLP is not considered
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Budget:
    """The size that a model must not exceed."""

    amount: float
    kind: str  # "parameters", "bytes" or "share" of the parameters

    def limit(self, parameters: int, size_bytes: int) -> float:
        """The limit as a number of parameters, or of bytes, for a model of this size."""
        return self.amount * parameters if self.kind == "share" else self.amount


def parse_parameters(text: str) -> Budget:
    """`6B`, `350M`, `1500000` or `80%`.

    Raises:
        ValueError: none of these, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMBT%]?)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is not a number of parameters such as 6B, 350M or 80%.")
    amount, unit = float(found[1]), found[2].upper()
    if unit != "%":
        return Budget(amount * UNITS.get(unit, 1), "parameters")
    if amount > 100:
        raise ValueError(f"{text!r} is more than the whole model.")
    return Budget(amount / 100, "share")


@dataclass(frozen=True)
class Candidate:
    """Widths that fit a budget, and how well they do."""

    target: Target
    parameters: int
    kl: float | None = None  # on held-out text, after a short calibration


def measure_size(subject: Subject, target: Target) -> tuple[int, int]:
    """Parameters and bytes after pruning."""
    dtypes = {split_name(entry.name)[0]: DTYPE_BYTES[entry.dtype] for entry in subject.checkpoint.entries}
    shapes = {entry.name: entry.shape for entry in subject.checkpoint.entries}
    parameters = size = 0
    for name, shape in predicted_tensors(shapes, subject.trace, subject.widths, target).items():
        count = math.prod(shape)
        parameters += count
        size += count * dtypes[split_name(name)[0]]
    return parameters, size


def find_candidates(subject: Subject, budget: Budget, layer_scores: tuple[float, ...]) -> list[Candidate]:
    """For several numbers of layers and of KV groups, the widest MLP that fits the budget.

    The layers that turn the residual stream least go first. The hidden size stays.

    Args:
        layer_scores: of each layer; those with the least go first.

    Raises:
        PlanError: nothing fits.
    """
    before = subject.widths
    whole = Target(before, tuple(range(before.num_hidden_layers)), ())
    limit = budget.limit(*measure_size(subject, whole))
    index = 1 if budget.kind == "bytes" else 0
    order = sorted(range(len(layer_scores)), key=layer_scores.__getitem__)
    dropped_counts = sorted({round(share * before.num_hidden_layers) for share in DEPTHS})
    found: dict[tuple[object, ...], Candidate] = {}

    def size_of(request: WidthRequest) -> tuple[Target, float]:
        target = resolve(subject.architecture, subject.trace.refused, request)
        return target, measure_size(subject, target)[index]

    for groups in _group_counts(subject):
        for count in dropped_counts:
            if count >= before.num_hidden_layers:
                continue
            base = WidthRequest(num_key_value_heads=groups, drop_layers=tuple(sorted(order[:count])) if count else None)
            try:
                target = _widest(size_of, base, subject, limit)
            except PlanError:
                continue  # a number of layers or groups that this family cannot have
            if target is not None:
                parameters = measure_size(subject, target)[0]
                found[target.widths, target.layers] = Candidate(target, parameters)
    if not found:
        least = measure_size(subject, least_target(subject))[index]
        raise PlanError(
            f"No uniform widths leave at most {limit:,.0f} {'bytes' if index else 'parameters'}; the least that the "
            f"search reaches is {least:,.0f}. Ask for more, or give the widths yourself."
        )
    return list(found.values())


def choose_candidate(candidates: list[Candidate], judge: Callable[[Target], float]) -> tuple[Candidate, ...]:
    """Judge candidates, best first: all KV groups and ever fewer layers until that gets worse twice; then fewer groups.

    Args:
        judge: gives the divergence from the dense model, see `Candidate`.

    Returns:
        Those that were judged.
    """
    most = max(candidate.target.widths.num_key_value_heads for candidate in candidates)
    deepest_first = sorted(candidates, key=lambda c: -len(c.target.layers))
    whole = [candidate for candidate in deepest_first if candidate.target.widths.num_key_value_heads == most]
    fewer = [candidate for candidate in deepest_first if candidate.target.widths.num_key_value_heads != most]
    judged: list[Candidate] = []
    worse = 0
    for candidate in whole:
        best = min((other.kl for other in judged if other.kl is not None), default=float("inf"))
        judged.append(replace(candidate, kl=judge(candidate.target)))
        worse = worse + 1 if (judged[-1].kl or 0.0) > best else 0
        if worse == 2:
            break
    depth = len(min(judged, key=lambda c: c.kl or 0.0).target.layers)
    alike = [candidate for candidate in fewer if len(candidate.target.layers) == depth]
    judged += [replace(candidate, kl=judge(candidate.target)) for candidate in alike]
    return tuple(sorted(judged, key=lambda c: c.kl or 0.0))


def _group_counts(subject: Subject) -> list[int | None]:
    """Numbers of KV groups to consider: all, and one or a quarter fewer."""
    whole = subject.widths.num_key_value_heads
    if whole == 1 or "num_key_value_heads" in subject.trace.refused or subject.architecture.hidden_follows_heads:
        return [None]
    return [None, whole - max(1, whole // 4)]


def _widest(
    size_of: Callable[[WidthRequest], tuple[Target, float]],
    base: WidthRequest,
    subject: Subject,
    limit: float,
) -> Target | None:
    """The target with the most neurons that fits, by bisection over multiples; None where none does."""
    before = subject.widths
    target, size = size_of(base) if base != WidthRequest() else (None, float("inf"))
    if target is not None and size <= limit:
        return target
    largest = max(getattr(before, width) for width in NEURONS)
    if not _neurons(subject, Fraction(1)):
        return None
    step = _step(largest)
    best, low, high = None, max(1, int(LEAST_NEURONS * largest) // step), largest // step
    while low <= high:
        middle = (low + high) // 2
        target, size = size_of(replace(base, **_neurons(subject, Fraction(middle * step, largest))))
        if size <= limit:
            best, low = target, middle + 1
        else:
            high = middle - 1
    return best


def _step(largest: int) -> int:
    """What numbers of neurons are a multiple of: 64, in an MLP of less than 4096 a power of two near its 64th part."""
    return int(max(1, min(ROUND_TO, 2 ** ((largest // 64).bit_length() - 1 if largest >= 64 else 0))))


def _neurons(subject: Subject, share: Fraction) -> dict[str, Any]:
    """Sizes that leave this share of every kind of neuron, rounded down to what kernels like."""
    found = {}
    for width in NEURONS:
        whole = getattr(subject.widths, width)
        if whole and width not in subject.trace.refused:
            step = max(_step(whole), subject.architecture.step_of(width))
            found[width] = max(step, int(whole * share) // step * step)
    return found


def least_target(subject: Subject) -> Target:
    """The least that the search reaches in every width at once: what has to be proven before it starts."""
    before = subject.widths
    request = WidthRequest(
        num_key_value_heads=_group_counts(subject)[-1],
        num_hidden_layers=before.num_hidden_layers - round(DEPTHS[-1] * before.num_hidden_layers),
        **_neurons(subject, LEAST_NEURONS),
    )
    try:
        return resolve(subject.architecture, subject.trace.refused, request)
    except PlanError:  # layers that cannot be dropped so
        return resolve(subject.architecture, subject.trace.refused, replace(request, num_hidden_layers=None))
