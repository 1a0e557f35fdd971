"""`llmprune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune_cli.cli.parameters import COMMON, AsJson, Quiet, takes
from llmprune_cli.cli.screen.tables import new_console, print_json, size_text
from llmprune_cli.commands.requests import check_export
from llmprune_cli.options import OUTPUT, Conversion, ModelReference
from llmprune_cli.startup.loading import loading

if TYPE_CHECKING:
    from llmprune_cli.report.results import ExportResult

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=COMMON)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model folder that --output names.", rich_help_panel=OUTPUT)
]


@takes("device")
def export_command(
    model: ModelReference,
    conversion: Conversion,
    output: Output,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check what is asked for, do it, and print it."""
    check_export(model, output, overwrite)
    with loading():
        from llmprune_cli.cli.screen.progress import progress_on_stderr
        from llmprune_cli.commands.export import export

    with progress_on_stderr(quiet) as listener:
        result = export(model, output, overwrite, conversion, listener)
    (print_json if as_json else print_export)(result)


def print_export(result: ExportResult) -> None:
    """Summary of `export`."""
    new_console().print(
        f"Wrote [bold]{result.output}[/bold]: {result.format}, {result.dtype}, {result.parameters:,} parameters, "
        f"{size_text(result.size_bytes)}, {len(result.files)} files.",
        highlight=False,
    )
    if result.note:
        new_console().print(f"Note: {result.note}", highlight=False, style="yellow")
    found = result.verification
    if found is None:
        new_console().print(f"Not verified: {result.unverified}.", highlight=False)
        return
    new_console().print(
        f"Verified with {found.runtime}: {found.tokens} greedy tokens after {found.prompts} prompts, "
        f"{found.same_tokens:.1%} of them as transformers chooses, KL {found.kl:.2g} nats per token (limit "
        f"{found.kl_limit:g}), largest difference of a log-probability {found.largest_difference:.2g}.",
        highlight=False,
    )
