"""`llmprune sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text as Words

from llmprune_cli.cli.parameters import AsJson, Quiet, takes
from llmprune_cli.cli.screen.table_parts import (
    NARROW,
    count_text,
    new_console,
    number_text,
    print_json,
)
from llmprune_cli.commands.sweep.request import LEFT_OUT, Sweep, check_sweep
from llmprune_cli.options import ModelReference
from llmprune_cli.sizes import size_text
from llmprune_cli.startup.loading import loading
from llmprune_cli.text.names import short_name

if TYPE_CHECKING:
    from llmprune_cli.report.json_results import SweepPoint, SweepResult

# Widths that have a column where they vary.
SHAPES = {
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV",
    "intermediate_size": "neurons",
    "moe_intermediate_size": "expert\nneurons",
    "num_experts": "experts",
    "num_hidden_layers": "layers",
}
MOST_SHAPES = 3  # columns of widths beside which the others fit into 80; more of them are listed below the table
HEALED_SHAPES = 2  # beside one more figure
METHOD = ("refit", "seed", "compute_dtype")  # what a plan leaves to be said
SHORT, TENS = 1e4, 10  # a perplexity from which on, and a size below which, digits behind the first few are left out


@takes(*LEFT_OUT)
def sweep_command(model: ModelReference, asked: Sweep, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check what is asked for, do it, and print it."""
    check_sweep(model, asked)
    with loading():
        from llmprune_cli.cli.screen.progress import progress_on_stderr
        from llmprune_cli.commands.sweep.curve import sweep

    with progress_on_stderr(quiet) as listener:
        result = sweep(model, asked, listener)
    if result is not None:
        if as_json:
            print_json(result)
        else:
            print_sweep(result, model, asked)


def print_sweep(result: SweepResult, model: ModelReference, asked: Sweep) -> None:
    """What `sweep` shows.

    Args:
        model, asked: which commands that go on from here need, too.
    """
    console = new_console()
    points = (result.dense, *result.points)
    shapes = {name: head for name, head in SHAPES.items() if len({getattr(p.widths, name) for p in points}) > 1}
    is_healed = any(point.before_healing for point in points)
    fits = len(shapes) <= (HEALED_SHAPES if is_healed else MOST_SHAPES)
    console.print(_table(points, shapes if fits else {}))
    for point in () if fits else points:
        sizes = (f"{getattr(point.widths, name):,} {head}".replace("\n", " ") for name, head in shapes.items())
        console.print(f"{point.name}: {', '.join(sizes)}", highlight=False)
    name, held_out = short_name(result.dataset), result.held_out_tokens
    if is_healed:
        tokens = max(point.healed_tokens for point in points)
        console.print(f"Healed on {tokens:,} tokens each, without those that are judged.", highlight=False)
    console.print(f"Fitted on {result.tokens:,} tokens of {name}, judged on {held_out:,} others.", highlight=False)
    spread = max(point.prefill_spread for point in points)
    console.print("KL: nats a token from the unpruned model.", highlight=False)
    pace = f"Tokens/s: of text that is read; half of its windows are within ±{spread:.0%} of it."
    console.print(pace, highlight=False)
    if result.output is None:
        console.print("Nothing was kept: --output DIR keeps the plans, --keep-models the models, too.")
        return
    wrote = Words.assemble("Wrote ", (result.output, "bold"), ". Next, with the size that you choose:")
    console.print(wrote, soft_wrap=True)
    for line in _next(result, model, asked):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _table(points: tuple[SweepPoint, ...], shapes: dict[str, str]) -> Table:
    """A row for each size, with columns for some widths."""
    table = Table("", **{**NARROW, "box": None})
    is_healed = any(point.before_healing for point in points)
    kl = ("KL,\npruned", "KL,\nhealed") if is_healed else ("KL",)
    for head in ("parameters", "size", *shapes.values(), "perplexity", "bits/\nbyte", *kl, "tokens\n/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in points:
        before = (point.before_healing or point,) if is_healed else ()
        table.add_row(
            point.name,
            count_text(point.parameters),
            _bytes(point.size_bytes),
            *(f"{getattr(point.widths, name):,}" for name in shapes),
            number_text(point.perplexity) if point.perplexity < SHORT else f"{point.perplexity:.3g}",
            f"{point.bits_per_byte:.3f}",
            *(f"{own.kl:.3f}" for own in (*before, point)),
            f"{point.prefill_tokens_per_second:,.0f}",
        )
    return table


def _bytes(count: int) -> str:
    """A size in whole units."""
    number, unit = size_text(count).split()
    return f"{float(number):.0f} {unit}" if float(number) >= TENS else f"{float(number):.2g} {unit}"


def _next(result: SweepResult, model: ModelReference, asked: Sweep) -> Iterator[str]:
    """Commands that go on from here."""
    from llmprune_cli.commands.recipe import as_words, given

    point, folder = result.points[0], Path(result.output or "")
    own = {"model": result.model, **given(model)}
    if point.folder is not None:
        yield f"llmprune eval {as_words(own, str(folder / point.folder))}"
    elif point.plan is not None:
        method = {name: value for name, value in given(asked.choice).items() if name in METHOD}
        healed = {"recover": asked.delivery.recover} if asked.delivery.recover else {}
        planned = as_words({**own, "plan": str(folder / point.plan), **method, **given(asked.text), **healed})
        yield f"llmprune prune {planned} -o pruned"
