"""The report card of a pruned model."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.table import Table

from llmprune_cli.cli.screen.table_parts import NARROW, number_text
from llmprune_cli.text.names import with_split

if TYPE_CHECKING:
    from rich.console import Console

    from llmprune_cli.report.json_results import CalibrationResult, LayerResult

BAR_CELLS = 24  # of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
CARD_ROWS = 40  # layers of a deeper model share rows


def print_card(console: Console, card: CalibrationResult, protected: tuple[int, ...]) -> None:
    """What a pruned model does on held-out text.

    Args:
        protected: numbers of the layers that were left whole.
    """
    if card.layers:
        console.print(_layer_table(card.layers, protected))
    table = Table(title=f"Held-out text of {with_split(card.dataset, card.split)}", title_justify="left", **NARROW)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    if card.kl is not None:
        table.add_row("perplexity", number_text(card.perplexity_before), number_text(card.perplexity_after))
    table.add_row("bits per byte", f"{card.bits_per_byte_before:.3f}", f"{card.bits_per_byte_after:.3f}")
    if card.kl is not None:
        table.add_row("KL divergence", "", f"{card.kl:.3f} nats")
    console.print(table)
    console.print(f"Calibrated on {card.tokens:,} tokens of {card.origin}.", highlight=False)
    for own in card.answers:
        console.print(f"\n{own.prompt}", style="bold", highlight=False)
        for when, said in (("before", own.before), ("after", own.after)):
            console.print(f"  {when}: {' '.join(said.split())}", highlight=False)


def _layer_table(layers: tuple[LayerResult, ...], protected: tuple[int, ...]) -> Table:
    """A row for each layer, or for as many consecutive ones as keep the table short, with their mean errors."""
    each = -(-len(layers) // CARD_ROWS)
    caption = f"Each row shows the means over {each} layers." if each > 1 else None
    table = Table(title="Layers", title_justify="left", caption=caption, caption_justify="left", **NARROW)
    refitted = any(layer.refit_error is not None for layer in layers)
    names = ("removal error", "refit error") if refitted else ()
    rows = [layers[first : first + each] for first in range(0, len(layers), each)]
    errors_behind = [[layer.stream_error for layer in row if layer.stream_error is not None] for row in rows]
    streams = [_mean(own) for own in errors_behind if own]  # none where tokens differ
    for name in ("layer", *names, *(("stream error",) if streams else ())):
        table.add_column(name, justify="right")
    if streams:
        table.add_column("", min_width=BAR_CELLS, no_wrap=True)
    worst = max((error for error in streams if math.isfinite(error)), default=0.0)
    for row, stream in zip_longest(rows, streams):
        numbers = str(row[0].layer) if len(row) == 1 else f"{row[0].layer}-{row[-1].layer}"
        cells = []
        if refitted:
            removal = [layer.removal_error for layer in row if layer.removal_error is not None]
            refit = [layer.refit_error for layer in row if layer.refit_error is not None]
            kept = "kept" if {layer.layer for layer in row} <= {*protected} else "-"
            cells = [_percent(_mean(errors)) if errors else kept for errors in (removal, refit)]
        table.add_row(numbers, *cells, *((_percent(stream), _bar(stream, worst)) if stream is not None else ()))
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share < 100 else f"{100 * share:.2g}%"


def _bar(value: float, longest: float) -> str:
    """A bar in eighths of a cell; whatever is not finite is longer than all others."""
    share = value / longest if math.isfinite(value) and longest else float(not math.isfinite(value))
    eighths = round(8 * BAR_CELLS * share)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
