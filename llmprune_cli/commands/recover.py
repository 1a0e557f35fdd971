"""`recover`: a pruned model learns to predict what the unpruned one predicts."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llmprune_cli.commands.evaluate import evaluate
from llmprune_cli.commands.prune import prune, source_folder, warn_of_large_shards
from llmprune_cli.commands.prune.decision import layer_device
from llmprune_cli.commands.requests import PruneRequest, RecoverRequest
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import CheckpointError, OutputError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.integrity import list_files
from llmprune_cli.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from llmprune_cli.folder.scratch import check_folder, scratch_folder
from llmprune_cli.folder.staging import Claim, check_target, claimed, hidden_folder
from llmprune_cli.folder.tensors import BY_NAME, DTYPES
from llmprune_cli.formats import load_format
from llmprune_cli.heal.healed_folder import write_healed
from llmprune_cli.heal.judging import HeldOut, judge
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.options import Healed
from llmprune_cli.heal.student import TrainedModel, check_packages, load_trained
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.teacher.identity import check_teacher, check_tokenizers, teacher_reference
from llmprune_cli.heal.teacher.resident import ResidentTeacher
from llmprune_cli.heal.teacher.streamed import stream_teacher
from llmprune_cli.heal.training.checkpoints import bytes_of
from llmprune_cli.heal.training.trainer import Lesson, Training, train, usual_learning_rate
from llmprune_cli.heal.training_text import TrainingText, prepare_training
from llmprune_cli.journal.journal import kept_folder
from llmprune_cli.journal.keys import model_identity, text_identity, versions
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import ALONE, Processes, join
from llmprune_cli.progress import Listener
from llmprune_cli.report.chart import check_chart_target, draw_curve
from llmprune_cli.report.model_card import write_card
from llmprune_cli.report.results import SCHEMA_VERSION, PruneResult, RecoverResult
from llmprune_cli.report.runtimes import runtime_fits
from llmprune_cli.run.layer import native_dtype
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.perplexity import peak_memory_bytes
from llmprune_cli.sizes import parse_size
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer

BYTES_PER_WEIGHT = 16  # that is trained: itself, its gradient, and two moments of that, in float32
MOST_OF_MEMORY = 0.8  # that a resident teacher may take together with the training


@dataclass(frozen=True)
class _Task:
    """What is healed, by whom and on what: known before anything is trained."""

    request: RecoverRequest
    pruned: Checkpoint
    manifest: Manifest | None  # of the pruned model
    teacher: Checkpoint
    text: TrainingText
    device: str
    compute: torch.dtype  # of products
    processes: Processes
    listener: Listener

    @property
    def learning_rate(self) -> float:
        """The largest one."""
        return self.request.healing.learning_rate or usual_learning_rate(self.pruned.parameter_count)

    def key(self) -> dict[str, Any]:
        """Everything that decides what is written."""
        sides = (("pruned", self.pruned), ("teacher", self.teacher))
        identities = {f"{side} {name}": v for side, own in sides for name, v in model_identity(own).items()}
        return {
            **identities,
            "text": text_identity(self.text.windows, self.text.order, self.text.held_out),
            "schedule": asdict(self.text.schedule),
            "device": self.device,
            "compute": str(self.compute),
            "processes": self.processes.count,
            "versions": versions(),
            **asdict(self.request.healing),
        }


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
        if pruned is None or healed is None:
            return None
        evaluation = pruned.evaluation
        if evaluation is not None and request.evaluation is not None:
            last = evaluate(replace(reference, name=str(output)), None, request.evaluation, listener)
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
        check_target(request.output, delivery.overwrite or delivery.resume)
        if delivery.report is not None:
            check_chart_target(delivery.report, request.output)
    with ExitStack() as stack:
        pruned = stack.enter_context(open_checkpoint(request.model, need_weights=True))
        pruned = replace(pruned, source=name or pruned.source)
        own = pruned.companions / MANIFEST_NAME
        manifest = read_manifest(pruned.companions) if own.is_file() else None
        reference = teacher_reference(request.teaching.teacher, request.model, manifest)
        teacher = _open_teacher(reference, request, stack)
        check_teacher(pruned, manifest, teacher)
        claim = None
        if processes.is_first:
            check_target(request.output, delivery.overwrite, source_folder(reference, teacher))
            forbidden = source_folder(request.model, pruned)
            claim = stack.enter_context(claimed(request.output, delivery.overwrite, forbidden))
        task = _prepare(request, pruned, manifest, teacher, processes, listener)
        result = _heal(task, claim, started, stack)
    if result is not None and delivery.report is not None:
        draw_curve(result, delivery.report)
    return result


def _open_teacher(reference: ModelReference, request: RecoverRequest, stack: ExitStack) -> Checkpoint:
    """The model to learn from.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return stack.enter_context(open_checkpoint(reference, need_weights=True))
    except CheckpointError as error:
        if request.teaching.teacher is not None:
            raise
        raise CheckpointError(
            f"{request.model.name} was made from {reference.name}, which cannot be read: {error} Give --teacher if it "
            "lies elsewhere."
        ) from error


def _prepare(
    request: RecoverRequest,
    pruned: Checkpoint,
    manifest: Manifest | None,
    teacher: Checkpoint,
    processes: Processes,
    listener: Listener,
) -> _Task:
    """The text, and where and how everything is computed."""
    tokenizer = load_tokenizer(pruned)
    check_tokenizers((pruned, tokenizer), (teacher, load_tokenizer(teacher)))
    settings = pruned.config.get_text_config()
    longest = getattr(settings, "max_position_embeddings", None)
    warn = listener.warn if processes.is_first else lambda _: None
    text = prepare_training(request.healing, tokenizer, settings.vocab_size, longest, processes.count, warn)
    device = layer_device(request.model.device)
    device = f"cuda:{processes.local_rank}" if device == "cuda" else device
    compute = _compute(request, pruned, device)
    return _Task(request, pruned, manifest, teacher, text, device, compute, processes, listener)


def _compute(request: RecoverRequest, pruned: Checkpoint, device: str) -> torch.dtype:
    """The dtype of products; where it was left open, bfloat16 for what is stored in half precision, if it is native."""
    asked = request.healing.compute_dtype
    if asked != "auto":
        return BY_NAME[asked].torch
    is_half = _stored_dtype(pruned).itemsize == 2
    return native_dtype(torch.bfloat16, torch.device(device)) if is_half else torch.float32


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return DTYPES[max(checkpoint.entries, key=lambda entry: entry.numel).dtype].torch


def _heal(task: _Task, claim: Claim | None, started: float, stack: ExitStack) -> RecoverResult | None:
    request, text, healing = task.request, task.text, task.request.healing
    folder = hidden_folder(request.output.absolute())
    if claim is not None:
        folder = stack.enter_context(kept_folder(claim, task.key(), request.delivery.resume, may_go_on=True))
    trained = load_trained(task.pruned, task.device, healing)
    _check_room(task, trained, folder)
    mode, teacher = _teacher(task, trained, folder)
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
        warn_of_large_shards(staging, parse_size(request.delivery.max_shard_size), task.listener)
        peak = peak_memory_bytes(model)
        del student, trained, model
        after = _judge_written(task, teacher, staging)
        result = _report(task, training, after, mode, count, time.perf_counter() - started, peak)
        if not result.is_better:
            task.listener.warn(
                f"{request.output} is no better than {task.pruned.source} on held-out text: KL {after.kl:.4f} nats, "
                f"and {training.before.kl:.4f} before. Try a smaller --learning-rate, or more text."
            )
        _describe(task, result, staging, checksums)
    return result


def _check_room(task: _Task, trained: TrainedModel, folder: Path) -> None:
    """Make sure that the checkpoints and the result will find room.

    Raises:
        OutputError: they will not.
    """
    if not task.processes.is_first:
        return
    needed, free = bytes_of(trained.trained) + task.pruned.size_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent} has room for {free:,} bytes, and the checkpoints of the training and the result take "
            f"{needed:,}. Make room there, choose another --output, or train less: --train mlp, --lora 16."
        )


def _teacher(task: _Task, trained: TrainedModel, folder: Path) -> tuple[str, Teacher]:
    """The teacher, and the mode that it runs in."""
    teaching, temperature = task.request.teaching, task.request.healing.temperature
    stored = _stored_dtype(task.teacher)
    dtype = stored if native_dtype(stored, torch.device(task.device)) == stored else torch.float32
    mode = teaching.teacher_mode
    if mode == "auto":
        size_bytes = dtype.itemsize * task.teacher.parameter_count + BYTES_PER_WEIGHT * trained.trained
        is_small = teaching.teacher_cache is None and size_bytes < MOST_OF_MEMORY * _free_memory(task.device)
        mode = "resident" if is_small else "streamed"
    if mode == "resident":
        task.listener.stage("Loading the teacher", 1)
        model = load_model(task.teacher, task.device, str(dtype).removeprefix("torch."))
        task.listener.advance(1)
        return mode, ResidentTeacher(model.requires_grad_(False), temperature, task.compute)
    place = teaching.teacher_cache or folder / "teacher"
    windows = torch.cat([task.text.windows, task.text.held_out])
    layered = LayeredModel(understand(task.teacher), task.device.partition(":")[0], task.compute)
    streamed = None
    if task.processes.is_first:
        check_folder(place, "--teacher-cache")
        streamed = stream_teacher(layered, windows, temperature, place, task.listener)
    task.processes.broadcast(None)  # the others read what the first one wrote
    return mode, streamed or stream_teacher(layered, windows, temperature, place, task.listener)


def _free_memory(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _judge_written(task: _Task, teacher: Teacher, folder: Path) -> HeldOut:
    """What was written, loaded as anybody loads it."""
    healing = task.request.healing
    task.listener.stage("Judging what was written", 1)
    with open_checkpoint(ModelReference(str(folder), trust_remote_code=task.pruned.trust_remote_code), True) as written:
        dtype = str(_stored_dtype(written) if task.compute == torch.bfloat16 else torch.float32)
        model = load_model(written, task.device, dtype.removeprefix("torch."))
        student = Student(model, healing.loss, healing.temperature, task.compute)
        found = judge(student, teacher, task.text, healing.temperature, ALONE)
    task.listener.advance(1)
    return found


def _report(
    task: _Task, training: Training, after: HeldOut, mode: str, trained: int, seconds: float, peak: int
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
        is_better=after.kl < training.before.kl,
        best_tokens=training.best.tokens,
        curve=training.curve,
        seconds=seconds,
        peak_memory_bytes=peak,
    )


def _describe(task: _Task, result: RecoverResult, folder: Path, checksums: dict[str, str]) -> None:
    """Write the card and the manifest of a folder."""
    manifest = task.manifest or Manifest(source=task.teacher.source, revision=task.teacher.revision)
    said = json.loads(json.dumps({**asdict(result), "options": asdict(task.request.healing), "versions": versions()}))
    manifest = replace(manifest, healing=said, export=None)
    pruned = manifest if manifest.is_pruned else None
    write_card(folder, task.pruned, pruned, load_format("safetensors"), runtime_fits(task.pruned.config))
    write_manifest(folder, replace(manifest, files=list_files(folder, checksums)))
