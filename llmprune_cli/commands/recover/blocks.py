"""A pruned model is trained one layer after the other, with one layer of it or of its teacher in memory."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmprune_cli.commands.recover.outcome import Outcome, deliver
from llmprune_cli.commands.recover.task import FINAL, Task, say_what_text_lacks
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import OutputError
from llmprune_cli.folder.scratch import bytes_in, check_folder
from llmprune_cli.folder.shards import warn_of_large_shards
from llmprune_cli.folder.staging import Claim
from llmprune_cli.heal.blocks.judging import judge_layered
from llmprune_cli.heal.blocks.walk import Walk, first_trained, heal_layers, search_on_layer, written
from llmprune_cli.heal.figures import HeldOut, Judgement, RateTrial, Training
from llmprune_cli.heal.healed_folder import write_healed
from llmprune_cli.heal.judging import check_judged
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.teacher.streamed import stream_teacher
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal, kept_folder
from llmprune_cli.options import ModelReference
from llmprune_cli.report.json_results import RecoverResult
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.perplexity import peak_memory_bytes
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.opening import open_checkpoint


def heal_by_blocks(task: Task, claim: Claim, started: float, stack: ExitStack) -> RecoverResult:
    """Train, write and judge."""
    request, text, listener = task.request, task.text, task.listener
    folder = stack.enter_context(kept_folder(claim, task.key(), request.delivery.resume, request.may_go_on, FINAL))
    place = task.device.partition(":")[0]
    student, teacher = (LayeredModel(understand(own), place, task.compute) for own in (task.pruned, task.teacher))
    train, trials = request.healing.train, tuple[RateTrial, ...]()
    first = first_trained(student, train)
    _check_room(task, folder)
    if task.lacks_what_went:
        say_what_text_lacks(task)
    predictions = folder / "teacher"
    check_folder(predictions, "--output")
    predicted = stream_teacher(teacher, text.held_out, 1.0, predictions, listener, task.tokens)
    journal = Journal(folder=folder)
    listener.stage("Judging on held-out text", student.layers)
    before = journal.recall(
        "before", Json(HeldOut), lambda: check_judged(judge_layered(student, predicted, text, listener))
    )
    walk = Walk(student, teacher, task.layers, task.tokens, text, train, task.learning_rate(()), journal, listener)
    if request.healing.learning_rate == "auto":
        search = partial(search_on_layer, walk, first, task.size)
        trials = journal.recall("learning-rates", Json(tuple[RateTrial, ...]), search)
        walk = replace(walk, learning_rate=task.learning_rate(trials))
    layers = heal_layers(walk)
    most = parse_size(request.delivery.max_shard_size)
    with claim.staged() as staging:
        healed = written(student, tuple(range(student.layers)), journal)
        checksums = write_healed(task.pruned, healed.checkpoint.tensors(), staging, most, listener)
        warn_of_large_shards(staging, most, listener.warn)
        after = _judge_written(task, student, predicted, staging)
        last = Judgement(text.trained_tokens, after)
        training = Training(before, (last,), text.schedule.steps, False, last)
        trained, peak = sum(own.trained_parameters for own in layers), peak_memory_bytes(student.skeleton)
        outcome = Outcome(training, after, "streamed", trained, walk.learning_rate, peak, trials, layers)
        return deliver(task, outcome, started, staging, checksums)


def _judge_written(task: Task, student: LayeredModel, teacher: Teacher, folder: Path) -> HeldOut:
    task.listener.stage("Judging what was written", student.layers)
    with open_checkpoint(ModelReference(str(folder), trust_remote_code=task.pruned.trust_remote_code), True) as own:
        model = replace(student, subject=replace(student.subject, checkpoint=own))
        return judge_layered(model, teacher, task.text, task.listener)


def _check_room(task: Task, folder: Path) -> None:
    """Make sure that both streams and the result, twice, will find room.

    Raises:
        OutputError: they will not.
    """
    tokens = task.text.windows.numel() + task.text.held_out.numel()
    streams = 2 * 4 * tokens * task.pruned.config.get_text_config().hidden_size
    weights = 2 * task.pruned.size_bytes - bytes_in(folder, "layer-*")  # which a run that was cut short has written
    needed, free = streams + weights, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent} has room for {free:,} bytes, and the hidden states of {tokens:,} tokens take {streams:,} "
            f"and weights {weights:,} more. Make room there, choose another --output, or give fewer --tokens."
        )
