"""The lines that the quality table must hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tools.bench.quality_runs import Outcome

WIKITEXT2, PYTHON_DOCS = "wikitext2", "python-docs"
DENSE, QUARTER = "dense", "25% of MLP neurons, ours"
TARGETS = ("85%", "70%", "50%")  # of the parameters stay
OURS, OPTIPFAIR = "ours", "optipfair"
RIVALS = {  # name → importance and refit
    "magnitude": ("magnitude", "none"),
    "random": ("random", "none"),
    "taylor": ("taylor", "none"),
    "activation": ("activation", "none"),
    "activation, local refit": ("activation", "local"),
}
AXES = {  # name → the width that alone shrinks
    "MLP only": "intermediate_size",
    "KV groups only": "num_key_value_heads",
    "layers only": "num_hidden_layers",
    "hidden size only": "hidden_size",
}
ROWS = (DENSE, QUARTER, *(f"{target} {name}" for target in TARGETS for name in (OURS, *RIVALS, OPTIPFAIR, *AXES)))

MOST_QUARTER, GOAL_QUARTER = 52.0, 47.0  # perplexity on WikiText-2
MOST_AT_85 = 1.52  # times dense
MOST_SECONDS = 3600.0


@dataclass(frozen=True)
class Verdict:
    """One line held against what was measured."""

    text: str
    holds: bool


def judge(outcomes: dict[str, Outcome]) -> list[Verdict]:
    """All lines, by the outcomes' names; a line of which a figure is missing does not hold."""
    dense, quarter = figure(outcomes, DENSE, WIKITEXT2), figure(outcomes, QUARTER, WIKITEXT2)
    largest, middle, smallest = (figure(outcomes, f"{target} {OURS}", WIKITEXT2) for target in TARGETS)
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    missing = [name for name in ROWS if name not in outcomes or outcomes[name].error]
    return [
        Verdict(f"1. {QUARTER}: {quarter:.2f} ≤ {MOST_QUARTER} (goal {GOAL_QUARTER})", quarter <= MOST_QUARTER),
        *(_best_axis(outcomes, target) for target in TARGETS),
        Verdict(f"2. monotone: {largest:.2f} ≤ {middle:.2f} ≤ {smallest:.2f}", largest <= middle <= smallest),
        Verdict(f"2. {TARGETS[0]}: {largest / dense:.3f} ≤ {MOST_AT_85} times dense", largest <= MOST_AT_85 * dense),
        *(_first_place(outcomes, target, WIKITEXT2, "3") for target in TARGETS),
        *(_first_place(outcomes, target, PYTHON_DOCS, "4") for target in TARGETS),
        Verdict(
            f"4. all rows take {seconds / 60:.1f} of {MOST_SECONDS / 60:.0f} minutes; without a figure: {len(missing)}",
            seconds <= MOST_SECONDS and not missing,
        ),
    ]


def figure(outcomes: dict[str, Outcome], name: str, corpus: str) -> float:
    """A perplexity; not a number where it was not measured, so that no comparison with it holds."""
    found = outcomes.get(name)
    return found.perplexity[corpus] if found and found.perplexity else math.nan


def _ranked(
    outcomes: dict[str, Outcome], target: str, names: Iterable[str], corpus: str
) -> tuple[list[str], list[str]]:
    """Names with a figure, lowest perplexity first, and those without one that should have it."""
    full = {name: f"{target} {name}" for name in names}
    due = [name for name in full if full[name] not in outcomes or outcomes[full[name]].applies]
    figures = {name: figure(outcomes, full[name], corpus) for name in due}
    measured = sorted((name for name in due if not math.isnan(figures[name])), key=figures.__getitem__)
    return measured, [name for name in due if name not in measured]


def _best_axis(outcomes: dict[str, Outcome], target: str) -> Verdict:
    ours = figure(outcomes, f"{target} {OURS}", WIKITEXT2)
    axes, missing = _ranked(outcomes, target, AXES, WIKITEXT2)
    best = figure(outcomes, f"{target} {axes[0]}", WIKITEXT2) if axes else math.nan
    text = f"2. {target}: {ours:.2f} ≤ {best:.2f} of the best single axis ({', '.join(axes[:1])})"
    return Verdict(text + _without(missing), ours <= best and not missing)


def _first_place(outcomes: dict[str, Outcome], target: str, corpus: str, number: str) -> Verdict:
    order, missing = _ranked(outcomes, target, (OURS, *RIVALS, OPTIPFAIR), corpus)
    shown = " < ".join(f"{name} {figure(outcomes, f'{target} {name}', corpus):,.2f}" for name in order)
    text = f"{number}. {target}, ours is first on {corpus}: {shown}"
    if corpus != WIKITEXT2 and order != _ranked(outcomes, target, (OURS, *RIVALS, OPTIPFAIR), WIKITEXT2)[0]:
        text += f" (another order than on {WIKITEXT2})"
    return Verdict(text + _without(missing), order[:1] == [OURS] and not missing)


def _without(names: list[str]) -> str:
    return f"; not measured: {', '.join(names)}" if names else ""
