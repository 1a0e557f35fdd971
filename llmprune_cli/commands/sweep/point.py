"""One size of a sweep: pruned as `prune` does it, healed where that is asked for, and judged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.commands.prune import choose_and_write
from llmprune_cli.commands.prune.decision import Decided
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.commands.sweep.request import Sweep
from llmprune_cli.journal.forms import Json
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.report.json_results import SweepPoint
from llmprune_cli.run.workbench import Workbench

if TYPE_CHECKING:
    from llmprune_cli.commands.prune.outcome import Outcome
    from llmprune_cli.report.json_results import CalibrationResult, ModelSummary

KEPT, POINTS = "kept", "points"  # in the folder of a run: what goes into the output, and the work on each point
PRUNED, HEALED = "pruned", "healed"  # models in the folder of a point, each beside a record of what it is
UNPRUNED = "unpruned"

Row = tuple[SweepPoint, SweepPoint, int]  # the dense model, the pruned one, and the held-out tokens


@dataclass(frozen=True)
class Point:
    """A size that is tried."""

    name: str
    request: PruneRequest  # once text is there, with the method that all points have
    decided: Decided


def make_point(asked: Sweep, point: Point, bench: Workbench, bound: Target | None) -> Row | None:
    """One point, of which the work stays until its row is kept; None in processes that do not report.

    Args:
        bound: see `search_widths`.
    """
    started, run = time.perf_counter(), bench.journal.folder
    if run is not None:
        own = run / POINTS / point.name
        own.mkdir(exist_ok=True)
        for model in (PRUNED, HEALED):
            if not (own / model).is_dir():
                (own / f"{model}.json").unlink(missing_ok=True)
        bench = replace(bench, journal=replace(bench.journal, folder=own))
    prune = partial(_prune, asked, point, bench, bound)
    row: Row | None = bench.journal.recall(PRUNED, Json(Row), prune)
    if asked.delivery.recover is not None:
        from llmprune_cli.commands.sweep.healing import heal_point

        row = heal_point(point, bench, row)
    if run is None or row is None:
        return None
    if asked.delivery.keep_models:
        kept = run / KEPT / point.name
        shutil.rmtree(kept, ignore_errors=True)
        (own / (PRUNED if asked.delivery.recover is None else HEALED)).rename(kept)
    shutil.rmtree(own, ignore_errors=True)
    dense, made, held_out = row
    return dense, replace(made, seconds=time.perf_counter() - started), held_out


def _prune(asked: Sweep, point: Point, bench: Workbench, bound: Target | None) -> Row | None:
    """The pruned model of a point, in its folder, and its plan, among what is kept."""
    folder, choice = bench.journal.folder, point.request.choice
    if folder is None:
        choose_and_write(point.request, choice, None, point.decided, bench, bound=bound)
        return None
    staged = partial(_emptied, folder / PRUNED)
    outcome = choose_and_write(point.request, choice, staged, point.decided, bench, bound=bound)
    assert outcome is not None and outcome.plan is not None
    outcome.plan.save(plan_file(folder))
    return _row(point, outcome, asked)


def plan_file(folder: Path) -> Path:
    """Where the plan of a point is kept.

    Args:
        folder: of the point.
    """
    return folder.parents[1] / KEPT / f"{folder.name}.json"


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder without what a run left that died."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder


def _row(point: Point, outcome: Outcome, asked: Sweep) -> Row:
    card, plan = outcome.card, outcome.plan
    assert card is not None and card.kl is not None and plan is not None
    dense = _side(UNPRUNED, outcome.before, tuple(range(plan.before.num_hidden_layers)), card, "before")
    pruned = replace(
        _side(point.name, outcome.after, plan.layers, card, "after"),
        kl=card.kl,
        deviations=plan.deviations,
        plan=f"{point.name}.json" if asked.delivery.output else None,
        folder=point.name if asked.delivery.keep_models else None,
    )
    return dense, pruned, card.held_out_tokens


def _side(name: str, size: ModelSummary, layers: tuple[int, ...], card: CalibrationResult, side: str) -> SweepPoint:
    """What a card says of the model `before` or `after`."""
    return SweepPoint(
        name=name,
        widths=size.widths,
        layers=layers,
        parameters=size.parameters,
        size_bytes=size.size_bytes,
        kv_cache_bytes_per_token=size.kv_cache_bytes_per_token,
        perplexity=getattr(card, f"perplexity_{side}"),
        bits_per_byte=getattr(card, f"bits_per_byte_{side}"),
        kl=0.0,
        prefill_tokens_per_second=getattr(card, f"prefill_tokens_per_second_{side}"),
        prefill_spread=getattr(card, f"prefill_spread_{side}"),
        deviations=(),
        healed_tokens=0,
        before_healing=None,
        seconds=0.0,
        plan=None,
        folder=None,
    )
