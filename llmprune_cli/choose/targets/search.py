"""Which uniform widths a target is best spent on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from llmprune_cli.choose.targets.limits import Limit, measure_size, whole_target
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import legal_heads
from llmprune_cli.family.kept_layers import remain_alike
from llmprune_cli.family.widths import NEURONS, Width
from llmprune_cli.options import WidthRequest
from llmprune_cli.plan.legal import legal_experts
from llmprune_cli.plan.requested_widths import Target, protected_layers, resolve
from llmprune_cli.plan.rounding import WHOLE_BLOCKS, usual_step
from llmprune_cli.sizes import Budget

STEPS, LARGEST_STEP = 64, 128  # in the whole width of an MLP, at least, and its neurons, at most
SHORT_BLOCK = 32  # weights that the older types of GGUF quantize together; mixes do with `WHOLE_BLOCKS`
LEAST_BLOCKS = 16  # in a row of an MLP that is cut by whole blocks
DEPTHS = (0.0, 0.07, 0.14, 0.21, 0.3, 0.4, 0.5)  # shares of the layers whose removal is considered
EXPERT_SHARES = (0.875, 0.75, 0.5)  # of the experts that are considered to stay
FULL = 0.9  # of the limit: what is below it has room left
LEAST_NEURONS = Fraction(3, 20)  # a smaller share of an MLP is not considered


@dataclass(frozen=True)
class Candidate:
    """Widths that fit a budget, and how well they do."""

    target: Target
    parameters: int
    kl: float  # on held-out text, after a short calibration


Judge = Callable[[Target], float]  # gives the divergence from the dense model, see `Candidate`
Steps = Callable[[Subject, WidthRequest, tuple[float, ...]], Iterator[WidthRequest]]


@dataclass(frozen=True)
class Conditions:
    """What every candidate keeps to."""

    keep_layers: tuple[int, ...]  # that stay as they are
    steps: dict[str, int]  # for each kind of neurons that can go, what their number is a multiple of


def conditions_of(subject: Subject, own: WidthRequest, budget: Budget | None) -> Conditions:
    """What is asked of every candidate, and the numbers that suit each kind of neurons."""
    counts_blocks = budget is not None and budget.dtype is not None
    wholes = {str(width): getattr(subject.widths, width) for width in NEURONS if width not in subject.trace.refused}
    steps = {
        width: max(_step(whole, own.round_to, counts_blocks), subject.architecture.step_of(width))
        for width, whole in wholes.items()
        if whole
    }
    return Conditions(own.keep_layers, steps)


def _step(whole: int, round_to: int | None, counts_blocks: bool) -> int:
    """What numbers of neurons are a multiple of: finer than what a ratio keeps, so that a target is met closely.

    Args:
        whole: neurons of the whole MLP.
        round_to: what is asked for instead.
        counts_blocks: whether a size counts quantized weights, so that blocks of them have to divide the rows: fewer
            neurons, which they do not, are larger.
    """
    if round_to is not None:
        return min(round_to, whole)
    usual = min(LARGEST_STEP, usual_step(whole, STEPS))
    if not counts_blocks or whole < LEAST_BLOCKS * SHORT_BLOCK:
        return usual
    return WHOLE_BLOCKS if whole >= 2 * LEAST_BLOCKS * WHOLE_BLOCKS else max(SHORT_BLOCK, usual)


def search_widths(
    subject: Subject,
    limit: Limit,
    layer_scores: tuple[float, ...],
    judge: Judge,
    conditions: Conditions,
    bound: Target | None = None,
) -> tuple[Candidate, ...]:
    """The candidates that were judged, best first: each has the widest MLP that fits beside the rest.

    One way to shrink after the other: ever fewer layers, KV groups, query heads, experts, each from the best that was
    found before it, until it gets worse. The others start from all layers where those that go leave room that no
    neurons are left for. The hidden size stays. Where layers are protected, all widths stay, and as few of the other
    layers go as the budget allows.

    Args:
        layer_scores: of each layer; those with the least go first, if the family can do without them.
        bound: what a smaller budget is best spent on: no more layers, groups, heads or experts go than there.

    Raises:
        PlanError: nothing fits.
    """
    judged: dict[tuple[object, ...], Candidate] = {}
    keep_layers = conditions.keep_layers
    whole = base = WidthRequest(keep_layers=keep_layers)
    best = float("inf")
    for steps, patience in ((_ever_fewer_layers, 1),) if keep_layers else WAYS:
        origin, worse = base, 0
        for asked in steps(subject, origin, layer_scores):
            request = _legal(subject, asked)
            if request is None:
                continue
            target = _widest(subject, request, limit, conditions)
            if target is None:
                base = request if best == float("inf") else base  # not enough on its own: other ways go on from here
                continue
            if (target.widths, target.layers) in judged or (bound is not None and _goes_beyond(target, bound)):
                continue
            is_whole = target.widths == subject.widths
            kl = 0.0 if is_whole else judge(target)
            parameters = measure_size(subject, target)[0] - limit.spared[0]
            judged[target.widths, target.layers] = Candidate(target, parameters, kl)
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
        if steps is _fewer_layers and _overshoots(subject, limit, judged.values()):
            base = whole
    if not judged:
        raise PlanError(
            f"No uniform widths that the search tries leave {limit}. Ask for {limit.less}, or give the widths yourself."
        )
    return tuple(sorted(judged.values(), key=lambda candidate: candidate.kl))


def most_candidates(subject: Subject, keep_layers: tuple[int, ...] = ()) -> int:
    """How many candidates the search judges at most.

    Args:
        keep_layers: see `WidthRequest`.
    """
    if keep_layers:
        return 1
    scores = (0.0,) * subject.widths.num_hidden_layers
    return sum(len(list(steps(subject, WidthRequest(), scores))) for steps, _ in WAYS)


def _legal(subject: Subject, request: WidthRequest) -> WidthRequest | None:
    """A request, or one for as many layers where these cannot go; None where the family can have neither."""
    found = [request]
    if request.drop_layers:
        count = subject.widths.num_hidden_layers - len(request.drop_layers)
        found += [replace(request, drop_layers=None, num_hidden_layers=count)] if count else []
    for own in found:
        with suppress(PlanError):
            target = resolve(subject.architecture, subject.trace.refused, own)
            if remain_alike(subject.architecture.config, target.layers):
                return own
    return None


def _overshoots(subject: Subject, limit: Limit, judged: Collection[Candidate]) -> bool:
    """Whether the best candidate has all neurons and is well below the limit: nothing else that goes can help it."""
    best = min(judged, key=lambda candidate: candidate.kl, default=None)
    if best is None or any(getattr(best.target.widths, width) != getattr(subject.widths, width) for width in NEURONS):
        return False
    return best.parameters < FULL * limit.share * measure_size(subject, whole_target(subject))[0]


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
    for count in sorted({round(share * len(order)) for share in _depths(subject)}):
        if count < len(order):
            yield replace(base, drop_layers=tuple(sorted(order[:count])) if count else None)


def _depths(subject: Subject) -> tuple[float, ...]:
    """Shares of the layers whose removal is considered: where none can go, none."""
    return DEPTHS if Width.LAYERS not in subject.trace.refused else DEPTHS[:1]


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
    step, groups = max(1, before.heads_per_group // 4), before.num_key_value_heads
    fewer = (before.heads_per_group - step, before.heads_per_group - 2 * step)
    return [count for count in fewer if groups * count in legal_heads(subject.architecture, groups)]


def _expert_counts(subject: Subject) -> list[int]:
    """Numbers of experts to consider: an eighth, a quarter and a half fewer, where the router can do with them."""
    whole = subject.widths.num_experts
    if not whole or "num_experts" in subject.trace.refused:
        return []
    legal = legal_experts(subject.architecture)
    below = [max((n for n in legal if n <= share * whole), default=0) for share in EXPERT_SHARES]
    return [count for count in dict.fromkeys(below) if count]


def _widest(subject: Subject, base: WidthRequest, limit: Limit, conditions: Conditions) -> Target | None:
    """The target with the most neurons that fits, by bisection over multiples; None where none is legal and fits."""
    steps = conditions.steps
    parts = max((getattr(subject.widths, width) // step for width, step in steps.items()), default=0) or 1

    def fits(request: WidthRequest) -> Target | None:
        target = resolve(subject.architecture, subject.trace.refused, request)
        same = target.widths.hidden_size == subject.widths.hidden_size
        return target if same and limit.fits(target) else None

    low, high = max(1, int(LEAST_NEURONS * parts)), parts
    try:
        whole_fits = not base.is_empty or any(limit.spared)  # as no other limit leaves the model as it is
        best = fits(base) if whole_fits else None
        if best is not None or base.keep_layers or not steps:
            return best
        while low <= high:
            middle = (low + high) // 2
            found = fits(replace(base, **_neurons(subject, Fraction(middle, parts), steps)))
            if found is not None:
                best, low = found, middle + 1
            else:
                high = middle - 1
    except PlanError:  # a number of layers, groups, heads or experts that this family cannot have
        return None
    return best


def _neurons(subject: Subject, share: Fraction, steps: dict[str, int]) -> dict[str, Any]:
    """Sizes that leave this share of every kind of neuron, rounded down to what kernels like.

    Args:
        steps: see `Conditions`.
    """
    wholes = {width: getattr(subject.widths, width) for width in steps}
    return {width: max(step, int(wholes[width] * share) // step * step) for width, step in steps.items()}


def least_target(subject: Subject, conditions: Conditions) -> Target:
    """The least that the search reaches in every width at once: what has to be proven before it starts."""
    before, keep_layers = subject.widths, conditions.keep_layers
    if keep_layers:
        deepest_last = tuple(float(-layer) for layer in range(before.num_hidden_layers))
        for fewest in reversed(list(_ever_fewer_layers(subject, WidthRequest(keep_layers=keep_layers), deepest_last))):
            legal = _legal(subject, fewest)
            if legal is not None:  # not layers that cannot go together, or all of them
                return resolve(subject.architecture, subject.trace.refused, legal)
    groups = ([before.num_key_value_heads, *_group_counts(subject)])[-1]
    per_group = [before.heads_per_group if groups else 0, *_head_counts(subject)][-1]
    experts = [None, *_expert_counts(subject)][-1]
    request = WidthRequest(num_experts=experts, **_neurons(subject, LEAST_NEURONS, conditions.steps))
    shapes: dict[str, Any] = (
        {"num_key_value_heads": groups, "num_attention_heads": groups * per_group} if groups else {}
    )
    layers = before.num_hidden_layers - round(_depths(subject)[-1] * before.num_hidden_layers)
    for changes in ({**shapes, "num_hidden_layers": layers}, {"num_hidden_layers": layers}, shapes, {}):
        try:
            target = resolve(subject.architecture, subject.trace.refused, replace(request, **changes))
        except PlanError:  # layers or heads that cannot go so
            continue
        alike = remain_alike(subject.architecture.config, target.layers)
        if alike and target.widths.hidden_size == before.hidden_size:
            return target
    return resolve(subject.architecture, subject.trace.refused, request)


def in_words(subject: Subject, target: Target) -> str:
    """What of a target differs from the whole model."""
    before, after = subject.widths, target.widths
    neurons = (before.intermediate_size, after.intermediate_size)
    if not before.intermediate_size:
        neurons = (before.moe_intermediate_size, after.moe_intermediate_size)
    shapes = {
        "layers": (before.num_hidden_layers, len(target.layers)),
        "KV groups": (before.num_key_value_heads, after.num_key_value_heads),
        "heads": (before.num_attention_heads, after.num_attention_heads),
        "neurons": neurons,
        "experts": (before.num_experts, after.num_experts),
    }
    return ", ".join(f"{new} {name}" for name, (old, new) in shapes.items() if new != old)
