"""A size of a sweep is healed, and judged anew on the text that all sizes are judged on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llmprune_cli.commands.prune.decision import layer_device
from llmprune_cli.commands.recover.recovery import recover
from llmprune_cli.commands.recover.request import RecoverRequest, healing_of
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.commands.sweep.point import HEALED, PRUNED, Point, Row, plan_file
from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.staging import hidden_folder
from llmprune_cli.heal.figures import HeldOut
from llmprune_cli.heal.options import Healed
from llmprune_cli.heal.training_text import prepare_training, tokens_together
from llmprune_cli.journal.forms import Json
from llmprune_cli.plan.document import Plan
from llmprune_cli.report.report_card import judged_by, report_card
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.tokenizer import model_reader
from llmprune_cli.text.names import SELF, parts_of


def check_text(request: PruneRequest, bench: Workbench) -> None:
    """Make sure that there is text to train on beside that which is judged on, before any size is pruned.

    What a teacher is to write is not written yet.

    Raises:
        CheckpointError: there is not.
    """
    name, processes = request.healing.text, bench.model.processes
    if not processes.is_first or (name is not None and any(part.name == SELF for part in parts_of(name))):
        return
    checkpoint = bench.model.checkpoint
    try:
        prepare_training(
            request.healing,
            model_reader(checkpoint),
            processes.count,
            tokens_together(layer_device(request.model.device)),
            lambda _: None,
            apart=_apart(request, bench),
        )
    except CheckpointError as error:
        raise CheckpointError(f"--recover: {error}") from error


def heal_point(point: Point, bench: Workbench, row: Row | None) -> Row | None:
    """Train what a point was pruned to, beside it, and judge that; None in processes that do not report.

    Args:
        row: of the pruned model.
    """
    journal, processes = bench.journal, bench.model.processes
    folder = Path(processes.broadcast(str(journal.folder or "")))
    output = folder / HEALED
    goes_on = processes.broadcast(hidden_folder(output).is_dir())
    asked = healing_of(point.request, folder / PRUNED, Healed(output, overwrite=True, resume=goes_on))
    name = f"{point.request.model.name} ({point.name})"
    tokens = journal.recall(HEALED, Json(int), partial(_heal, asked, name, point, bench))
    if journal.folder is None or row is None:
        return None
    choice, split = point.request.choice, point.request.text.calibration_split
    plan = Plan.load(plan_file(folder))
    card = report_card(bench, output, plan, (), split, choice.seed, choice.budget is not None, is_healed=True)
    dense, pruned, held_out = row
    assert card.kl is not None
    healed = replace(
        pruned,
        perplexity=card.perplexity_after,
        bits_per_byte=card.bits_per_byte_after,
        kl=card.kl,
        prefill_tokens_per_second=card.prefill_tokens_per_second_after,
        prefill_spread=card.prefill_spread_after,
        healed_tokens=tokens,
        before_healing=HeldOut(pruned.kl, pruned.perplexity, pruned.bits_per_byte),
    )
    return dense, healed, held_out


def _heal(asked: RecoverRequest, name: str, point: Point, bench: Workbench) -> int:
    """How many tokens it was trained on; 0 in processes that do not report."""
    result = recover(asked, bench.listener, name, _apart(point.request, bench))
    return result.tokens if result is not None else 0


def _apart(request: PruneRequest, bench: Workbench) -> torch.Tensor:
    """Windows [K, T] that sizes are judged on."""
    assert bench.text is not None
    return judged_by(bench.text, request.choice.budget is not None)[0]
