"""`llmprune export` and `llmprune push`: a model for other software, and for other people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from llmprune_cli.cli.parameters import COMMON, AsJson, Quiet, takes
from llmprune_cli.cli.screen.table_parts import new_console, print_json
from llmprune_cli.commands.push import check_push
from llmprune_cli.commands.requests import check_export
from llmprune_cli.formats.request import Conversion
from llmprune_cli.options import OUTPUT, ModelReference
from llmprune_cli.sizes import size_text
from llmprune_cli.startup.loading import loading

if TYPE_CHECKING:
    from llmprune_cli.report.json_results import ExportResult, PushResult

WIDE = 1  # a limit of a KL, in nats, that only models have which any rounding turns around

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=COMMON)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model folder that --output names.", rich_help_panel=OUTPUT)
]
Folder = Annotated[Path, typer.Argument(help="Folder that llmprune wrote.", metavar="FOLDER")]
Repository = Annotated[str, typer.Argument(help="Where to on the hub; made where there is none.", metavar="ORG/NAME")]
Public = Annotated[
    bool, typer.Option("--public/--private", help="Whether everybody may see it.", rich_help_panel=COMMON)
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
    check_export(model, output, overwrite, conversion)
    with loading():
        from llmprune_cli.cli.screen.progress import progress_on_stderr
        from llmprune_cli.commands.export import export

    with progress_on_stderr(quiet) as listener:
        result = export(model, output, overwrite, conversion, listener)
    (print_json if as_json else print_export)(result)


def print_export(result: ExportResult) -> None:
    """Summary of `export`."""
    said = (
        f": {result.format}, {result.dtype}, {result.parameters:,} parameters, {size_text(result.size_bytes)}, "
        f"{len(result.files)} files."
    )
    new_console().print(Text.assemble("Wrote ", (result.output, "bold"), said))
    if result.note:
        new_console().print(f"Note: {result.note}", highlight=False, style="yellow")
    found = result.verification
    if found is None:
        new_console().print(f"Not verified: {result.unverified}.", highlight=False)
        return
    new_console().print(
        f"Verified with {found.runtime}: {found.tokens} greedy tokens after {found.prompts} prompts, "
        f"{found.same_tokens:.1%} of them as transformers chooses, KL {found.kl:.2g} nats per token (limit "
        f"{found.kl_limit:.3g}), largest difference of a log-probability {found.largest_difference:.2g}.",
        highlight=False,
    )
    if found.kl_limit > WIDE:
        new_console().print(
            "Note: that says little of this model: in transformers, too, it predicts something else once its weights "
            "are rounded to bfloat16.",
            highlight=False,
            style="yellow",
        )


def push_command(
    folder: Folder, repository: Repository, public: Public = False, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Check what is asked for, do it, and print it."""
    check_push(folder, repository)
    from llmprune_cli.cli.screen.progress import progress_on_stderr
    from llmprune_cli.commands.push import upload

    with progress_on_stderr(quiet) as listener:
        result = upload(folder, repository, public, listener)
    (print_json if as_json else print_push)(result)


def print_push(result: PushResult) -> None:
    """Where it is now."""
    console, seen_by = new_console(), "private" if result.private else "public"
    files = f"{len(result.files)} files, {size_text(result.size_bytes)}"
    pushed = Text.assemble("Pushed ", (result.folder, "bold"), f": {files}, {seen_by}, to")
    console.print(pushed, soft_wrap=True)
    console.print(result.url, highlight=False, soft_wrap=True)
    if result.removed:
        console.print(f"Removed there: {', '.join(result.removed)}.", highlight=False, soft_wrap=True)
