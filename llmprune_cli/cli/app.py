"""The command line: its commands, and what holds for all of them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.text import Text
from typer import rich_utils
from typer.core import TyperGroup

from llmprune_cli import __version__
from llmprune_cli.processes import is_first

SHARED_COMMANDS = ("prune", "sweep", "recover", "eval")  # in whose work all processes of a run take part


@dataclass(frozen=True)
class Command:
    """A command that is imported when it is called; the list of all commands needs no more than this."""

    module: str
    function: str
    help: str
    examples: tuple[str, ...]

    def load(self, name: str) -> Any:
        """The command, with its options."""
        rich_utils.highlighter = _WholeNames()
        alone = typer.Typer(add_completion=False, context_settings=CONTEXT, rich_markup_mode="rich")
        examples = "Examples:\n\n" + "\n\n".join(f"[bold]llmprune {line}[/bold]" for line in self.examples)
        function = getattr(import_module(self.module), self.function)
        alone.command(name, help=self.help, epilog=examples)(function)
        return typer.main.get_command(alone)


class _WholeNames(rich_utils.OptionHighlighter):
    """The names of an option in several lines where one has no room for them; typer would cut the last one."""

    def __call__(self, text: str | Text) -> Text:
        """Names that are joined by commas, apart."""
        shown = super().__call__(text.replace(",", ", ") if isinstance(text, str) and text.startswith("-") else text)
        shown.overflow = "fold"
        return shown


CONTEXT = {"help_option_names": ["-h", "--help"]}
COMMANDS = {
    "inspect": Command(
        "llmprune_cli.cli.inspect",
        "inspect_command",
        "Show modules, widths and totals from headers and configuration; with a width option, after pruning too.",
        (
            "inspect meta-llama/Llama-3.1-8B --mlp 25%",
            "inspect meta-llama/Llama-3.1-8B --sensitivity --report layers.svg",
            "inspect pruned --verify",
        ),
    ),
    "prune": Command(
        "llmprune_cli.cli.prune",
        "prune_command",
        "Remove channels, heads, neurons, experts and layers, and write a smaller checkpoint.",
        (
            "prune meta-llama/Llama-3.1-8B --target 85% -o pruned",
            "prune meta-llama/Llama-3.1-8B --mlp 25% --calibration chat.jsonl -o leaner",
            "prune meta-llama/Llama-3.1-8B --target-speedup 1.5 --dry-run",
        ),
    ),
    "sweep": Command(
        "llmprune_cli.cli.sweep",
        "sweep_command",
        "Prune to several sizes in one run, and show what each is worth.",
        (
            "sweep meta-llama/Llama-3.1-8B --targets 90%,80%,70%,60% -o sizes",
            "sweep meta-llama/Llama-3.1-8B --mlp 10%,20%,30% --report sizes.svg",
            "sweep meta-llama/Llama-3.1-8B --targets 6B,4GiB -o sizes --keep-models --recover 1M",
        ),
    ),
    "recover": Command(
        "llmprune_cli.cli.recover",
        "recover_command",
        "Heal a pruned model: train it to predict what the unpruned one predicts.",
        (
            "recover pruned --tokens 1M -o healed",
            "recover pruned --teacher meta-llama/Llama-3.1-8B --text chat.jsonl -o healed",
            "recover pruned --lora 16 --teacher-mode streamed -o healed",
        ),
    ),
    "eval": Command(
        "llmprune_cli.cli.evaluate",
        "eval_command",
        "Measure perplexity, bits per byte and answers to tasks, of one model or of several side by side.",
        (
            "eval meta-llama/Llama-3.1-8B pruned --limit 20",
            "eval pruned --dataset own.txt",
            "eval a b c --tasks arc_easy,hellaswag --limit 200",
        ),
    ),
    "export": Command(
        "llmprune_cli.cli.export",
        "export_command",
        "Write a checkpoint in another format, dtype or shard size, and prove it in the runtime that reads it.",
        (
            "export pruned --format gguf --dtype q4_k_m -o pruned-gguf",
            "export pruned --dtype fp16 -o pruned-f16",
            "export pruned --format onnx -o pruned-onnx",
        ),
    ),
    "push": Command(
        "llmprune_cli.cli.export",
        "push_command",
        "Upload a folder that llmprune wrote to the hub, once it is what was written; private by default.",
        (
            "push pruned your-name/pruned",
            "push pruned-gguf your-org/pruned-gguf --public",
            "push healed your-name/healed --json",
        ),
    ),
}


class Commands(TyperGroup):
    """The commands, each imported when it is called: help and the quickest of them need not wait for the others."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the arguments name, with its options."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, COMMANDS[name].load(name) if name in COMMANDS else found, rest


app = typer.Typer(
    name="llmprune",
    cls=Commands,
    help="Prune large language models into smaller dense checkpoints that stock software loads.",
    no_args_is_help=True,
    context_settings=CONTEXT,
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
    **dict.fromkeys(("--seqlen", "--ctx", "--context", "--max-seq-len", "--seq-len"), "--calibration-seq-len"),
    **dict.fromkeys(("--force", "-f", "-y"), "--overwrite"),
}

# How each command calls a text and the length of a window, whatever others call them.
TEXTS = {**dict.fromkeys(("prune", "sweep", "inspect"), "--calibration"), "recover": "--text", "eval": "--dataset"}
LENGTHS = {"recover": "--seq-len", "eval": "--max-seq-len"}


def run(arguments: list[str] | None) -> None:
    """Run the command line and exit; wrong usage is told in plain lines, which scripts can read, not in a box.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    try:
        code = app(arguments, prog_name="llmprune", standalone_mode=False)
    except WrongUsage as error:
        option = getattr(error, "option_name", "")
        given = sys.argv[1:] if arguments is None else arguments
        if (meant := _meant(option, given) or _elsewhere(option, given)) is not None:
            error.possibilities = [meant]
        error.show()
        raise SystemExit(error.exit_code) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _meant(option: str, given: list[str]) -> str | None:
    """What the command calls an option of other programs or commands, where it has such a one."""
    meant, command = MEANT.get(option, option), given[0] if given else ""
    meant = TEXTS.get(command, meant) if meant in TEXTS.values() else meant
    meant = LENGTHS.get(command, meant) if meant == MEANT["--seqlen"] else meant
    return meant if meant != option and _has(command, meant) else None


def _has(command: str, option: str) -> bool:
    return command in COMMANDS and any(option in own.opts for own in COMMANDS[command].load(command).params)


def _elsewhere(option: str, given: list[str]) -> str | None:
    """The one other command that has an option, with it; None where none has, or several have."""
    others = [name for name in COMMANDS if option.startswith("--") and name not in given[:1]]
    owners = [name for name in others if _has(name, option)]
    return f"llmprune {owners[0]} {option}" if len(owners) == 1 else None


def _listed() -> None:
    """Stands in the list of commands for one that is not imported yet."""


for _name, _command in COMMANDS.items():
    app.command(_name, help=_command.help)(_listed)


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
