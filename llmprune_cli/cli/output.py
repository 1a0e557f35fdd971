"""Results to stdout, as tables or as one JSON document; progress and warnings to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from llmprune_cli.family.widths import Widths
    from llmprune_cli.options import Listener
    from llmprune_cli.report.results import (
        CalibrationResult,
        CandidateResult,
        EvalReport,
        ExportResult,
        InspectResult,
        LayerResult,
        ModelSummary,
        PruneResult,
        TensorRow,
        VerifyResult,
    )
    from llmprune_cli.report.runtimes import RuntimeFit
    from llmprune_cli.run.perplexity import RunningPerplexity

BAR_CELLS = 24  # of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
CARD_ROWS = 40  # layers of a deeper model share rows
WIDTH_LABELS = {
    "hidden_size": "hidden size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV groups",
    "head_dim": "head dim",
    "intermediate_size": "intermediate size",
    "moe_intermediate_size": "expert intermediate size",
    "shared_expert_intermediate_size": "shared expert intermediate size",
    "num_experts": "experts",
    "num_hidden_layers": "layers",
}


def print_json(result: Any) -> None:
    """Print a result dataclass as one JSON document; a number that JSON lacks becomes null."""
    json.dump(_plain(asdict(result)), sys.stdout, indent=2)
    sys.stdout.write("\n")
    sys.stdout.flush()  # here, where a reader that went away is no bug of ours


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_inspect(result: InspectResult) -> None:
    """Tables of `inspect`."""
    console = _console()
    revision = f" @ {result.revision}" if result.revision else ""
    console.print(f"[bold]{result.model}[/bold]{revision}  {result.model_type}", highlight=False)
    console.print(_modules(result.before, result.after))
    widths = Table("prunable width", "size", *(["after"] if result.after else []), "legal values", title="Widths")
    for name, legal in result.prunable.items():
        after = [f"{getattr(result.after.widths, name):,}"] if result.after else []
        widths.add_row(WIDTH_LABELS[name], f"{getattr(result.before.widths, name):,}", *after, legal)
    console.print(widths)
    console.print(_totals(result.before, result.after))
    if result.tied_embeddings:
        console.print("Input and output embeddings are tied: one tensor, counted once.")
    if result.dropped:
        console.print(f"Stored but unused: {', '.join(result.dropped[:5])}{' …' if len(result.dropped) > 5 else ''}")
    if result.renamed:
        stored, name = result.renamed[0]
        console.print(f"Stored under older names: {len(result.renamed):,} tensors ({stored} is {name} …).")
    _print_runtimes(console, result.runtimes)
    if not result.has_weights:
        console.print("No weights here: shapes follow from config.json.")
    _print_deviations(console, result.deviations)


def print_prune(result: PruneResult) -> None:
    """Tables of `prune`."""
    console = _console()
    console.print(_modules(result.before, result.after))
    console.print(_width_table(result.before.widths, result.after.widths))
    console.print(_totals(result.before, result.after))
    _print_deviations(console, result.deviations)
    _print_runtimes(console, result.runtimes)
    if result.candidates:
        _print_candidates(console, result.candidates)
    if result.calibration:
        _print_calibration(console, result.calibration, result.protected_layers)
    if result.evaluation:
        print_eval(result.evaluation)
    if result.output:
        console.print(f"Wrote [bold]{result.output}[/bold] in {result.seconds:.1f} s.", highlight=False)
    elif result.evaluation:
        console.print("Nothing was kept: give --output to save the pruned model.")
    else:
        console.print("Dry run: nothing was written.")


def _print_candidates(console: Console, candidates: tuple[CandidateResult, ...]) -> None:
    names = [name for name in WIDTH_LABELS if len({getattr(c.widths, name) for c in candidates}) > 1]
    table = Table(title="Candidates, best first")
    for label in (*(WIDTH_LABELS[name] for name in names), "parameters", "KL, nats"):
        table.add_column(label, justify="right")
    for candidate in candidates:
        sizes = [f"{getattr(candidate.widths, name):,}" for name in names]
        table.add_row(*sizes, f"{candidate.parameters:,}", f"{candidate.kl:.3f}")
    console.print(table)


def _print_calibration(console: Console, card: CalibrationResult, protected: tuple[int, ...]) -> None:
    console.print(_layer_table(card.layers, protected))
    table = Table(title=f"Held-out text of {card.dataset} ({card.split})")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("perplexity", _number(card.perplexity_before), _number(card.perplexity_after))
    table.add_row("KL divergence", "", f"{card.kl:.3f} nats")
    speeds = (card.prefill_tokens_per_second_before, card.prefill_tokens_per_second_after)
    table.add_row(f"prefill tokens per second, float32, {card.device}", *(f"{speed:,.0f}" for speed in speeds))
    console.print(table)
    console.print(f"Calibrated on {card.tokens:,} tokens of {card.origin}.", highlight=False)
    console.print("Speeds are of one layer at a time, without loading it.", highlight=False)


def _layer_table(layers: tuple[LayerResult, ...], protected: tuple[int, ...]) -> Table:
    """A row for each layer, or for as many consecutive ones as keep the table short, with their mean errors."""
    each = -(-len(layers) // CARD_ROWS)
    table = Table(title="Layers", caption=f"Each row shows the means over {each} layers." if each > 1 else None)
    refitted = any(layer.refit_error is not None for layer in layers)
    names = ("removal error", "refit error") if refitted else ()
    for name in ("layer", *names, "stream error"):
        table.add_column(name, justify="right")
    table.add_column("", min_width=BAR_CELLS, no_wrap=True)
    rows = [layers[first : first + each] for first in range(0, len(layers), each)]
    streams = [_mean([layer.stream_error for layer in row]) for row in rows]
    worst = max((error for error in streams if math.isfinite(error)), default=0.0)
    for row, stream in zip(rows, streams, strict=True):
        numbers = str(row[0].layer) if len(row) == 1 else f"{row[0].layer}-{row[-1].layer}"
        cells = []
        if refitted:
            removal = [layer.removal_error for layer in row if layer.removal_error is not None]
            refit = [layer.refit_error for layer in row if layer.refit_error is not None]
            kept = "kept" if {layer.layer for layer in row} <= {*protected} else "-"
            cells = [_percent(_mean(errors)) if errors else kept for errors in (removal, refit)]
        table.add_row(numbers, *cells, _percent(stream), _bar(stream, worst))
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share < 100 else f"{100 * share:.2g}%"


def _bar(value: float, longest: float) -> str:
    """A bar in eighths of a cell; whatever is not finite is longer than all others."""
    share = value / longest if math.isfinite(value) and longest else float(not math.isfinite(value))
    eighths = round(8 * BAR_CELLS * share)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def print_eval(report: EvalReport) -> None:
    """Table of `eval`, one column for each model."""
    table = Table(title=f"Perplexity on {report.dataset} ({report.split})")
    table.add_column("")
    for result in report.results:
        table.add_column(result.model, justify="right", overflow="fold")
    rows = {
        "perplexity": [_number(r.perplexity) for r in report.results],
        "windows × tokens": [f"{r.windows} × {r.max_seq_len}" for r in report.results],
        "tokens": [f"{r.tokens:,}" for r in report.results],
        "parameters": [f"{r.parameters:,}" for r in report.results],
        "size": [_size(r.size_bytes) for r in report.results],
        "time": [f"{r.seconds:.1f} s" for r in report.results],
        "tokens per second": [f"{r.tokens_per_second:,.0f}" for r in report.results],
        "peak memory so far": [_size(r.peak_memory_bytes) for r in report.results],
    }
    for label, values in rows.items():
        table.add_row(label, *values)
    _console().print(table)


def print_verify(result: VerifyResult) -> None:
    """What `inspect --verify` found."""
    parameters = f", {result.parameters:,} parameters" if result.parameters is not None else ""
    _console().print(
        f"[bold]{result.folder}[/bold] is what was written: {result.files} files, {_size(result.size_bytes)}"
        f"{parameters}.",
        highlight=False,
    )


def print_export(result: ExportResult) -> None:
    """Summary of `export`."""
    _console().print(
        f"Wrote [bold]{result.output}[/bold]: {result.format}, {result.dtype}, {result.parameters:,} parameters, "
        f"{_size(result.size_bytes)}, {len(result.files)} files.",
        highlight=False,
    )
    if result.note:
        _console().print(f"Note: {result.note}", highlight=False, style="yellow")
    found = result.verification
    if found is None:
        _console().print(f"Not verified: {result.unverified}.", highlight=False)
        return
    _console().print(
        f"Verified with {found.runtime}: {found.tokens} greedy tokens after {found.prompts} prompts, "
        f"{found.same_tokens:.1%} of them as transformers chooses, KL {found.kl:.2g} nats per token (limit "
        f"{found.kl_limit:g}), largest difference of a log-probability {found.largest_difference:.2g}.",
        highlight=False,
    )


def _console() -> Console:
    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)


def _modules(before: ModelSummary, after: ModelSummary | None) -> Table:
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


def _width_table(before: Widths, after: Widths) -> Table:
    table = Table("width", title="Widths")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, label in WIDTH_LABELS.items():
        if not getattr(before, name):
            continue
        table.add_row(label, f"{getattr(before, name):,}", f"{getattr(after, name):,}")
    return table


def _totals(before: ModelSummary, after: ModelSummary | None) -> Table:
    table = Table("total", title="Totals")
    table.add_column("before" if after else "", justify="right")
    if after:
        table.add_column("after", justify="right")
        table.add_column("removed", justify="right")
    rows: dict[str, tuple[str, Callable[[float], str]]] = {
        "parameters": ("parameters", lambda count: f"{count:,}"),
        "size": ("size_bytes", _size),
        "KV cache per token": ("kv_cache_bytes_per_token", _size),
    }
    for label, (name, show) in rows.items():
        old, new = getattr(before, name), getattr(after, name, 0)
        table.add_row(label, show(old), *([show(new), f"{100 * (1 - new / old) if old else 0:.1f}%"] if after else []))
    return table


def _print_deviations(console: Console, deviations: tuple[str, ...]) -> None:
    for deviation in deviations:
        console.print(f"Note: {deviation}", highlight=False, style="yellow")


def _print_runtimes(console: Console, runtimes: tuple[RuntimeFit, ...]) -> None:
    table = Table("runtime", "takes it", "", title="Where it runs")
    for fit in runtimes:
        table.add_row(fit.runtime, "yes" if fit.loads else "no", fit.note)
    console.print(table)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e9 else f"{value:.3g}"


@contextmanager
def progress_on_stderr() -> Iterator[Listener]:
    """A listener that draws progress bars on stderr."""
    from llmprune_cli.options import Listener

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bars = Progress(
        *columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )
    with ExitStack() as started:
        current: list[Any] = []

        def stage(name: str, length: int) -> None:
            if not current:
                started.enter_context(bars)
            current[:] = [bars.add_task(name, total=length, note="")]

        def advance(amount: int) -> None:
            bars.advance(current[0], amount)

        def perplexity(_: str, state: RunningPerplexity) -> None:
            speed = state.tokens / max(state.seconds, 1e-9)
            note = f"perplexity {_number(state.perplexity)}, {speed:,.0f} tokens/s"
            bars.update(current[0], completed=state.windows_done, note=note)

        def warn(message: str) -> None:
            console.print(f"Warning: {message}", style="yellow", highlight=False)

        yield Listener(stage, advance, warn, perplexity)
