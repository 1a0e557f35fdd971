"""`llmprune eval`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmprune_cli.cli.parameters import COMMON, AsJson, Quiet, Verbose, takes
from llmprune_cli.cli.screen.answers import answers_table
from llmprune_cli.cli.screen.progress import progress_on_stderr
from llmprune_cli.cli.screen.table_parts import (
    NARROW,
    count_text,
    folded,
    new_console,
    number_text,
    print_json,
)
from llmprune_cli.commands.requests import check_eval
from llmprune_cli.options import Evaluation, ModelReference
from llmprune_cli.run.questions.request import TaskRequest
from llmprune_cli.sizes import size_text
from llmprune_cli.startup.loading import loading
from llmprune_cli.text.names import with_split

if TYPE_CHECKING:
    from llmprune_cli.report.json_results import EvalReport, EvalResult

HEADS = ("parameters", "size", "perplexity", "Δ", "ratio", "KL", "bits/byte", "tokens/s")
# What is left out where there is no room for all, in this order.
LEFT_OUT = ("tokens/s", "Δ", "size", "parameters", "bits/byte", "KL", "ratio")
LEAST_NAME = 16  # characters of a model's name in a line
MOST = 1e6  # a difference beyond is shown in powers of ten
Others = Annotated[
    list[str] | None,
    typer.Argument(help="Further models, held against the first.", metavar="MODEL", show_default=False),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(help="A further model, as one after MODEL; may be given several times.", rich_help_panel=COMMON),
]


@takes()
def eval_command(
    model: ModelReference,
    evaluation: Evaluation,
    asked: TaskRequest,
    others: Others = None,
    compare: Compare = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check what is asked for, do it, and print it."""
    names = [*(others or ()), *(compare or ())]
    further = [replace(model, name=name, revision=None) for name in names]
    check_eval([model, *further], evaluation, asked.tasks)
    with loading():
        from llmprune_cli.commands.evaluate import evaluate

    with progress_on_stderr(quiet) as listener:
        report = evaluate(model, further, evaluation, listener, asked)
    if as_json:
        print_json(report)
    else:
        print_eval(report, verbose)


def print_eval(report: EvalReport, is_verbose: bool = False) -> None:
    """Table of `eval`, a row for each model, of what fits beside their names; verbose: what it took, as well."""
    console, first = new_console(), report.results[0]
    windows = f"{first.windows:,} × {first.max_seq_len:,} = {first.tokens:,} tokens"
    console.print(f"Perplexity on {with_split(report.dataset, report.split)}, {windows}", highlight=False)
    rows = [_figures(result, first) for result in report.results]
    shown = [head for head in HEADS if any(row[head] for row in rows)]
    wide = {head: max(len(head), *(len(row[head]) for row in rows)) + 2 for head in shown}
    room = console.width - 2
    for head in LEFT_OUT:
        if head in shown and sum(wide[name] for name in shown) + LEAST_NAME > room:
            shown.remove(head)
    table = Table("model", **NARROW)
    for head in shown:
        table.add_column(head, justify="right", no_wrap=True)
    left = max(room - sum(wide[name] for name in shown), LEAST_NAME)
    for result, row in zip(report.results, rows, strict=True):
        table.add_row(folded(result.model, left), *(row[head] for head in shown))
    console.print(table)
    if first.tasks:
        console.print(answers_table(report.results, console.width))
    if is_verbose:
        for result in report.results:
            console.print(
                f"{result.model}: {result.parameters:,} parameters, {result.windows:,} windows of "
                f"{result.max_seq_len:,} tokens, {result.bytes:,} bytes, in {result.dtype}, in {result.seconds:.1f} s "
                f"({result.tokens_per_second:,.0f} tokens/s), peak memory so far "
                f"{size_text(result.peak_memory_bytes)}.",
                highlight=False,
            )


def _figures(result: EvalResult, first: EvalResult) -> dict[str, str]:
    """Cells of a model by the column's head; what compares it with the first is empty for that one."""
    delta, ratio = result.perplexity - first.perplexity, result.perplexity / first.perplexity
    is_compared = result is not first and result.same_tokens and math.isfinite(delta) and math.isfinite(ratio)
    return {
        "parameters": count_text(result.parameters),
        "size": size_text(result.size_bytes),
        "perplexity": number_text(result.perplexity),
        "Δ": (f"{delta:+,.2f}" if abs(delta) < MOST else f"{delta:+.3g}") if is_compared else "",
        "ratio": f"×{ratio:.4g}" if is_compared else "",
        "KL": "" if result.kl is None else f"{result.kl:.3f}",
        "bits/byte": f"{result.bits_per_byte:.3f}",
        "tokens/s": f"{result.tokens_per_second:,.0f}",
    }
