"""Everything that one `prune` is asked for, one after the other: a pruned model, healed, exported, and pushed."""

from __future__ import annotations

import time
from dataclasses import replace

from llmprune_cli.commands.export import export
from llmprune_cli.commands.prune import prune
from llmprune_cli.commands.push import ask_hub, upload
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.processes import is_first
from llmprune_cli.progress import Listener
from llmprune_cli.report.json_results import PruneResult


def deliver(request: PruneRequest, listener: Listener) -> PruneResult | None:
    """Prune, and as far as asked heal, export and push; of several processes the first one reports.

    Raises:
        LlmpruneError: see `prune`, `recover`, `export` and `upload`; a model that is written by then stays.
    """
    started, delivery = time.perf_counter(), request.delivery
    if is_first():
        ask_hub(delivery.push_to, delivery.public, listener)
    result = prune(request, listener) if request.recover is None else _prune_and_recover(request, listener)
    if result is None or result.output is None:
        return result
    if request.export is not None:
        conversion, folder = request.export
        pruned = replace(request.model, name=result.output, revision=None, dtype=None)
        try:
            exported = export(pruned, folder, delivery.overwrite, conversion, listener)
        except LlmpruneError as error:
            error.args = (f"{error} The pruned model itself is in {result.output}.",)
            raise
        result = replace(result, export=exported, seconds=time.perf_counter() - started)
    if delivery.push_to is not None and delivery.output is not None:
        pushed = upload(delivery.output, delivery.push_to, delivery.public, listener)
        result = replace(result, push=pushed, seconds=time.perf_counter() - started)
    return result


def _prune_and_recover(request: PruneRequest, listener: Listener) -> PruneResult | None:
    """See there; a prune alone does not wait for the imports of training."""
    from llmprune_cli.commands.recover.pruned_and_healed import prune_and_recover

    return prune_and_recover(request, listener)
