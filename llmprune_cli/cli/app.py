"""The command line: its commands, and what holds for all of them."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from llmprune_cli import __version__
from llmprune_cli.cli.evaluate import eval_command
from llmprune_cli.cli.export import export_command
from llmprune_cli.cli.inspect import inspect_command
from llmprune_cli.cli.prune import prune_command
from llmprune_cli.cli.recover import recover_command
from llmprune_cli.processes import is_first

SHARED_COMMANDS = ("prune", "recover", "eval")  # in whose work all processes of a run take part

app = typer.Typer(
    name="llmprune",
    help="Prune large language models into smaller dense checkpoints that stock software loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


# What Typer raises for wrong usage, in whichever package its copy of click is.
WrongUsage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(arguments: list[str] | None) -> None:
    """Run the command line and exit; wrong usage is told in plain lines, which scripts can read, not in a box.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    try:
        code = app(arguments, prog_name="llmprune", standalone_mode=False)
    except WrongUsage as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _example(*lines: str) -> str:
    return "Example: " + "; ".join(f"[bold]llmprune {line}[/bold]" for line in lines)


app.command("inspect", epilog=_example("inspect meta-llama/Llama-3.1-8B --pruning-ratio 0.5"))(inspect_command)
app.command("prune", epilog=_example("prune meta-llama/Llama-3.1-8B --target-params 6B --output pruned"))(prune_command)
app.command("recover", epilog=_example("recover pruned --tokens 1M --output healed"))(recover_command)
app.command("eval", epilog=_example("eval pruned --compare meta-llama/Llama-3.1-8B --limit 20"))(eval_command)
app.command("export", epilog=_example("export pruned --format gguf --dtype q8_0 --output pruned-gguf"))(export_command)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune large language models into smaller dense checkpoints that stock software loads."""
    if context.invoked_subcommand not in SHARED_COMMANDS and not is_first():
        raise typer.Exit
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
