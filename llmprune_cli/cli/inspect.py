"""`llmprune inspect`."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmprune_cli.cli.parameters import COMMON, AsJson, takes
from llmprune_cli.cli.screen.progress import progress_on_stderr
from llmprune_cli.cli.screen.tables import (
    WIDTH_LABELS,
    new_console,
    print_deviations,
    print_json,
    print_runtimes,
    size_text,
    totals_table,
)
from llmprune_cli.errors import UsageError
from llmprune_cli.options import ModelReference, WidthRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmprune_cli.report.results import InspectResult, ModelSummary, TensorRow, VerifyResult

Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Hold a folder that llmprune wrote against its checksums, and no more.",
        rich_help_panel=COMMON,
    ),
]


@takes("dtype", "device", "keep_layers")
def inspect_command(
    model: ModelReference, widths: WidthRequest, verify: Verify = False, as_json: AsJson = False
) -> None:
    """Show modules, widths and totals from headers and configuration; with a width option, after pruning too."""
    from llmprune_cli.commands.inspect import inspect, verify_folder

    if not verify:
        with progress_on_stderr():
            result = inspect(model, widths)
        (print_json if as_json else print_inspect)(result)
        return
    if not widths.is_empty:
        raise UsageError("--verify plans nothing; leave out the width options.")
    verified = verify_folder(Path(model.name))
    (print_json if as_json else print_verify)(verified)


def print_inspect(result: InspectResult) -> None:
    """Tables of `inspect`."""
    console = new_console()
    revision = f" @ {result.revision}" if result.revision else ""
    console.print(f"[bold]{result.model}[/bold]{revision}  {result.model_type}", highlight=False)
    console.print(modules_table(result.before, result.after))
    widths = Table("prunable width", "size", *(["after"] if result.after else []), "legal values", title="Widths")
    for name, legal in result.prunable.items():
        after = [f"{getattr(result.after.widths, name):,}"] if result.after else []
        widths.add_row(WIDTH_LABELS[name], f"{getattr(result.before.widths, name):,}", *after, legal)
    console.print(widths)
    console.print(totals_table(result.before, result.after))
    if result.tied_embeddings:
        console.print("Input and output embeddings are tied: one tensor, counted once.")
    if result.dropped:
        console.print(f"Stored but unused: {', '.join(result.dropped[:5])}{' …' if len(result.dropped) > 5 else ''}")
    if result.renamed:
        stored, name = result.renamed[0]
        console.print(f"Stored under older names: {len(result.renamed):,} tensors ({stored} is {name} …).")
    print_runtimes(console, result.runtimes)
    if not result.has_weights:
        console.print("No weights here: shapes follow from config.json.")
    print_deviations(console, result.deviations)


def print_verify(result: VerifyResult) -> None:
    """What `inspect --verify` found."""
    parameters = f", {result.parameters:,} parameters" if result.parameters is not None else ""
    new_console().print(
        f"[bold]{result.folder}[/bold] is what was written: {result.files} files, {size_text(result.size_bytes)}"
        f"{parameters}.",
        highlight=False,
    )


def modules_table(before: ModelSummary, after: ModelSummary | None) -> Table:
    """Tensors, folded over layers."""
    table = Table(title="Modules")
    table.add_column("tensor", overflow="fold")
    table.add_column("layers", justify="right")
    table.add_column("dtype")
    table.add_column("before" if after else "shape", justify="right")
    if after:
        table.add_column("after", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    total = (after or before).parameters
    for old, new in _paired(before.tensors, after.tensors if after else before.tensors):
        layers = f"{old.layers}: {old.count} ×" if old.layers else ""
        shapes = [_shape(old)] + ([_shape(new) if new else "gone"] if after else [])
        parameters = new.parameters if new else 0
        share = f"{100 * parameters / total:.1f}%"
        table.add_row(old.template, layers, old.dtype, *shapes, f"{parameters:,}", share)
    return table


def _paired(before: Sequence[TensorRow], after: Sequence[TensorRow]) -> Iterator[tuple[TensorRow, TensorRow | None]]:
    """Rows of the same tensors before and after; None where all their layers went."""
    for template in dict.fromkeys(row.template for row in before):
        old, new = ([row for row in rows if row.template == template] for rows in (before, after))
        yield from zip_longest(old, new[: len(old)])


def _shape(row: TensorRow) -> str:
    return " × ".join(map(str, row.shape))
