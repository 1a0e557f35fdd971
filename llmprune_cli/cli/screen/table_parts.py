"""Parts of tables that several commands show, and JSON on stdout."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmprune_cli.sizes import size_text

if TYPE_CHECKING:
    from llmprune_cli.report.json_results import ModelSummary
    from llmprune_cli.report.runtimes import RuntimeFit
    from llmprune_cli.run.speed.figures import SpeedResult

WIDTH = 80  # columns, where there is no terminal
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
    """Print a result as one JSON document; a number that JSON lacks becomes null."""
    from llmprune_cli.report.json_results import to_json

    sys.stdout.write(to_json(result) + "\n")
    sys.stdout.flush()  # here, where a reader that went away is no bug of ours


def new_console() -> Console:
    """A console on stdout, as wide as the terminal; elsewhere as wide as most are. It shows brackets as they are."""
    is_terminal = sys.stdout.isatty()
    return Console(soft_wrap=not is_terminal, width=None if is_terminal else WIDTH, markup=False)


def totals_table(before: ModelSummary, after: ModelSummary | None) -> Table:
    """Parameters, bytes, and the cache of a token."""
    table = Table("total", title="\nTotals", title_justify="left", **NARROW)
    table.add_column("before" if after else "", justify="right", no_wrap=True)
    if after:
        table.add_column("after", justify="right", no_wrap=True)
        table.add_column("removed", justify="right", no_wrap=True)
    rows: dict[str, tuple[str, Callable[[float], str]]] = {
        "parameters": ("parameters", lambda count: f"{count:,}"),
        "size": ("size_bytes", size_text),
        "KV cache per token": ("kv_cache_bytes_per_token", size_text),
    }
    for label, (name, show) in rows.items():
        old, new = getattr(before, name), getattr(after, name, 0)
        if old is None:
            table.add_row(label, "unknown", *(["unknown", ""] if after else []))
            continue
        table.add_row(label, show(old), *([show(new), f"{100 * (1 - new / old) if old else 0:.1f}%"] if after else []))
    return table


def print_deviations(console: Console, deviations: tuple[str, ...]) -> None:
    """Where the widths differ from what was asked for."""
    for deviation in deviations:
        console.print(f"Note: {deviation}", highlight=False, style="yellow")


def print_runtimes(console: Console, runtimes: tuple[RuntimeFit, ...]) -> None:
    """Which stock software loads the model."""
    table = Table("runtime", "loads it", "", title="\nWhere it runs", title_justify="left", **NARROW)
    for fit in runtimes:
        table.add_row(fit.runtime, "yes" if fit.loads else "no", fit.note)
    console.print(table)


NARROW: dict[str, Any] = {
    "box": SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "pad_edge": False,
    "show_edge": False,
}  # of tables that fit into 80 columns
BREAKS = ("./", "./-_")  # after which a name may go on in the next line, as long as its parts fit; else


def folded(name: str, width: int) -> str:
    """A name in lines of at most a width, broken where its parts end; a longer part stays whole."""
    parts = next(
        (p for p in (_parts(name, b) for b in BREAKS) if max(map(len, p)) <= width - 2), _parts(name, BREAKS[-1])
    )
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _parts(name: str, breaks: str) -> list[str]:
    return re.findall(f"[^{re.escape(breaks)}]*[{re.escape(breaks)}]|[^{re.escape(breaks)}]+$", name) or [name]


def count_text(count: float) -> str:
    """A number of parameters for people: 28.3M."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 999.5:
            return f"{count:.0f}{unit}" if not unit or abs(count) >= 100 else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: 13-15, 25."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def number_text(value: float) -> str:
    """A perplexity for people."""
    return f"{value:,.2f}" if value < 1e9 else f"{value:.3g}"


def speed_text(own: SpeedResult) -> str:
    """How many times as fast a model is, and how that was timed."""
    return (
        f"{own.speedup:.2f} times as fast: {own.prompt_tokens:,} tokens read and {own.new_tokens:,} written, batch "
        f"{own.batch}, {own.device}, {own.dtype}; median of {own.rounds} turns."
    )
