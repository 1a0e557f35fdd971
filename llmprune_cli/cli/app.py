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
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


# What Typer raises for wrong usage, in whichever package its copy of click is.
WrongUsage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


# What other programs call our options.
MEANT = {
    **dict.fromkeys(("--sparsity", "--ratio", "--prune-ratio", "--amount", "--pruning-amount"), "--pruning-ratio"),
    **dict.fromkeys(("--output-dir", "--out", "--save-dir", "--save-path", "--save"), "--output"),
    **dict.fromkeys(("--num-layers", "--n-layers"), "--layers"),
    **dict.fromkeys(("--calibration-data", "--calib", "--calibration-dataset"), "--calibration"),
    **dict.fromkeys(("--method", "--criterion"), "--importance"),
    **dict.fromkeys(("--torch-dtype", "--precision"), "--dtype"),
    **dict.fromkeys(("--seqlen", "--context", "--ctx"), "--max-seq-len"),
    **dict.fromkeys(("--force", "-f", "-y"), "--overwrite"),
}


def run(arguments: list[str] | None) -> None:
    """Run the command line and exit; wrong usage is told in plain lines, which scripts can read, not in a box.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    try:
        code = app(arguments, prog_name="llmprune", standalone_mode=False)
    except WrongUsage as error:
        if (meant := MEANT.get(getattr(error, "option_name", ""))) is not None:
            error.possibilities = [meant]
        error.show()
        raise SystemExit(error.exit_code) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"[bold]llmprune {line}[/bold]" for line in lines)


INSPECTED = _examples(
    "inspect meta-llama/Llama-3.1-8B", "inspect meta-llama/Llama-3.1-8B --mlp 25%", "inspect pruned --verify"
)
PRUNED = _examples(
    "prune meta-llama/Llama-3.1-8B --target 85% -o pruned",
    "prune meta-llama/Llama-3.1-8B --mlp 25% --calibration chat.jsonl -o leaner",
    "prune meta-llama/Llama-3.1-8B --target 4GiB --dry-run",
)
RECOVERED = _examples(
    "recover pruned --tokens 1M -o healed",
    "recover pruned --teacher meta-llama/Llama-3.1-8B --text chat.jsonl -o healed",
    "recover pruned --lora 16 --teacher-mode streamed -o healed",
)
EVALUATED = _examples(
    "eval meta-llama/Llama-3.1-8B pruned --limit 20", "eval pruned --dataset own.txt", "eval a b c --max-seq-len 2048"
)
EXPORTED = _examples(
    "export pruned --format gguf --dtype q8_0 -o pruned-gguf",
    "export pruned --dtype fp16 -o pruned-f16",
    "export pruned --format onnx -o pruned-onnx",
)
app.command("inspect", epilog=INSPECTED)(inspect_command)
app.command("prune", epilog=PRUNED)(prune_command)
app.command("recover", epilog=RECOVERED)(recover_command)
app.command("eval", epilog=EVALUATED)(eval_command)
app.command("export", epilog=EXPORTED)(export_command)


@app.command("env")
def env_command() -> None:
    """Show versions and devices, for bug reports."""
    from llmprune_cli.startup.environment import describe_environment

    found = describe_environment()
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:<{width}}  {value}")


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
