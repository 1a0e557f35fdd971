"""`prune --recover`: a model is pruned and healed in one run."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from llmprune_cli.commands.evaluate import evaluate
from llmprune_cli.commands.prune import prune
from llmprune_cli.commands.recipe import as_words, given
from llmprune_cli.commands.recover.finalists import prune_to_the_best
from llmprune_cli.commands.recover.recovery import recover
from llmprune_cli.commands.recover.request import healing_of
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.staging import check_target, claimed
from llmprune_cli.heal.options import Healed
from llmprune_cli.processes import join
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import PruneResult


def prune_and_recover(request: PruneRequest, listener: Listener) -> PruneResult | None:
    """Prune into a temporary folder, heal what lies there, and write that; where it fails, keep what was pruned.

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
        delivery = Healed(output, request.delivery.overwrite, request.delivery.max_shard_size)
        name = f"{request.model.name} (pruned)"
        try:
            pruned = make(replace(request, delivery=replace(request.delivery, output=place, overwrite=False)), listener)
            processes.broadcast(None)  # what the first one wrote, all of them read
            healed = recover(healing_of(request, place, delivery, may_go_on=False), listener, name)
        except BaseException:
            if processes.is_first and place.exists():
                _keep_pruned(request, place, listener)
            raise
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


def _keep_pruned(request: PruneRequest, pruned: Path, listener: Listener) -> None:
    """Move what was pruned in a run that failed beside the output, and say what goes on from there.

    Whatever keeps it from being moved is worth less than what ended the run.
    """
    output = request.delivery.output
    assert output is not None
    kept = output.with_name(f"{output.name}-pruned")
    try:
        with claimed(kept, overwrite=False) as claim, claim.staged() as staging:
            for path in pruned.iterdir():
                shutil.move(path, staging)
    except (LlmpruneError, OSError) as error:
        listener.warn(f"The run did not come to its end, and the pruned model could not be kept: {error}")
        return
    listener.warn(
        f"The run did not come to its end. The pruned model is kept in {kept}, and this goes on from there: "
        f"{_recover_command(request, kept, output)}"
    )


def _recover_command(request: PruneRequest, pruned: Path, output: Path) -> str:
    """The command that heals a pruned model as `prune --recover` was to."""
    model = given(replace(request.model, revision=None, dtype=None))
    healing = {"tokens": request.healing.tokens, **given(request.healing)}
    told = {"model": pruned, **healing, **model, "overwrite": request.delivery.overwrite, "output": output}
    return f"llmprune recover {as_words(told)}"
