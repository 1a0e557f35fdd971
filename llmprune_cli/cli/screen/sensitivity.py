"""What `inspect --sensitivity` shows: a table that is a picture, too."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from llmprune_cli.cli.screen.progress import in_words
from llmprune_cli.cli.screen.table_parts import NARROW, count_text, new_console, ranges_text
from llmprune_cli.text.names import short_name

if TYPE_CHECKING:
    from llmprune_cli.report.json_results import SensitivityResult

HEADS = {
    "num_attention_heads": "query\nheads",
    "num_key_value_heads": "KV\ngroups",
    "intermediate_size": "MLP\nneurons",
    "moe_intermediate_size": "expert\nneurons",
    "shared_expert_intermediate_size": "shared\nneurons",
    "num_experts": "experts\n",
    "num_hidden_layers": "whole\nlayer",
}
MOST_WIDE = 5  # columns of widths beside which the others need no break in their heads
SHADES = " ░▒▓█"  # from the least to the greatest of a column, by orders of magnitude
LEAST_SHOWN = 1e-4  # nats, below which all is alike
NAMED = 3  # layers that are named as those whose absence costs least


def print_sensitivity(result: SensitivityResult, asked: str) -> None:
    """A row for each layer, and what to make of it.

    Args:
        asked: model and options for a `prune` that finds what was measured, as words of a command line.
    """
    console = new_console()
    console.print(_table(result))
    name, took = short_name(result.dataset), in_words(result.seconds)
    for line in (
        "KL divergence of the next token from the whole model's, in nats, where that part",
        "of one layer alone goes and nothing is refitted. Several lose more than the sum.",
        f"{SHADES.strip()}: from the least of a column to the most.",
        f"Units by {result.importance} on {result.tokens:,} tokens of {name}; measured on {result.held_out_tokens:,} "
        f"others, in {took}.",
    ):
        console.print(line, highlight=False)
    layers = _cheapest(result)
    if layers:
        shown = ", ".join(f"{number} ({_kl(result.widths[-1].kl[number])})" for number in layers)
        console.print(f"Layers that cost least: {shown}.", highlight=False)
    console.print("Next:")
    for line in _next(result, asked, layers):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _table(result: SensitivityResult) -> Table:
    table = Table(title=result.model, title_justify="left", **NARROW)
    table.add_column("layer", justify="right", no_wrap=True)
    for row in result.widths:
        share = "\n" if row.units == 1 else f"{count_text(row.removed)} of\n{count_text(row.units)}"
        table.add_column(f"{HEADS[row.width]}\n{share}\n−{count_text(row.parameters)}", justify="right", no_wrap=True)
    if result.influence is not None:
        table.add_column(
            "influence" if len(result.widths) < MOST_WIDE else "influ-\nence", justify="right", no_wrap=True
        )
    shades = [_shades(row.kl) for row in result.widths]
    for number in range(len(result.widths[0].kl)):
        cells = [f"{_kl(row.kl[number])}{own[number]}" for row, own in zip(result.widths, shades, strict=True)]
        turned = [f"{result.influence[number]:.3f}"] if result.influence is not None else []
        table.add_row(str(number), *cells, *turned)
    return table


def _kl(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value < 1 else f"{value:.2f}" if value < 1000 else f"{value:.2g}"


def _shades(column: tuple[float | None, ...]) -> list[str]:
    """A shade for each figure, by where its logarithm lies among those of the column."""
    known = [math.log(max(value, LEAST_SHOWN)) for value in column if value is not None and math.isfinite(value)]
    least, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    found = []
    for value in column:
        if value is None or not span:
            found.append(" ")
            continue
        share = (math.log(max(value, LEAST_SHOWN)) - least) / span if math.isfinite(value) else 1.0
        found.append(SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))])
    return found


def _cheapest(result: SensitivityResult) -> list[int]:
    """The layers whose absence costs least, the cheapest first."""
    whole = [math.inf if kl is None else kl for kl in result.widths[-1].kl]
    return sorted(range(len(whole)), key=whole.__getitem__)[: min(NAMED, len(whole) // 2)]


def _next(result: SensitivityResult, asked: str, layers: list[int]) -> Iterator[str]:
    """Commands that go on from here, with what was measured."""
    kept = f"{asked} --statistics {shlex.quote(result.statistics)}" if result.statistics else asked
    if layers:
        yield f"llmprune prune {kept} --drop-layers {ranges_text(sorted(layers)).replace(', ', ',')} -o shallow"
    yield f"llmprune prune {kept} --target 85% -o pruned"
