"""Which uniform widths a target size is best spent on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import PlanError
from llmprune_cli.family.widths import NEURONS
from llmprune_cli.folder.tensors import DTYPES, split_name
from llmprune_cli.options import WidthRequest
from llmprune_cli.plan.legal import legal_experts
from llmprune_cli.plan.predict import predicted_tensors
from llmprune_cli.plan.requested_widths import Target, protected_layers, resolve
from llmprune_cli.sizes import Budget

ROUND_TO = 64  # neurons that stay, at most: what kernels like
DEPTHS = (0.0, 0.07, 0.14, 0.21, 0.3, 0.4, 0.5)  # shares of the layers whose removal is considered
EXPERT_SHARES = (0.875, 0.75, 0.5)  # of the experts that are considered to stay
LEAST_NEURONS = Fraction(3, 20)  # a smaller share of an MLP is not considered


@dataclass(frozen=True)
class Candidate:
    """Widths that fit a budget, and how well they do."""

    target: Target
    parameters: int
    kl: float  # on held-out text, after a short calibration


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


def share_of(subject: Subject, budget: Budget) -> float:
    """How large a part of the model a budget is, of its parameters or of its bytes."""
    whole = measure_size(subject, Target(subject.widths, tuple(range(subject.widths.num_hidden_layers)), ()))
    return budget.limit(*whole) / whole[1 if budget.kind == "bytes" else 0]


def check_budget(
    subject: Subject, budget: Budget, keep_layers: tuple[int, ...] = (), spared: tuple[int, int] = (0, 0)
) -> None:
    """Refuse a size that leaves the model as it is, or that the search cannot reach, before anything is measured.

    Args:
        keep_layers: see `WidthRequest`.
        spared: see `search_widths`.

    Raises:
        PlanError: see above.
    """
    whole = Target(subject.widths, tuple(range(subject.widths.num_hidden_layers)), ())
    of_whole, index = measure_size(subject, whole), 1 if budget.kind == "bytes" else 0
    parameters, size_bytes = measure_size(subject, least_target(subject, keep_layers))
    least = parameters - spared[0], size_bytes - spared[1]
    limit = budget.limit(*of_whole)
    if limit >= of_whole[index]:
        raise PlanError(
            f"The model has {_amount(of_whole, index)}, so a target of {_amount((limit, limit), index)} removes "
            f"nothing. {_reachable(of_whole, least, index)}"
        )
    if limit < least[index]:
        remedy = "protect fewer layers" if keep_layers else "give the widths yourself"
        raise PlanError(
            f"No uniform widths leave at most {_amount((limit, limit), index)}; the least that the search reaches is "
            f"{_amount(least, index)}. {_reachable(of_whole, least, index)[:-1]}, or {remedy}."
        )


def _reachable(whole: tuple[int, int], least: tuple[int, int], index: int) -> str:
    """What may be asked for, in words."""
    share = math.ceil(1000 * least[0] / whole[0]) / 10
    percent = f" ({share:g}% of the parameters)" if index == 0 else ""
    return f"Ask for {least[index]:,}{percent} up to less than {whole[index]:,}."


def _amount(sizes: tuple[float, float], index: int) -> str:
    return f"{sizes[index]:,.0f} {'bytes' if index else 'parameters'}"


Judge = Callable[[Target], float]  # gives the divergence from the dense model, see `Candidate`
Steps = Callable[[Subject, WidthRequest, tuple[float, ...]], Iterator[WidthRequest]]


def search_widths(
    subject: Subject,
    budget: Budget,
    layer_scores: tuple[float, ...],
    judge: Judge,
    keep_layers: tuple[int, ...] = (),
    bound: Target | None = None,
    spared: tuple[int, int] = (0, 0),
) -> tuple[Candidate, ...]:
    """The candidates that were judged, best first: each has the widest MLP that fits beside the rest.

    One way to shrink after the other: ever fewer layers, KV groups, query heads, experts, each from the best that was
    found before it, until it gets worse. The hidden size stays. Where layers are protected, all
    widths stay, and as few of the other layers go as the budget allows.

    Args:
        layer_scores: of each layer; those with the least go first.
        keep_layers: see `WidthRequest`.
        bound: what a smaller budget is best spent on: no more layers, groups, heads or experts go than there.
        spared: parameters and bytes of tokens that go as well, so that nothing else has to go for them.

    Raises:
        PlanError: nothing fits.
    """
    limit, index = _limit(subject, budget, spared)
    judged: dict[tuple[object, ...], Candidate] = {}
    base, best = WidthRequest(keep_layers=keep_layers), float("inf")
    for steps, patience in ((_ever_fewer_layers, 1),) if keep_layers else WAYS:
        origin, worse = base, 0
        for request in steps(subject, origin, layer_scores):
            target = _widest(subject, request, limit, index)
            if target is None:
                base = request if best == float("inf") else base  # not enough on its own: other ways go on from here
                continue
            if (target.widths, target.layers) in judged or (bound is not None and _goes_beyond(target, bound)):
                continue
            is_whole = target.widths == subject.widths
            kl = 0.0 if is_whole else judge(target)
            judged[target.widths, target.layers] = Candidate(target, measure_size(subject, target)[0] - spared[0], kl)
            if is_whole:
                return tuple(judged.values())
            if keep_layers:
                break  # every further layer that goes can only harm
            if kl < best:
                base, best, worse = request, kl, 0
            else:
                worse += 1
            if worse == patience:
                break
    if not judged:
        raise PlanError(
            f"No uniform widths that the search tries leave at most {limit - spared[index]:,.0f} "
            f"{'bytes' if index else 'parameters'}. "
            "Ask for more, or give the widths yourself."
        )
    return tuple(sorted(judged.values(), key=lambda candidate: candidate.kl))


def _limit(subject: Subject, budget: Budget, spared: tuple[int, int]) -> tuple[float, int]:
    """What all but the tokens that go may come to, and which of parameters and bytes that is, by number."""
    whole = Target(subject.widths, tuple(range(subject.widths.num_hidden_layers)), ())
    index = 1 if budget.kind == "bytes" else 0
    return budget.limit(*measure_size(subject, whole)) + spared[index], index


def _goes_beyond(target: Target, bound: Target) -> bool:
    """Whether more layers, KV groups, query heads of a group or experts go than with another target."""
    own, other = target.widths, bound.widths
    return (
        len(target.layers) < len(bound.layers)
        or own.num_key_value_heads < other.num_key_value_heads
        or own.heads_per_group < other.heads_per_group
        or own.num_experts < other.num_experts
    )


def _fewer_layers(subject: Subject, base: WidthRequest, layer_scores: tuple[float, ...]) -> Iterator[WidthRequest]:
    order = sorted(range(len(layer_scores)), key=layer_scores.__getitem__)
    for count in sorted({round(share * len(order)) for share in DEPTHS}):
        if count < len(order):
            yield replace(base, drop_layers=tuple(sorted(order[:count])) if count else None)


def _ever_fewer_layers(subject: Subject, base: WidthRequest, layer_scores: tuple[float, ...]) -> Iterator[WidthRequest]:
    """The whole model, and ever fewer of the layers that are not protected."""
    protected = protected_layers(subject.widths, base)
    order = sorted(set(range(len(layer_scores))) - set(protected), key=layer_scores.__getitem__)
    for count in range(len(order) + 1):
        yield replace(base, drop_layers=tuple(sorted(order[:count])) or None)


def _fewer_groups(subject: Subject, base: WidthRequest, _: tuple[float, ...]) -> Iterator[WidthRequest]:
    for count in _group_counts(subject):
        yield replace(base, num_key_value_heads=count)


def _fewer_heads(subject: Subject, base: WidthRequest, _: tuple[float, ...]) -> Iterator[WidthRequest]:
    before = subject.widths
    for per_group in _head_counts(subject):
        yield replace(base, num_attention_heads=per_group * (base.num_key_value_heads or before.num_key_value_heads))


def _fewer_experts(subject: Subject, base: WidthRequest, _: tuple[float, ...]) -> Iterator[WidthRequest]:
    for count in _expert_counts(subject):
        yield replace(base, num_experts=count)


# How often in a row a way may get worse before the next one is tried.
WAYS: tuple[tuple[Steps, int], ...] = ((_fewer_layers, 2), (_fewer_groups, 1), (_fewer_heads, 1), (_fewer_experts, 1))


def _group_counts(subject: Subject) -> list[int]:
    """Numbers of KV groups to consider: a quarter fewer, and as many again."""
    whole = subject.widths.num_key_value_heads
    if "num_key_value_heads" in subject.trace.refused or subject.architecture.hidden_follows_heads:
        return []
    step = max(1, whole // 4)
    return [count for count in (whole - step, whole - 2 * step) if count >= 1]


def _head_counts(subject: Subject) -> list[int]:
    """Numbers of query heads in a KV group to consider, where these have several."""
    before = subject.widths
    if not before.num_attention_heads or before.heads_per_group == 1:
        return []
    if "num_attention_heads" in subject.trace.refused or subject.architecture.hidden_follows_heads:
        return []
    step = max(1, before.heads_per_group // 4)
    return [count for count in (before.heads_per_group - step, before.heads_per_group - 2 * step) if count >= 1]


def _expert_counts(subject: Subject) -> list[int]:
    """Numbers of experts to consider: an eighth, a quarter and a half fewer, where the router can do with them."""
    whole = subject.widths.num_experts
    if not whole or "num_experts" in subject.trace.refused:
        return []
    legal = legal_experts(subject.architecture)
    below = [max((n for n in legal if n <= share * whole), default=0) for share in EXPERT_SHARES]
    return [count for count in dict.fromkeys(below) if count]


def _widest(subject: Subject, base: WidthRequest, limit: float, index: int) -> Target | None:
    """The target with the most neurons that fits, by bisection over multiples; None where none is legal and fits.

    Args:
        index: of the size that is limited in what `measure_size` gives.
    """

    def fits(request: WidthRequest) -> Target | None:
        target = resolve(subject.architecture, subject.trace.refused, request)
        same = target.widths.hidden_size == subject.widths.hidden_size
        return target if same and measure_size(subject, target)[index] <= limit else None

    largest = max(getattr(subject.widths, width) for width in NEURONS)
    step = _step(largest)
    low, high = max(1, int(LEAST_NEURONS * largest) // step), largest // step
    try:
        best = fits(base)
        if best is not None or base.keep_layers or not _neurons(subject, Fraction(1)):
            return best
        while low <= high:
            middle = (low + high) // 2
            found = fits(replace(base, **_neurons(subject, Fraction(middle * step, largest))))
            if found is not None:
                best, low = found, middle + 1
            else:
                high = middle - 1
    except PlanError:  # a number of layers, groups, heads or experts that this family cannot have
        return None
    return best


def _step(largest: int) -> int:
    """What numbers of neurons are a multiple of: 64, in an MLP of less than 4096 a power of two near its 64th part."""
    return int(max(1, min(ROUND_TO, 2 ** ((largest // 64).bit_length() - 1 if largest >= 64 else 0))))


def _neurons(subject: Subject, share: Fraction) -> dict[str, Any]:
    """Sizes that leave this share of every kind of neuron, rounded down to what kernels like."""
    found: dict[str, Any] = {}
    for width in NEURONS:
        whole = getattr(subject.widths, width)
        if whole and width not in subject.trace.refused:
            step = max(_step(whole), subject.architecture.step_of(width))
            found[width] = max(step, int(whole * share) // step * step)
    return found


def least_target(subject: Subject, keep_layers: tuple[int, ...] = ()) -> Target:
    """The least that the search reaches in every width at once: what has to be proven before it starts.

    Args:
        keep_layers: see `WidthRequest`.
    """
    before = subject.widths
    if keep_layers:
        deepest_last = tuple(float(-layer) for layer in range(before.num_hidden_layers))
        for fewest in reversed(list(_ever_fewer_layers(subject, WidthRequest(keep_layers=keep_layers), deepest_last))):
            with suppress(PlanError):  # layers that cannot go together, or all of them
                return resolve(subject.architecture, subject.trace.refused, fewest)
    groups = ([before.num_key_value_heads, *_group_counts(subject)])[-1]
    per_group = [before.heads_per_group if groups else 0, *_head_counts(subject)][-1]
    experts = [None, *_expert_counts(subject)][-1]
    request = WidthRequest(num_experts=experts, **_neurons(subject, LEAST_NEURONS))
    shapes: dict[str, Any] = (
        {"num_key_value_heads": groups, "num_attention_heads": groups * per_group} if groups else {}
    )
    layers = before.num_hidden_layers - round(DEPTHS[-1] * before.num_hidden_layers)
    for changes in ({**shapes, "num_hidden_layers": layers}, {"num_hidden_layers": layers}, shapes, {}):
        try:
            target = resolve(subject.architecture, subject.trace.refused, replace(request, **changes))
        except PlanError:  # layers or heads that cannot go so
            continue
        if target.widths.hidden_size == before.hidden_size:
            return target
    return resolve(subject.architecture, subject.trace.refused, request)
