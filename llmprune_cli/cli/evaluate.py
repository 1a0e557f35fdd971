"""`llmprune eval`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmprune_cli.cli.parameters import COMMON, AsJson, takes
from llmprune_cli.cli.screen.tables import new_console, number_text, print_json, size_text
from llmprune_cli.options import Evaluation, ModelReference
from llmprune_cli.startup.loading import loading

if TYPE_CHECKING:
    from llmprune_cli.report.results import EvalReport

Compare = Annotated[str | None, typer.Option(help="A second model, evaluated side by side.", rich_help_panel=COMMON)]


@takes()
def eval_command(
    model: ModelReference, evaluation: Evaluation, compare: Compare = None, as_json: AsJson = False
) -> None:
    """Measure perplexity: mean over windows of the mean negative log-likelihood, exponentiated."""
    with loading():
        from llmprune_cli.cli.screen.progress import progress_on_stderr
        from llmprune_cli.commands.evaluate import evaluate

    other = replace(model, name=compare, revision=None) if compare else None
    with progress_on_stderr() as listener:
        report = evaluate(model, other, evaluation, listener)
    (print_json if as_json else print_eval)(report)


def print_eval(report: EvalReport) -> None:
    """Table of `eval`, one column for each model."""
    table = Table(title=f"Perplexity on {report.dataset} ({report.split})")
    table.add_column("")
    for result in report.results:
        table.add_column(result.model, justify="right", overflow="fold")
    rows = {
        "perplexity": [number_text(r.perplexity) for r in report.results],
        "windows × tokens": [f"{r.windows} × {r.max_seq_len}" for r in report.results],
        "tokens": [f"{r.tokens:,}" for r in report.results],
        "parameters": [f"{r.parameters:,}" for r in report.results],
        "size": [size_text(r.size_bytes) for r in report.results],
        "time": [f"{r.seconds:.1f} s" for r in report.results],
        "tokens per second": [f"{r.tokens_per_second:,.0f}" for r in report.results],
        "peak memory so far": [size_text(r.peak_memory_bytes) for r in report.results],
    }
    for label, values in rows.items():
        table.add_row(label, *values)
    new_console().print(table)
