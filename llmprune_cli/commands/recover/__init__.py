"""`recover`: a pruned model learns to predict what the unpruned one predicts."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llmprune_cli.commands.evaluate import evaluate
from llmprune_cli.commands.prune import prune, source_folder
from llmprune_cli.commands.recover.task import Task, check_room, choose_teacher, open_teacher, prepare
from llmprune_cli.commands.requests import PruneRequest, RecoverRequest
from llmprune_cli.folder.integrity import list_files
from llmprune_cli.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.shards import warn_of_large_shards
from llmprune_cli.folder.staging import Claim, check_target, claimed, hidden_folder
from llmprune_cli.formats import load_format
from llmprune_cli.heal.figures import HeldOut
from llmprune_cli.heal.healed_folder import write_healed
from llmprune_cli.heal.judging import judge
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.options import Healed
from llmprune_cli.heal.student import check_packages, load_trained
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.teacher.identity import check_teacher, teacher_reference
from llmprune_cli.heal.training.trainer import Lesson, Training, train
from llmprune_cli.journal.journal import kept_folder
from llmprune_cli.journal.keys import versions
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import ALONE, join
from llmprune_cli.progress import Listener
from llmprune_cli.report.chart import check_chart_target, draw_curve
from llmprune_cli.report.model_card import write_card
from llmprune_cli.report.results import SCHEMA_VERSION, PruneResult, RecoverResult
from llmprune_cli.report.runtimes import runtime_fits
from llmprune_cli.run.perplexity import peak_memory_bytes
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint


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
        pruned = prune(replace(request, delivery=replace(request.delivery, output=place, overwrite=False)), listener)
        processes.broadcast(None)  # what the first one wrote, all of them read
        delivery = Healed(output, request.delivery.overwrite, request.delivery.max_shard_size)
        reference = replace(request.model, name=str(place), revision=None, dtype=None)
        name = f"{request.model.name} (pruned)"
        healed = recover(RecoverRequest(reference, request.healing, delivery=delivery), listener, name)
        last = None
        if request.evaluation is not None:
            processes.broadcast(None)
            last = evaluate(replace(reference, name=str(output)), (), request.evaluation, listener)
    if pruned is None or healed is None:
        return None
    evaluation = pruned.evaluation
    if evaluation is not None and last is not None:
        dense, cut = evaluation.results
        evaluation = replace(evaluation, results=(dense, replace(cut, model=name), *last.results))
    seconds = time.perf_counter() - started
    return replace(pruned, output=str(output), recovery=healed, evaluation=evaluation, seconds=seconds)


def recover(request: RecoverRequest, listener: Listener, name: str | None = None) -> RecoverResult | None:
    """Train a pruned model on what its teacher predicts, and write it; of several processes the first one reports.

    Whatever can be refused is refused before anything is trained.

    Args:
        name: what the pruned model is called, where that is not its folder.

    Raises:
        LlmpruneError: see there.
    """
    started, processes, delivery = time.perf_counter(), join(request.model.device), request.delivery
    check_packages(request.healing)
    if processes.is_first:
        check_target(request.output, delivery.overwrite)
        if delivery.report is not None:
            check_chart_target(delivery.report, request.output)
    with ExitStack() as stack:
        pruned = stack.enter_context(open_checkpoint(request.model, need_weights=True))
        pruned = replace(pruned, source=name or pruned.source)
        own = pruned.companions / MANIFEST_NAME
        manifest = read_manifest(pruned.companions) if own.is_file() else None
        reference = teacher_reference(request.teaching.teacher, request.model, manifest)
        teacher = open_teacher(reference, request, stack)
        check_teacher(pruned, manifest, teacher)
        claim = None
        if processes.is_first:
            check_target(request.output, delivery.overwrite, source_folder(reference, teacher))
            forbidden = source_folder(request.model, pruned)
            claim = stack.enter_context(claimed(request.output, delivery.overwrite, forbidden))
        task = prepare(request, pruned, manifest, teacher, processes, listener)
        result = _heal(task, claim, started, stack)
    if result is not None and delivery.report is not None:
        draw_curve(result, delivery.report)
    return result


def _heal(task: Task, claim: Claim | None, started: float, stack: ExitStack) -> RecoverResult | None:
    request, text, healing = task.request, task.text, task.request.healing
    folder = hidden_folder(request.output.absolute())
    if claim is not None:
        folder = stack.enter_context(kept_folder(claim, task.key(), request.delivery.resume, may_go_on=True))
    trained = load_trained(task.pruned, task.device, healing)
    check_room(task, trained, folder)
    mode, teacher = choose_teacher(task, trained, folder)
    student = Student(trained.model, healing.loss, healing.temperature, task.compute)
    lesson = Lesson(healing, teacher, text, task.learning_rate, task.processes, task.listener)
    training = train(student, lesson, folder)
    count = trained.trained
    model = trained.merged()
    if claim is None:
        return None
    with claim.staged() as staging:
        checksums = write_healed(
            task.pruned, model, staging, parse_size(request.delivery.max_shard_size), task.listener
        )
        warn_of_large_shards(staging, parse_size(request.delivery.max_shard_size), task.listener.warn)
        peak = peak_memory_bytes(model)
        del student, trained, model
        after = _judge_written(task, teacher, staging)
        result = _report(task, training, after, mode, count, time.perf_counter() - started, peak)
        if not result.is_better:
            losses = [found.loss(healing.loss) for found in (training.before, after)]
            task.listener.warn(
                f"{request.output} is no better than {task.pruned.source} on held-out text: its loss is "
                f"{losses[1]:.4f} nats, and {losses[0]:.4f} before. Try a smaller --learning-rate, or more text."
            )
        _describe(task, result, staging, checksums)
    return result


def _judge_written(task: Task, teacher: Teacher, folder: Path) -> HeldOut:
    """What was written, loaded as anybody loads it."""
    healing = task.request.healing
    task.listener.stage("Judging what was written", 1)
    with open_checkpoint(ModelReference(str(folder), trust_remote_code=task.pruned.trust_remote_code), True) as written:
        dtype = str(written.stored_dtype if task.compute == torch.bfloat16 else torch.float32)
        model = load_model(written, task.device, dtype.removeprefix("torch."))
        student = Student(model, healing.loss, healing.temperature, task.compute)
        found = judge(student, teacher, task.text, healing.temperature, ALONE)
    task.listener.advance(1)
    return found


def _report(
    task: Task, training: Training, after: HeldOut, mode: str, trained: int, seconds: float, peak: int
) -> RecoverResult:
    text, healing = task.text, task.request.healing
    batch = text.trained_tokens // text.schedule.steps
    return RecoverResult(
        schema_version=SCHEMA_VERSION,
        model=task.pruned.source,
        teacher=task.teacher.source,
        teacher_mode=mode,
        output=str(task.request.output),
        dataset=text.corpus.name,
        origin=text.corpus.origin,
        split=healing.text_split,
        tokens=batch * training.steps,
        batch_tokens=batch,
        seq_len=text.windows.shape[1],
        held_out_tokens=text.held_out[:, 1:].numel(),
        loss=healing.loss,
        learning_rate=task.learning_rate,
        trained_parameters=trained,
        steps=training.steps,
        stopped_early=training.stopped_early,
        before=training.before,
        after=after,
        is_better=after.loss(healing.loss) < training.before.loss(healing.loss),
        best_tokens=training.best.tokens,
        curve=training.curve,
        seconds=seconds,
        peak_memory_bytes=peak,
    )


def _describe(task: Task, result: RecoverResult, folder: Path, checksums: dict[str, str]) -> None:
    """Write the card and the manifest of a folder."""
    manifest = task.manifest or Manifest(source=task.teacher.source, revision=task.teacher.revision)
    said = json.loads(json.dumps({**asdict(result), "options": asdict(task.request.healing), "versions": versions()}))
    manifest = replace(manifest, healing=said, export=None)
    pruned = manifest if manifest.is_pruned else None
    write_card(folder, task.pruned, pruned, load_format("safetensors"), runtime_fits(task.pruned.config))
    write_manifest(folder, replace(manifest, files=list_files(folder, checksums)))
