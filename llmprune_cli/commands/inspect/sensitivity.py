"""`inspect --sensitivity`: what a part of each layer is worth, measured on text and kept for a later `prune`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import torch

from llmprune_cli.apply.proven_widths import leave_unproven
from llmprune_cli.choose.layers.figures import Sensitivity
from llmprune_cli.choose.layers.sensitivity import SENSITIVITY_TOKENS, measure_sensitivity, reduced_targets, steps
from llmprune_cli.choose.selection import plan_each
from llmprune_cli.commands.inspect.request import Measured
from llmprune_cli.commands.prune.decision import layered, settle
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.scratch import check_folder, scratch_folder
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal
from llmprune_cli.journal.keys import statistics_key, text_identity
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import ALONE
from llmprune_cli.progress import Listener
from llmprune_cli.report.chart import draw_sensitivity
from llmprune_cli.report.json_results import SCHEMA_VERSION, SensitivityResult
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.opening import open_checkpoint, part_to_write
from llmprune_cli.startup.remembered import statistics_folder
from llmprune_cli.text.windows import spread_windows


def sensitivity(model: ModelReference, asked: Measured, listener: Listener) -> SensitivityResult:
    """Measure what predictions lose when a part of each layer alone goes.

    Raises:
        LlmpruneError: it cannot be read or run, or there is no text.
    """
    started, request = time.perf_counter(), asked.request(model)
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(model, need_weights=True))
        checkpoint = part_to_write(opened, dtype=model.dtype)
        for folder, option in (
            (asked.scratch.statistics, "--statistics"),
            (asked.scratch.offload_dir, "--offload-dir"),
        ):
            if folder is not None:
                check_folder(folder, option)
        kept = asked.scratch.statistics or statistics_folder()
        subject = leave_unproven(understand(checkpoint))
        choice, text = settle(request, subject, ALONE, listener)
        if text is None:
            raise CheckpointError("Sensitivity is measured on text, and there is none. Name some with --calibration.")
        journal = Journal(statistics=kept or stack.enter_context(scratch_folder()))
        bench = Workbench(layered(subject, request, choice), text, listener, journal, asked.scratch.offload_dir)
        found = _measure(bench, replace(request, choice=choice))
    result = SensitivityResult(
        schema_version=SCHEMA_VERSION,
        model=checkpoint.source,
        revision=checkpoint.revision,
        importance=choice.importance or "",
        dataset=text.corpus.name,
        origin=text.corpus.origin,
        split=asked.text.calibration_split,
        tokens=text.fitted.numel(),
        held_out_tokens=_judging(bench)[:, 1:].numel(),
        widths=found.rows,
        influence=found.influence,
        statistics=str(kept) if kept is not None else None,
        seconds=time.perf_counter() - started,
    )
    if asked.report is not None:
        draw_sensitivity(result, asked.report)
    return result


def _judging(bench: Workbench) -> torch.Tensor:
    """Windows [N, T] that no unit is ranked by."""
    assert bench.text is not None
    return spread_windows(bench.text.held_out, SENSITIVITY_TOKENS)


def _measure(bench: Workbench, request: PruneRequest) -> Sensitivity:
    """The figures of all layers, as remembered or as measured now."""
    model, choice, windows, text = bench.model, request.choice, _judging(bench), bench.text
    assert text is not None
    key = {
        **statistics_key(model.checkpoint, "sensitivity", windows, model.device, model.compute),
        "importance": choice.importance,
        "seed": choice.seed,
        "ranked on": text_identity(text.fitted),
    }

    def make() -> Sensitivity:
        targets = reduced_targets(model.subject)
        plans, influence = plan_each(bench, targets, choice)
        bench.listener.stage("Leaving out parts of each layer", steps(model.layers, len(plans)))
        with torch.inference_mode():
            rows = measure_sensitivity(model, plans, windows, bench.all_layers_dir, bench.listener.advance)
        return Sensitivity(rows, influence)

    return bench.journal.recall_measured(key, Json(Sensitivity), make)
