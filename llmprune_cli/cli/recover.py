"""`llmprune recover`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from llmprune_cli.cli.export import print_push
from llmprune_cli.cli.parameters import AsJson, Quiet, takes
from llmprune_cli.cli.screen.table_parts import NARROW, new_console, number_text, print_json
from llmprune_cli.commands.recover.request import RecoverRequest, check_recover
from llmprune_cli.heal import ON_ANSWERS
from llmprune_cli.heal.options import Healed, Healing, Teaching
from llmprune_cli.options import ModelReference
from llmprune_cli.sizes import size_text
from llmprune_cli.startup.loading import loading
from llmprune_cli.text.names import with_split

if TYPE_CHECKING:
    from llmprune_cli.heal.figures import HeldOut
    from llmprune_cli.report.json_results import RecoverResult


@takes("dtype")
def recover_command(
    model: ModelReference,
    healing: Healing,
    teaching: Teaching,
    delivery: Healed,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check what is asked for, do it, and print it."""
    request = RecoverRequest(model, healing, teaching, delivery)
    check_recover(request)
    with loading():
        from llmprune_cli.cli.screen.progress import progress_on_stderr
        from llmprune_cli.commands.recover.recovery import recover

    with progress_on_stderr(quiet) as listener:
        result = recover(request, listener)
    if result is not None:
        (print_json if as_json else print_recover)(result)


def print_recover(result: RecoverResult) -> None:
    """What `recover` shows."""
    print_recovery(result)
    wrote = Text.assemble("Wrote ", (result.output, "bold"), f" in {result.seconds:.1f} s.")
    new_console().print(wrote, soft_wrap=True)
    if result.push:
        print_push(result.push)


def print_recovery(result: RecoverResult) -> None:
    """How healing went."""
    console = new_console()
    console.print(f"Held-out text of {with_split(result.dataset, result.split)}", highlight=False)
    table = Table(**NARROW)
    for label in ("tokens", "KL divergence, nats", "perplexity", "bits per byte"):
        table.add_column(label, justify="right")
    table.add_row("0", *_figures(result.before))
    for judged in result.curve:
        table.add_row(f"{judged.tokens:,}", *_figures(judged.held_out))
    table.add_section()
    table.add_row("written", *_figures(result.after))
    console.print(table)
    console.print(
        f"Trained {result.trained_parameters:,} parameters on {result.tokens:,} tokens of {result.origin} in "
        f"{result.steps:,} step{'s' if result.steps != 1 else ''} ({_learned(result)}, learning rate "
        f"{result.learning_rate:.3g}), with {result.teacher} "
        f"as its {result.teacher_mode} teacher; {size_text(result.peak_memory_bytes)} at most.",
        highlight=False,
    )
    if result.tried_rates:
        tried = sorted(result.tried_rates, key=lambda trial: trial.learning_rate)
        losses = [f"{own.learning_rate:g}: {'NaN' if own.loss is None else f'{own.loss:.4f}'}" for own in tried]
        console.print(
            f"The learning rate was found by {tried[0].steps} steps each (loss on held-out text): {', '.join(losses)}.",
            highlight=False,
        )
    if result.stopped_early:
        console.print(f"Stopped early: held-out text gained nothing more after {result.best_tokens:,} tokens.")
    if not result.is_better:
        console.print("Note: held-out text gained nothing from it.", style="yellow")


def _learned(result: RecoverResult) -> str:
    if result.mode == "blocks":
        return "layer by layer"
    learned = f"{result.loss} + {result.hidden_weight:g} × hidden" if result.hidden_weight else result.loss
    of_answers = f"{learned}, of the {result.learned_tokens:,} that an assistant says"
    return of_answers if result.loss_on == ON_ANSWERS else learned


def _figures(figures: HeldOut) -> tuple[str, ...]:
    return f"{figures.kl:.4f}", number_text(figures.perplexity), f"{figures.bits_per_byte:.4f}"
