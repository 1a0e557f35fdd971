"""What models answered, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from llmprune_cli.cli.screen.table_parts import NARROW, folded, number_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmprune_cli.report.json_results import EvalResult
    from llmprune_cli.run.questions.figures import TaskResult

HEADS = ("questions", "value", "±", "Δ")
LEAST_NAME = 12  # characters of a task's name in a line, and of a model's


def answers_table(results: Sequence[EvalResult], width: int) -> Table:
    """Figures of tasks with their standard errors, below each the models; Δ is the difference from the first one.

    Of a group of tasks that has figures of its own, these alone are shown.
    """
    first = {(own.task, own.metric): own for own in results[0].tasks}
    shown = [key for key, own in first.items() if own.part_of not in {task for task, _ in first}]
    rows = [_rows(key, results, first[key]) for key in shown]
    metrics = max(len("metric"), *(len(metric) for _, metric in shown))
    taken = metrics + sum(max(len(h), *(len(row[h]) for own in rows for row in own)) + 2 for h in HEADS)
    table = Table("task", "metric", "model", title="Tasks", title_justify="left", **NARROW)
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    room = max((width - taken - 6) // 2, LEAST_NAME)
    for (task, metric), own in zip(shown, rows, strict=True):
        for number, row in enumerate(own):
            name = folded(results[number].model, room)
            label = (folded(task, room), metric) if number == 0 else ("", "")
            table.add_row(*label, name, *(row[head] for head in HEADS))
    return table


def _rows(key: tuple[str, str], results: Sequence[EvalResult], first: TaskResult) -> list[dict[str, str]]:
    """Cells of each model for one figure, by the column's head."""
    rows = []
    for number, result in enumerate(results):
        own = next((found for found in result.tasks if (found.task, found.metric) == key), None)
        if own is None:
            rows.append(dict.fromkeys(HEADS, ""))
            continue
        rows.append(
            {
                "questions": f"{own.questions:,}",
                "value": _value(own.value),
                "±": "" if own.stderr is None else _value(own.stderr),
                "Δ": f"{own.value - first.value:+.4f}" if number else "",
            }
        )
    return rows


def _value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else number_text(value)
