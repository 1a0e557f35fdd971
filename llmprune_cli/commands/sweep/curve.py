"""`sweep`: one point after the other, each as `prune` makes it, on what is measured once for all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.choose.selection import first_target
from llmprune_cli.commands.prune.decision import decide, layered, limit_of, settle
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.commands.sweep.point import KEPT, POINTS, Point, Row, make_point
from llmprune_cli.commands.sweep.request import Sweep
from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.errors import CheckpointError, OutputError, PlanError
from llmprune_cli.folder.documents import replace_file
from llmprune_cli.folder.scratch import check_folder, scratch_folder
from llmprune_cli.folder.staging import SWEEP, Claim, claimed
from llmprune_cli.heal.options import USUAL_LOSS
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import STATISTICS, Journal, kept_folder
from llmprune_cli.journal.keys import run_key
from llmprune_cli.options import ModelReference
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.processes import join
from llmprune_cli.progress import Listener
from llmprune_cli.report.chart import check_chart_target, draw_sizes
from llmprune_cli.report.json_results import SCHEMA_VERSION, SweepResult, to_json
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.opening import open_checkpoint, part_to_write, source_folder

if TYPE_CHECKING:
    from llmprune_cli.options import Choice


def sweep(model: ModelReference, asked: Sweep, listener: Listener) -> SweepResult | None:
    """Prune a model to several sizes and judge them all; of several processes the first one gives the result.

    Statistics, and on a CPU what the unpruned model makes of text, are measured once. Whatever can be refused is
    refused before any weight is read.

    Raises:
        LlmpruneError: see there.
    """
    started, processes, delivery = time.perf_counter(), join(model.device), asked.delivery
    if processes.is_first and delivery.report is not None:
        check_chart_target(delivery.report, delivery.output)
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(model, need_weights=True))
        checkpoint = part_to_write(opened, dtype=model.dtype)
        claim = _claim(asked, source_folder(model, checkpoint), processes.is_first, stack)
        subject = understand(checkpoint, processes)
        points = _decide(asked.requests(model, delivery.output or Path()), subject, listener)
        choice, text = settle(points[0].request, subject, processes, listener)
        if text is None:
            raise CheckpointError("A sweep judges all sizes on text, and there is none. Name some with --calibration.")
        bench = Workbench(layered(points[0].decided.subject, points[0].request, choice), text, listener)
        bench = replace(
            bench,
            offload_dir=asked.scratch.offload_dir,
            serves_several=True,
            shows_answers=delivery.keep_models,  # in whose cards alone there is room for them
        )
        common = replace(asked.choice.settled, compute_dtype=choice.compute_dtype)
        if delivery.recover is not None:
            from llmprune_cli.commands.sweep.healing import check_text

            check_text(points[0].request, bench)
        journal = _journal(asked, common, claim, bench, stack)
        with _writing(claim):
            rows = _prune_all(asked, points, common, replace(bench, journal=journal))
        if not processes.is_first:
            return None
        result = _report(asked, bench, common, rows, time.perf_counter() - started)
        if claim is not None and journal.folder is not None:
            _deliver(claim, journal.folder, result)
    if delivery.report is not None:
        draw_sizes(result, delivery.report)
    return result


def _claim(asked: Sweep, forbidden: Path | None, is_first: bool, stack: ExitStack) -> Claim | None:
    """The right to write the output, for the first process, and proof that the user's other folders can be written."""
    scratch, delivery = asked.scratch, asked.delivery
    if scratch.offload_dir is not None:
        check_folder(scratch.offload_dir, "--offload-dir")
    if is_first and scratch.statistics is not None:
        check_folder(scratch.statistics, "--statistics")
    if not is_first or delivery.output is None:
        return None
    return stack.enter_context(claimed(delivery.output, delivery.overwrite, forbidden))


def _decide(requests: dict[str, PruneRequest], subject: Subject, listener: Listener) -> list[Point]:
    """All points, proven; of target sizes the least comes first, as all of them are proven by it and it bounds them.

    Raises:
        PlanError, UnsupportedError: the family cannot have one of them.
    """
    limits = {}
    for name, request in requests.items():
        limit = limit_of(request, subject, listener)
        if limit is None:
            return [_decided(name, request, subject, listener) for name, request in requests.items()]
        first_target(subject, request.choice, limit)
        limits[name] = limit
    order = sorted(limits, key=lambda name: limits[name].share)
    decided = decide(requests[order[0]], subject, listener)
    return [Point(name, requests[name], replace(decided, limit=limits[name])) for name in order]


def _decided(name: str, request: PruneRequest, subject: Subject, listener: Listener) -> Point:
    """A point whose widths are given; what refuses them names it."""
    try:
        return Point(name, request, decide(request, subject, listener))
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from error


def _journal(asked: Sweep, common: Choice, claim: Claim | None, bench: Workbench, stack: ExitStack) -> Journal:
    """What the run remembers: in the first process a folder beside its output, or one that goes with the run."""
    processes, text = bench.model.processes, bench.text
    assert text is not None
    if not processes.is_first:
        return Journal(processes)
    if claim is None:
        folder = stack.enter_context(scratch_folder())
    else:
        key = run_key(bench.model.subject, common, None, (text.fitted, text.held_out), bench.model.device)
        if asked.delivery.recover is not None:
            key |= {"tokens to heal on": asked.delivery.recover, "loss": USUAL_LOSS}
        folder = stack.enter_context(kept_folder(claim, key, asked.scratch.resume, may_go_on=True))
    return Journal(processes, folder, asked.scratch.statistics or folder / STATISTICS)


def _prune_all(asked: Sweep, points: list[Point], common: Choice, bench: Workbench) -> list[Row]:
    """A row for each point; those that this run has made already are not made anew."""
    journal, rows, bound = bench.journal, [], None
    if journal.folder is not None:
        for name in (KEPT, POINTS):
            (journal.folder / name).mkdir(exist_ok=True)
    for number, point in enumerate(points, 1):
        listener = bench.listener.within(f"{point.name} ({number} of {len(points)})")
        record = f"point-{point.name}"
        if journal.folder is not None and not _is_kept(journal.folder, point.name, asked.delivery.keep_models):
            (journal.folder / f"{record}.json").unlink(missing_ok=True)
        choice = point.request.choice
        request = replace(point.request, choice=replace(common, target=choice.target, widths=choice.widths))
        point = replace(point, request=request)
        make = partial(make_point, asked, point, replace(bench, listener=listener), bound)
        row = journal.recall(record, Json(Row), make)
        assert row is not None
        rows.append(row)
        if choice.budget is not None:
            bound = Target(row[1].widths, row[1].layers, ())
    return rows


@contextmanager
def _writing(claim: Claim | None) -> Iterator[None]:
    """While the points are made, of which each writes a model beside the output, or on the temporary disk.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        place = f"beside {claim.target}" if claim is not None else "on the temporary disk"
        raise OutputError(f"Writing a model {place} failed: {error.strerror or error}.") from error


def _is_kept(folder: Path, name: str, with_model: bool) -> bool:
    """Whether what a finished point leaves is still there."""
    return (folder / KEPT / f"{name}.json").exists() and (not with_model or (folder / KEPT / name).is_dir())


def _report(asked: Sweep, bench: Workbench, common: Choice, rows: list[Row], seconds: float) -> SweepResult:
    text, checkpoint = bench.text, bench.model.checkpoint
    assert text is not None
    dense, _, held_out = rows[0]
    return SweepResult(
        schema_version=SCHEMA_VERSION,
        model=checkpoint.source,
        revision=checkpoint.revision,
        output=str(asked.delivery.output) if asked.delivery.output else None,
        importance=common.importance or "",
        refit=common.refit or "",
        dataset=text.corpus.name,
        origin=text.corpus.origin,
        split=asked.text.calibration_split,
        tokens=text.fitted.numel(),
        held_out_tokens=held_out,
        device=bench.model.device,
        dense=dense,
        points=tuple(sorted((pruned for _, pruned, _ in rows), key=lambda point: -point.parameters)),
        seconds=seconds,
    )


def _deliver(claim: Claim, folder: Path, result: SweepResult) -> None:
    """Put the plans, the models that are kept, and the figures into the output."""
    with claim.staged() as staging:
        for path in sorted((folder / KEPT).iterdir()):
            path.rename(staging / path.name)
        replace_file(staging / SWEEP, [(to_json(result) + "\n").encode()])
