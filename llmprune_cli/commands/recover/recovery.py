"""`recover`: whatever can be refused is refused, and then the model is trained."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from llmprune_cli.commands.push import ask_hub, upload
from llmprune_cli.commands.recover.blocks import heal_by_blocks
from llmprune_cli.commands.recover.end_to_end import heal
from llmprune_cli.commands.recover.request import RecoverRequest, teacher_reference
from llmprune_cli.commands.recover.task import open_teacher, prepare
from llmprune_cli.errors import UsageError
from llmprune_cli.folder.manifest import MANIFEST_NAME, read_manifest
from llmprune_cli.folder.staging import check_target, claimed
from llmprune_cli.heal.teacher.identity import check_teacher
from llmprune_cli.processes import join
from llmprune_cli.progress import Listener
from llmprune_cli.report.chart import check_chart_target, draw_curve
from llmprune_cli.report.json_results import RecoverResult
from llmprune_cli.report.model_card import tell_pruning
from llmprune_cli.source.opening import open_checkpoint, source_folder
from llmprune_cli.source.own_text import warn_of_no_conversations
from llmprune_cli.source.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch


def recover(
    request: RecoverRequest, listener: Listener, name: str | None = None, apart: torch.Tensor | None = None
) -> RecoverResult | None:
    """Train a pruned model on what its teacher predicts, and write it; of several processes the first one reports.

    Whatever can be refused is refused before anything is trained.

    Args:
        name: what the pruned model is called, where that is not its folder.
        apart: see `prepare_training`.

    Raises:
        LlmpruneError: see there.
    """
    started, processes, delivery = time.perf_counter(), join(request.model.device), request.delivery
    if request.healing.mode == "blocks" and processes.count > 1:
        raise UsageError("--mode blocks trains in one process; start one.")
    if processes.is_first:
        check_target(request.output, delivery.overwrite)
        if delivery.report is not None:
            check_chart_target(delivery.report, request.output)
        ask_hub(delivery.push_to, delivery.public, listener)
    with ExitStack() as stack:
        pruned = stack.enter_context(open_checkpoint(request.model, need_weights=True))
        pruned = replace(pruned, source=name or pruned.source)
        own = pruned.companions / MANIFEST_NAME
        manifest = read_manifest(pruned.companions) if own.is_file() else None
        if manifest is not None and manifest.is_pruned:
            tell_pruning(replace(manifest, healing=None), pruned.companions)  # as the card of the result will
        reference = teacher_reference(request.teaching.teacher, request.model, manifest)
        teacher = open_teacher(reference, request, stack)
        check_teacher(pruned, manifest, teacher)
        claim = None
        if processes.is_first:
            check_target(request.output, delivery.overwrite, source_folder(reference, teacher))
            forbidden = source_folder(request.model, pruned)
            claim = stack.enter_context(claimed(request.output, delivery.overwrite, forbidden))
        task = prepare(request, pruned, manifest, teacher, processes, listener, apart)
        if name is None and processes.is_first:  # otherwise whatever pruned it has said so
            warn_of_no_conversations(request.healing.text, load_tokenizer(pruned), listener.warn)
        if request.healing.mode == "blocks":
            assert claim is not None
            result: RecoverResult | None = heal_by_blocks(task, claim, started, stack)
        else:
            result = heal(task, claim, started, stack)
    if result is not None and delivery.report is not None:
        draw_curve(result, delivery.report)
    if result is not None and delivery.push_to is not None:
        result = replace(result, push=upload(request.output, delivery.push_to, delivery.public, listener))
    return result
