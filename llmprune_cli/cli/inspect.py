"""`llmprune inspect`."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from llmprune_cli.cli.parameters import COMMON, AsJson, Quiet, takes
from llmprune_cli.cli.screen.progress import progress_on_stderr
from llmprune_cli.cli.screen.sensitivity import print_sensitivity
from llmprune_cli.cli.screen.table_parts import (
    NARROW,
    WIDTH_LABELS,
    count_text,
    folded,
    new_console,
    print_deviations,
    print_json,
    print_runtimes,
    totals_table,
)
from llmprune_cli.commands.inspect.request import LEFT_OUT, Measured, check_inspect
from llmprune_cli.options import ModelReference
from llmprune_cli.sizes import size_text
from llmprune_cli.startup.config_checks import ENCODERS
from llmprune_cli.startup.loading import loading
from llmprune_cli.vocabulary.request import STEP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmprune_cli.report.json_results import InspectResult, ModelSummary, TensorRow, VerifyResult
    from llmprune_cli.vocabulary.figures import VocabularySummary

LEAST_NAME = 20  # characters of a tensor's name in a line
MOST_NUMBERS = 12  # characters of layer numbers in a line

Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Hold a folder that llmprune wrote against its checksums, and no more.",
        rich_help_panel=COMMON,
    ),
]
Sensitivity = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="Measure on text what a part of each layer is worth, and keep it for prune.",
        rich_help_panel=COMMON,
    ),
]


def _list_families(wanted: bool) -> None:
    """Show which families there are, and end."""
    if not wanted:
        return
    with loading():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    console, names = new_console(), sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {*ENCODERS})
    console.print(f"transformers knows {len(names)} families of causal language models:")
    console.print(", ".join(names), highlight=False, soft_wrap=False)
    console.print("Any of them may be tried: what is not right on a small twin is refused before anything is written.")
    raise typer.Exit


def _list_formats(wanted: bool) -> None:
    """Show which formats `export` writes, and end."""
    if not wanted:
        return
    with loading():
        from llmprune_cli.formats.registry import FORMATS, load_format

    table = Table("format", "runs in", "dtypes", **NARROW)
    for name in FORMATS:
        form = load_format(name)
        table.add_row(name, form.runs_in, ", ".join(form.dtypes))
    new_console().print(table)
    raise typer.Exit


Families = Annotated[
    bool,
    typer.Option(
        "--families",
        help="List the families of models, and no more.",
        rich_help_panel=COMMON,
        is_eager=True,
        callback=_list_families,
    ),
]
Formats = Annotated[
    bool,
    typer.Option(
        "--formats",
        help="List the formats of export, and no more.",
        rich_help_panel=COMMON,
        is_eager=True,
        callback=_list_formats,
    ),
]


@takes(*LEFT_OUT)
def inspect_command(
    model: ModelReference,
    measured: Measured,
    verify: Verify = False,
    sensitivity: Sensitivity = False,
    families: Families = False,
    formats: Formats = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check what is asked for, do it, and print it."""
    from llmprune_cli.commands.inspect import inspect, verify_folder

    check_inspect(model, measured, verify, sensitivity)
    if sensitivity:
        _measure(model, measured, as_json, quiet)
        return
    if not verify:
        with progress_on_stderr(quiet):
            result = inspect(model, measured.widths, measured.tokens)
        (print_json if as_json else print_inspect)(result)
        return
    verified = verify_folder(Path(model.name))
    (print_json if as_json else print_verify)(verified)


def _measure(model: ModelReference, asked: Measured, as_json: bool, quiet: bool) -> None:
    with loading():
        from llmprune_cli.commands.inspect.sensitivity import sensitivity
        from llmprune_cli.commands.recipe import as_words, recipe_of, trusted

    with progress_on_stderr(quiet) as listener:
        result = sensitivity(model, asked, listener)
    if as_json:
        print_json(result)
    else:
        print_sensitivity(result, as_words({**recipe_of(asked.request(model), asked.choice, None), **trusted(model)}))


def print_inspect(result: InspectResult) -> None:
    """Tables of `inspect`."""
    console = new_console()
    revision = f" @ {result.revision}" if result.revision else ""
    console.print(Text.assemble((result.model, "bold"), f"{revision}  {result.model_type}"))
    console.print(modules_table(result.before, result.after, console.width))
    columns = ("prunable width", "size", *(["after"] if result.after else []), "legal values")
    widths = Table(title="\nWidths", title_justify="left", **NARROW)
    for place, head in enumerate(columns):
        is_number = 0 < place < len(columns) - 1
        widths.add_column(head, justify="right" if is_number else "left", no_wrap=is_number)
    for name, legal in result.prunable.items():
        after = [f"{getattr(result.after.widths, name):,}"] if result.after else []
        widths.add_row(WIDTH_LABELS[name], f"{getattr(result.before.widths, name):,}", *after, legal)
    _add_vocabulary(widths, result.vocabulary, with_after=result.after is not None)
    console.print(widths)
    console.print(totals_table(result.before, result.after))
    if result.tied_embeddings:
        console.print("Input and output embeddings are tied: one tensor, counted once.")
    console.print(_what_tokens_weigh(result.vocabulary))
    if result.dropped:
        console.print(f"Stored but unused: {', '.join(result.dropped[:5])}{' …' if len(result.dropped) > 5 else ''}")
    if result.renamed:
        stored, name = result.renamed[0]
        console.print(f"Stored under older names: {len(result.renamed):,} tensors ({stored} is {name} …).")
    print_runtimes(console, result.runtimes)
    if not result.has_weights:
        console.print("No weights here: shapes follow from config.json.")
    print_deviations(console, result.deviations)


def _add_vocabulary(widths: Table, own: VocabularySummary, with_after: bool) -> None:
    legal = f"{own.legal} to {own.tokens:,}, multiples of {STEP}" if not own.refused else f"no: {own.refused}"
    widths.add_row("vocabulary", f"{own.tokens:,}", *([f"{own.after or own.tokens:,}"] if with_after else []), legal)


def _what_tokens_weigh(own: VocabularySummary) -> str:
    """How large a part of the model the rows of tokens are, and what half of them, or those that go, come to."""
    size = own.after or own.tokens // 2
    saved, share = own.saved_by(size)
    told = f"Rows of {own.tokens:,} tokens are {count_text(own.parameters)} parameters, {100 * own.share:.1f}% of all"
    if own.refused:
        return f"{told}."
    fewer = f"--vocab-size {size:,}" if own.after else "--vocab-size 50%"
    return f"{told}; {own.must_stay:,} must stay. {fewer} saves {count_text(saved)} ({100 * share:.1f}%)."


def print_verify(result: VerifyResult) -> None:
    """What `inspect --verify` found."""
    parameters = f", {result.parameters:,} parameters" if result.parameters is not None else ""
    said = f" is what was written: {result.files} files, {size_text(result.size_bytes)}{parameters}."
    new_console().print(Text.assemble((result.folder, "bold"), said))


def modules_table(before: ModelSummary, after: ModelSummary | None, width: int) -> Table:
    """Tensors, folded over layers.

    Args:
        width: of the terminal; names go on in the next line where they would not fit.
    """
    dtypes = {row.dtype for row in before.tensors}
    title = f"Modules ({dtypes.pop()})" if len(dtypes) == 1 else "Modules"
    with_dtype = title == "Modules"
    total, rows = (after or before).parameters, []
    for old, new in _paired(before.tensors, after.tensors if after else before.tensors):
        shapes = [_shape(old)] + ([_shape(new) if new else "gone"] if after else [])
        parameters = new.parameters if new else 0
        counts = [count_text(parameters), f"{100 * parameters / total:.1f}%"]
        rows.append([old.template, old.layers, *([old.dtype] if with_dtype else []), *shapes, *counts])
    heads = ["tensor", "layers", *(["dtype"] if with_dtype else []), *(["before", "after"] if after else ["shape"])]
    heads += ["parameters", "share"]
    taken = sum(max(len(head), *(len(row[place]) for row in rows)) + 2 for place, head in enumerate(heads) if place)
    layers = max(len(row[1]) for row in rows)
    if layers > MOST_NUMBERS:  # of many layers by turns, which may go on in the next line
        taken -= layers - MOST_NUMBERS
    table = Table(title=title, title_justify="left", **NARROW)
    for head in heads:
        table.add_column(head, justify="left" if head in ("tensor", "dtype") else "right", no_wrap=True)
    for row in rows:
        table.add_row(folded(row[0], max(width - taken - 2, LEAST_NAME)), _in_lines(row[1]), *row[2:])
    return table


def _in_lines(numbers: str) -> str:
    """Ranges of layers, so many in a line as fit."""
    lines = [""]
    for part in numbers.split(","):
        if lines[-1] and len(lines[-1]) + len(part) + 1 > MOST_NUMBERS:
            lines.append("")
        lines[-1] += f",{part}" if lines[-1] else part
    return ",\n".join(lines)


def _paired(before: Sequence[TensorRow], after: Sequence[TensorRow]) -> Iterator[tuple[TensorRow, TensorRow | None]]:
    """Rows of the same tensors before and after; None where all their layers went."""
    for template in dict.fromkeys(row.template for row in before):
        old, new = ([row for row in rows if row.template == template] for rows in (before, after))
        yield from zip_longest(old, new[: len(old)])


def _shape(row: TensorRow) -> str:
    return " × ".join(map(str, row.shape))
