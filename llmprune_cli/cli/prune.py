"""`llmprune prune`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from llmprune_cli.cli.evaluate import print_eval
from llmprune_cli.cli.inspect import modules_table
from llmprune_cli.cli.parameters import COMMON, AsJson, takes
from llmprune_cli.cli.tables import (
    WIDTH_LABELS,
    new_console,
    number_text,
    print_deviations,
    print_json,
    print_runtimes,
    totals_table,
)
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.options import Choice, Delivery, Evaluation, ModelReference, Scratch, Text
from llmprune_cli.startup.loading import loading
from llmprune_cli.vocabulary.request import VocabularyRequest

if TYPE_CHECKING:
    from llmprune_cli.family.widths import Widths
    from llmprune_cli.report.results import CalibrationResult, CandidateResult, LayerResult, PruneResult

BAR_CELLS = 24  # of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
CARD_ROWS = 40  # layers of a deeper model share rows

Evaluate = Annotated[bool, typer.Option("--eval", help="Perplexity before and after.", rich_help_panel=COMMON)]


@takes()
def prune_command(
    model: ModelReference,
    choice: Choice,
    text: Text,
    delivery: Delivery,
    scratch: Scratch,
    evaluation: Evaluation,
    vocabulary: VocabularyRequest,
    evaluate: Evaluate = False,
    as_json: AsJson = False,
) -> None:
    """Remove channels, heads, neurons, experts and layers, and write a smaller checkpoint."""
    request = PruneRequest(model, choice, text, delivery, scratch, evaluation if evaluate else None, vocabulary)
    with loading():
        from llmprune_cli.cli.progress import progress_on_stderr
        from llmprune_cli.commands.prune import prune

    with progress_on_stderr() as listener:
        result = prune(request, listener)
    if result is not None:
        (print_json if as_json else print_prune)(result)


def print_prune(result: PruneResult) -> None:
    """Tables of `prune`."""
    console = new_console()
    console.print(modules_table(result.before, result.after))
    console.print(_width_table(result.before.widths, result.after.widths))
    console.print(totals_table(result.before, result.after))
    print_deviations(console, result.deviations)
    print_runtimes(console, result.runtimes)
    if result.candidates:
        _print_candidates(console, result.candidates)
    if result.calibration:
        _print_calibration(console, result.calibration, result.protected_layers)
    if result.evaluation:
        print_eval(result.evaluation)
    if result.output:
        console.print(f"Wrote [bold]{result.output}[/bold] in {result.seconds:.1f} s.", highlight=False)
    elif result.evaluation:
        console.print("Nothing was kept: give --output to save the pruned model.")
    else:
        console.print("Dry run: nothing was written.")


def _print_candidates(console: Console, candidates: tuple[CandidateResult, ...]) -> None:
    names = [name for name in WIDTH_LABELS if len({getattr(c.widths, name) for c in candidates}) > 1]
    table = Table(title="Candidates, best first")
    for label in (*(WIDTH_LABELS[name] for name in names), "parameters", "KL, nats"):
        table.add_column(label, justify="right")
    for candidate in candidates:
        sizes = [f"{getattr(candidate.widths, name):,}" for name in names]
        table.add_row(*sizes, f"{candidate.parameters:,}", f"{candidate.kl:.3f}")
    console.print(table)


def _print_calibration(console: Console, card: CalibrationResult, protected: tuple[int, ...]) -> None:
    console.print(_layer_table(card.layers, protected))
    table = Table(title=f"Held-out text of {card.dataset} ({card.split})")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("perplexity", number_text(card.perplexity_before), number_text(card.perplexity_after))
    table.add_row("KL divergence", "", f"{card.kl:.3f} nats")
    speeds = (card.prefill_tokens_per_second_before, card.prefill_tokens_per_second_after)
    table.add_row(f"prefill tokens per second, float32, {card.device}", *(f"{speed:,.0f}" for speed in speeds))
    console.print(table)
    console.print(f"Calibrated on {card.tokens:,} tokens of {card.origin}.", highlight=False)
    console.print("Speeds are of one layer at a time, without loading it.", highlight=False)


def _layer_table(layers: tuple[LayerResult, ...], protected: tuple[int, ...]) -> Table:
    """A row for each layer, or for as many consecutive ones as keep the table short, with their mean errors."""
    each = -(-len(layers) // CARD_ROWS)
    table = Table(title="Layers", caption=f"Each row shows the means over {each} layers." if each > 1 else None)
    refitted = any(layer.refit_error is not None for layer in layers)
    names = ("removal error", "refit error") if refitted else ()
    for name in ("layer", *names, "stream error"):
        table.add_column(name, justify="right")
    table.add_column("", min_width=BAR_CELLS, no_wrap=True)
    rows = [layers[first : first + each] for first in range(0, len(layers), each)]
    streams = [_mean([layer.stream_error for layer in row]) for row in rows]
    worst = max((error for error in streams if math.isfinite(error)), default=0.0)
    for row, stream in zip(rows, streams, strict=True):
        numbers = str(row[0].layer) if len(row) == 1 else f"{row[0].layer}-{row[-1].layer}"
        cells = []
        if refitted:
            removal = [layer.removal_error for layer in row if layer.removal_error is not None]
            refit = [layer.refit_error for layer in row if layer.refit_error is not None]
            kept = "kept" if {layer.layer for layer in row} <= {*protected} else "-"
            cells = [_percent(_mean(errors)) if errors else kept for errors in (removal, refit)]
        table.add_row(numbers, *cells, _percent(stream), _bar(stream, worst))
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


def _width_table(before: Widths, after: Widths) -> Table:
    table = Table("width", title="Widths")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, label in WIDTH_LABELS.items():
        if not getattr(before, name):
            continue
        table.add_row(label, f"{getattr(before, name):,}", f"{getattr(after, name):,}")
    return table
