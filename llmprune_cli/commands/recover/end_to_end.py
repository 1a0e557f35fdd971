"""A pruned model is trained as a whole on what its teacher predicts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from secrets import token_hex

import torch

from llmprune_cli.commands.recover.outcome import Outcome, deliver
from llmprune_cli.commands.recover.task import (
    FINAL,
    Task,
    check_mode,
    check_room,
    choose_teacher,
    say_what_text_lacks,
)
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import UnsupportedError
from llmprune_cli.folder.scratch import check_folder
from llmprune_cli.folder.shards import warn_of_large_shards
from llmprune_cli.folder.staging import Claim, hidden_folder
from llmprune_cli.heal.figures import HeldOut, RateTrial
from llmprune_cli.heal.healed_folder import write_healed
from llmprune_cli.heal.judging import judge
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.student import TrainedModel, compute_twice, load_trained, stored_tensors
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.teacher.rewording import reword, token_kinds
from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.heal.training.learning_rate import search_learning_rates
from llmprune_cli.heal.training.reporters import Reports
from llmprune_cli.heal.training.trainer import Lesson, train
from llmprune_cli.journal.forms import Json, Numbers
from llmprune_cli.journal.journal import Journal, kept_folder
from llmprune_cli.journal.keys import statistics_key
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import ALONE
from llmprune_cli.report.json_results import RecoverResult
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.perplexity import peak_memory_bytes
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.reading import spelled_bytes

LITTLE = 0.01  # of the weights of the layers


def heal(task: Task, claim: Claim | None, started: float, stack: ExitStack) -> RecoverResult | None:
    """Train, write and judge; None in processes that do not report."""
    request, healing = task.request, task.request.healing
    folder = hidden_folder(request.output.absolute())
    if claim is not None:
        if request.delivery.resume:
            check_mode(task, claim.folder)
        folder = stack.enter_context(kept_folder(claim, task.key(), request.delivery.resume, request.may_go_on, FINAL))
    trained = load_trained(task.pruned, task.device, healing)
    _say_bare(task, trained)
    check_room(task, trained, folder)
    if task.lacks_what_went:
        task = _with_what_went(task, folder)
    mode, teacher = choose_teacher(task, trained, folder)
    if healing.gradient_checkpointing or mode == "streamed":
        compute_twice(trained.model)
    how = healing.loss_weights, healing.temperature, task.compute
    student = Student(trained.model, *how, healing.hidden_weight, task.text.learned_share)
    reports, rate = _reports(task, folder), task.learning_rate(())
    lesson = Lesson(healing, teacher, task.text, rate, task.processes, task.listener, reports)
    trials = _try_rates(task, student, lesson, folder) if healing.learning_rate == "auto" else ()
    lesson = replace(lesson, learning_rate=task.learning_rate(trials))
    training, count = train(student, lesson, folder), trained.trained - _say_idle(task, trained)
    gained = training.best.tokens > 0
    model = trained.merged()
    if claim is None:
        return None
    most = parse_size(request.delivery.max_shard_size)
    with claim.staged() as staging:
        stored = stored_tensors(model) if gained else {}
        tensors = ((entry, stored[entry.name]) for entry in task.pruned.entries) if gained else task.pruned.tensors()
        checksums = write_healed(task.pruned, tensors, staging, most, task.listener)
        warn_of_large_shards(staging, most, task.listener.warn)
        peak = peak_memory_bytes(model)
        del student, trained, model, stored
        after = _judge_written(task, teacher, staging)
        outcome = Outcome(training, after, mode, count if gained else 0, lesson.learning_rate, peak, trials)
        return deliver(task, outcome, started, staging, checksums)


def _with_what_went(task: Task, folder: Path) -> Task:
    """With text in which words that went stand for others, if what the teacher says of it is what is learned."""
    text, tokens = task.text, task.tokens
    assert tokens is not None
    if not task.request.healing.loss_weights.kl or text.learned is not None:
        say_what_text_lacks(task)
        return task
    own, held = _reworded(task, tokens, folder).tensor_split([len(text.windows)])
    tokenizer = load_tokenizer(task.pruned)
    count = sum(spelled_bytes(tokenizer, window) for window in held)
    corpus = replace(text.corpus, origin=f"{text.corpus.origin}, with words put in that went")
    reworded = replace(task, text=replace(text, corpus=corpus, windows=own, held_out=held, held_out_bytes=count))
    if reworded.lacks_what_went:
        say_what_text_lacks(task)
        return task
    if task.processes.is_first:
        task.listener.warn(
            f"{task.share_that_went:.2%} of the tokens of {text.corpus.origin} went, which teaches little of how to "
            f"spell these. So some of its words give way to words that went and that {task.teacher.source} expects "
            f"there: now {reworded.share_that_went:.1%}."
        )
    return reworded


def _reworded(task: Task, tokens: TokenMap, folder: Path) -> torch.Tensor:
    """See `reword`: windows to learn from and held-out ones, drawn by the first process and kept with its work.

    A teacher whose layers do not run alone leaves them as they are.
    """
    windows, seed, cache = torch.cat([task.text.windows, task.text.held_out]), task.request.healing.seed, None
    if task.processes.is_first:
        cache = task.request.teaching.teacher_cache
        if cache is not None:  # what it holds is about this text
            check_folder(cache, "--teacher-cache")
    key = statistics_key(task.teacher, "text", windows, task.device, task.compute)
    journal = Journal(task.processes, folder if task.processes.is_first else None, cache)

    def draw() -> torch.Tensor:
        if not task.processes.is_first:
            return windows
        try:
            teacher = LayeredModel(understand(task.teacher), task.device.partition(":")[0], task.compute)
            return reword(teacher, tokens, token_kinds(load_tokenizer(task.teacher)), windows, seed, task.listener)
        except UnsupportedError:
            return windows

    return journal.recall_measured({**key, "tokens": tokens.identity(), "seed": seed}, Numbers(), draw)


def _say_bare(task: Task, trained: TrainedModel) -> None:
    """Warn of much that could be trained, but not beside adapters."""
    own = trained.adapters
    if task.processes.is_first and own is not None and own.bare_share > LITTLE:
        task.listener.warn(
            f"--lora puts no adapters beside {len(own.bare)} tensors, such as {own.bare[0]}: they stay as they are, "
            f"{own.bare_share:.0%} of the weights of the layers. Without --lora they are trained."
        )


def _say_idle(task: Task, trained: TrainedModel) -> int:
    """Warn of adapters that learned nothing; how many numbers they have."""
    idle = {} if trained.adapters is None else trained.adapters.idle()
    if task.processes.is_first and idle:
        task.listener.warn(
            f"The adapters of {len(idle)} matrices learned nothing, such as those of {next(iter(idle))}: no gradient "
            "reaches them. These matrices stay as they are."
        )
    return sum(idle.values())


def _reports(task: Task, folder: Path) -> Reports | None:
    """Whom losses are told, as a run of this time, or of the time when it was begun."""
    output, asked = task.request.output, task.request.delivery.report_to
    if asked is None:
        return None
    journal = Journal(task.processes, folder if task.processes.is_first else None)
    called = f"{output.name} {datetime.now():%Y-%m-%d %H:%M} {token_hex(2)}"
    run = journal.recall("reported-run", Json(str), lambda: called)
    return Reports(asked, output.with_name(f"{output.name}-runs"), run)


def _try_rates(task: Task, student: Student, lesson: Lesson, folder: Path) -> tuple[RateTrial, ...]:
    """Learning rates, each for a few steps, unless a run that was cut short has tried them."""
    journal = Journal(task.processes, folder if task.processes.is_first else None)
    search = partial(search_learning_rates, student, lesson, task.size, folder)
    return journal.recall("learning-rates", Json(tuple[RateTrial, ...]), search)


def _judge_written(task: Task, teacher: Teacher, folder: Path) -> HeldOut:
    """What was written, loaded as anybody loads it."""
    healing = task.request.healing
    task.listener.stage("Judging what was written", 1)
    with open_checkpoint(ModelReference(str(folder), trust_remote_code=task.pruned.trust_remote_code), True) as written:
        dtype = str(written.stored_dtype if task.compute == torch.bfloat16 else torch.float32)
        model = load_model(written, task.device, dtype.removeprefix("torch."))
        student = Student(model, healing.loss_weights, healing.temperature, task.compute)
        found = judge(student, teacher, task.text, healing.temperature, ALONE)
    task.listener.advance(1)
    return found
