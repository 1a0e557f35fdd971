"""`prune --recover`: a model is pruned and healed in one run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from llmprune_cli.commands.evaluate import evaluate
from llmprune_cli.commands.prune import prune
from llmprune_cli.commands.recover.finalists import prune_to_the_best
from llmprune_cli.commands.recover.recovery import recover
from llmprune_cli.commands.recover.request import healing_of
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.staging import check_target
from llmprune_cli.heal.options import Healed
from llmprune_cli.processes import join
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import PruneResult


def prune_and_recover(request: PruneRequest, listener: Listener) -> PruneResult | None:
    """Prune into a temporary folder, heal what lies there, and write that.

    Raises:
        LlmpruneError: see `prune` and `recover`.
    """
    started, output, processes = time.perf_counter(), request.delivery.output, join(request.model.device)
    assert output is not None
    if processes.is_first:
        check_target(output, request.delivery.overwrite, Path(request.model.name))
    with scratch_folder() as own:
        place = Path(processes.broadcast(str(own))) / "pruned"
        make = prune if request.delivery.finalists is None else prune_to_the_best
        pruned = make(replace(request, delivery=replace(request.delivery, output=place, overwrite=False)), listener)
        processes.broadcast(None)  # what the first one wrote, all of them read
        delivery = Healed(output, request.delivery.overwrite, request.delivery.max_shard_size)
        name = f"{request.model.name} (pruned)"
        healed = recover(healing_of(request, place, delivery), listener, name)
        last = None
        if request.evaluation is not None:
            processes.broadcast(None)
            reference = replace(request.model, name=str(output), revision=None, dtype=None)
            last = evaluate(reference, (), request.evaluation, listener)
    if pruned is None or healed is None:
        return None
    evaluation = pruned.evaluation
    if evaluation is not None and last is not None:
        dense, cut = evaluation.results
        evaluation = replace(evaluation, results=(dense, replace(cut, model=name), *last.results))
    seconds = time.perf_counter() - started
    return replace(pruned, output=str(output), recovery=healed, evaluation=evaluation, seconds=seconds)
