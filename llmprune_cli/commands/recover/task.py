"""What is healed, by whom and on what: everything that is known before anything is trained."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch

from llmprune_cli.commands.prune.decision import layer_device
from llmprune_cli.commands.recover.request import RecoverRequest, teacher_explained
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import DivergedError, NoNumbersError, OutputError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.manifest import Manifest
from llmprune_cli.folder.scratch import bytes_in, check_folder
from llmprune_cli.folder.tensors import BY_NAME, split_name
from llmprune_cli.heal.figures import RateTrial
from llmprune_cli.heal.layers import stands_for
from llmprune_cli.heal.options import Healing, usual_learning_rate
from llmprune_cli.heal.student import TrainedModel
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.teacher.repeated import Repeated
from llmprune_cli.heal.teacher.resident import ResidentTeacher
from llmprune_cli.heal.teacher.streamed import stream_teacher
from llmprune_cli.heal.teacher.token_map import TokenMap, map_tokens
from llmprune_cli.heal.training.checkpoints import CHECKPOINTS, bytes_of
from llmprune_cli.heal.training.learning_rate import best_rate
from llmprune_cli.heal.training_text import TrainingText, prepare_training, tokens_together, warn_of_learned_text
from llmprune_cli.heal.training_text.cutting import check_own_text
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal, other_run
from llmprune_cli.journal.keys import differences, model_identity, text_identity, versions
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import Processes
from llmprune_cli.progress import Listener
from llmprune_cli.run.calibration import SeenText
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.precision import native_dtype
from llmprune_cli.run.states import are_worth_keeping, states_bytes
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.own_text import Place, write_text
from llmprune_cli.source.tokenizer import load_tokenizer, model_reader, warn_of_other_reading
from llmprune_cli.text.conversations import Spelled
from llmprune_cli.text.corpus import Corpus, own_corpus
from llmprune_cli.text.names import SELF

MODE = "teacher-mode"  # the record of it
BYTES_PER_WEIGHT = {"adamw": 16, "adamw-8bit": 10}  # that is trained: itself, its gradient, and two moments of that
FROM_PRUNING = 100_000  # added to the seed of a text that the teacher writes, for `prune` calibrates on what it writes
WINDOWS_READ = 64  # of the text, by which it is told how many of its tokens the student lacks,
LITTLE_WENT = 0.005  # and how many are few
FINAL = (NoNumbersError, DivergedError)  # errors to which a healing would come again
MOST_OF_MEMORY = 0.8  # that a resident teacher may take together with the training


@dataclass(frozen=True)
class Task:
    """What is healed, by whom and on what: known before anything is trained."""

    request: RecoverRequest
    pruned: Checkpoint
    manifest: Manifest | None  # of the pruned model
    teacher: Checkpoint
    tokens: TokenMap | None  # how the pruned model's are the teacher's, where it has fewer
    layers: tuple[int, ...]  # see `stands_for`; none where no hidden states are compared
    text: TrainingText
    device: str
    compute: torch.dtype  # of products
    processes: Processes
    listener: Listener

    @property
    def size(self) -> int:
        """Parameters of what is trained at a time: of the model, or of one of its layers, in the mean."""
        if self.request.healing.mode != "blocks":
            return self.pruned.parameter_count
        within = sum(entry.numel for entry in self.pruned.entries if split_name(entry.name)[1])
        return within // int(self.pruned.config.get_text_config().num_hidden_layers)

    @cached_property
    def share_that_went(self) -> float:
        """Of the tokens of the text, as the teacher would read it: those that the student lacks."""
        windows = self.text.windows[:: -(-len(self.text.windows) // WINDOWS_READ)]
        return 0.0 if self.tokens is None else self.tokens.share_that_went(windows)

    @property
    def lacks_what_went(self) -> bool:
        """Whether the student has fewer tokens than the teacher, and the text, which the teacher did not write, shows
        next to nothing of that.
        """
        return self.tokens is not None and self.text.corpus.name != SELF and self.share_that_went < LITTLE_WENT

    @property
    def learns_predictions(self) -> bool:
        """Whether anything of the teacher is learned, and it is not there to judge by alone."""
        return self.request.healing.loss_weights.kl > 0 or bool(self.layers)

    @property
    def _text(self) -> list[torch.Tensor]:
        """Everything that says what is learned and judged by."""
        text = self.text
        parts = text.windows, text.order, text.held_out, text.learned, text.held_out_judged
        return [own for own in parts if own is not None]

    def learning_rate(self, trials: tuple[RateTrial, ...]) -> float:
        """The largest one.

        Args:
            trials: of others, where there were any.
        """
        asked, steps = self.request.healing.learning_rate, self.text.schedule.steps
        if trials:
            return best_rate(trials, self.size, steps)
        return usual_learning_rate(self.size, steps) if asked is None or asked == "auto" else asked

    def key(self) -> dict[str, Any]:
        """Everything that decides what is written."""
        sides = (("pruned", self.pruned), ("teacher", self.teacher))
        identities = {f"{side} {name}": v for side, own in sides for name, v in model_identity(own).items()}
        return {
            **identities,
            "token map": None if self.tokens is None else self.tokens.identity(),
            "windows": text_identity(*self._text),  # of the text, whose name is below
            "schedule": asdict(self.text.schedule),
            "device": self.device,
            "compute": str(self.compute),
            "processes": self.processes.count,
            "versions": versions(),
            **asdict(self.request.healing),
        }


def open_teacher(reference: ModelReference, request: RecoverRequest, stack: ExitStack) -> Checkpoint:
    """The model to learn from.

    Raises:
        CheckpointError: it cannot be read.
    """
    with teacher_explained(request, reference):
        return stack.enter_context(open_checkpoint(reference, need_weights=True))


def prepare(
    request: RecoverRequest,
    pruned: Checkpoint,
    manifest: Manifest | None,
    teacher: Checkpoint,
    processes: Processes,
    listener: Listener,
    apart: torch.Tensor | None = None,
) -> Task:
    """The text, and where and how everything is computed.

    Args:
        apart: see `prepare_training`.
    """
    layers = _layers_compared(request.healing, pruned, manifest, teacher)
    reader, of_teacher = model_reader(pruned), load_tokenizer(teacher)
    if processes.is_first:
        warn_of_other_reading(pruned, reader.tokenizer, listener.warn)
    tokens = map_tokens((pruned, reader.tokenizer), (teacher, of_teacher))
    request = replace(request, healing=request.healing.decided(tokens is not None))
    warn = listener.warn if processes.is_first else lambda _: None
    write = partial(_write_text, request, teacher, processes, listener)
    seen = SeenText.of(manifest.calibration) if manifest is not None else None
    device = layer_device(request.model.device)
    device = f"cuda:{processes.local_rank}" if device == "cuda" else device
    text = prepare_training(
        request.healing,
        reader,
        processes.count,
        tokens_together(device),
        warn,
        write,
        None if seen is None else (seen, reader.tokenizer if tokens is None else of_teacher),
        apart,
    )
    if manifest is not None:
        warn_of_learned_text(manifest.healing, text.corpus, request.healing.text_split, pruned.source, warn)
    compute = _compute(request, pruned, device)
    return Task(request, pruned, manifest, teacher, tokens, layers, text, device, compute, processes, listener)


def say_what_text_lacks(task: Task) -> None:
    """Warn of text that was spelled alike before."""
    if task.processes.is_first:
        task.listener.warn(
            f"{task.share_that_went:.2%} of the tokens of {task.text.corpus.origin} went, so it teaches little of how "
            f"to spell these. Heal on text that no token was ranked by, too, or on {SELF}: what the teacher writes."
        )


def _layers_compared(
    healing: Healing, pruned: Checkpoint, manifest: Manifest | None, teacher: Checkpoint
) -> tuple[int, ...]:
    """See `Task.layers`."""
    if healing.mode != "blocks" and not healing.hidden_weight:
        return ()
    return stands_for(pruned, manifest, teacher, "--mode blocks" if healing.mode == "blocks" else "--hidden-weight")


def _write_text(
    request: RecoverRequest, teacher: Checkpoint, processes: Processes, listener: Listener, tokens: int
) -> Corpus:
    """Text that the teacher writes itself, in the first process, for all."""
    text = Spelled("")
    device = request.model.device
    if processes.is_first:
        tokenizer = load_tokenizer(teacher)
        check_own_text(request.healing, tokenizer, teacher.source)
        place = Place(device, native_dtype(teacher.stored_dtype, torch.device(layer_device(device))))
        seed = request.healing.seed + FROM_PRUNING
        text = write_text(teacher, tokenizer, place, tokens, seed, listener)
    return own_corpus(processes.broadcast(text), teacher.source)


def _compute(request: RecoverRequest, pruned: Checkpoint, device: str) -> torch.dtype:
    """The dtype of products; where it was left open, bfloat16 for what is stored in half precision, if it is native."""
    asked = request.healing.compute_dtype
    if asked != "auto":
        return BY_NAME[asked].torch
    is_half = pruned.stored_dtype.itemsize == 2
    return native_dtype(torch.bfloat16, torch.device(device)) if is_half else torch.float32


def check_room(task: Task, trained: TrainedModel, folder: Path) -> None:
    """Make sure that the checkpoints and the result will find room.

    Raises:
        OutputError: they will not.
    """
    if not task.processes.is_first:
        return
    needed, free = _bytes_to_write(task, trained, folder), shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent} has room for {free:,} bytes, and the checkpoints of the training and the result take "
            f"{needed:,}. Make room there, choose another --output, or train less: --train layers, --lora 16."
        )


def _bytes_to_write(task: Task, trained: TrainedModel, folder: Path) -> int:
    """Of the checkpoints of the training and of the result, without those of the checkpoints that lie in the folder."""
    return bytes_of(trained.trained) + task.pruned.size_bytes - bytes_in(folder, CHECKPOINTS)


def check_mode(task: Task, folder: Path) -> None:
    """Make sure that a run that goes on was begun with the mode of the teacher that is asked for, if one is.

    Args:
        folder: with the work so far.

    Raises:
        PlanError: it was begun with the other one.
    """
    asked, record, begun = _asked_mode(task), folder / f"{MODE}{Json.suffix}", "auto"
    with suppress(ValueError):  # there is none, or it is damaged, which is said where it is needed
        begun = Json[str](str).read(record)
    if "auto" not in (asked, begun) and asked != begun:
        raise other_run(folder, differences({MODE: begun}, {MODE: asked}))


def _asked_mode(task: Task) -> str:
    teaching = task.request.teaching
    return "streamed" if teaching.teacher_cache is not None else teaching.teacher_mode


def _choose_mode(task: Task, trained: TrainedModel, dtype: torch.dtype) -> str:
    """The mode that was asked for, or else the one for which there is memory.

    Args:
        dtype: of a teacher in memory.
    """
    asked = _asked_mode(task)
    if asked != "auto" or task.request.healing.needs_all_of_teacher:
        return "resident" if asked == "auto" else asked
    training_bytes = BYTES_PER_WEIGHT[task.request.healing.optimizer] * trained.trained + trained.summed_bytes
    size_bytes = dtype.itemsize * task.teacher.parameter_count + training_bytes
    is_small = size_bytes < MOST_OF_MEMORY * _free_memory(task.device, task.processes)
    return "resident" if is_small else "streamed"


def choose_teacher(task: Task, trained: TrainedModel, folder: Path) -> tuple[str, Teacher]:
    """The teacher, and the mode that it runs in."""
    teaching, temperature = task.request.teaching, task.request.healing.temperature
    stored = task.teacher.stored_dtype
    is_native = native_dtype(stored, torch.device(task.device)) == stored and task.compute != torch.float32
    dtype = stored if is_native else torch.float32
    journal = Journal(task.processes, folder if task.processes.is_first else None)
    choose = partial(_choose_mode, task, trained, dtype)
    mode = journal.recall(MODE, Json(str), choose)  # as it began, whatever memory is free by now
    if mode == "resident":
        task.listener.stage("Loading the teacher", 1)
        model = load_model(task.teacher, task.device, str(dtype).removeprefix("torch."))
        task.listener.advance(1)
        how = temperature, task.compute, task.tokens, task.layers, _repeated(task, trained, folder)
        return mode, ResidentTeacher(model.requires_grad_(False), *how)
    place = teaching.teacher_cache or folder / "teacher"
    runs_on_all = task.learns_predictions or teaching.teacher_cache is not None  # which others may learn from
    windows = torch.cat([task.text.windows, task.text.held_out]) if runs_on_all else task.text.held_out
    layered = LayeredModel(understand(task.teacher), task.device.partition(":")[0], task.compute)
    given = layered, windows, temperature, place, task.listener, task.tokens, task.layers
    stream, streamed = partial(stream_teacher, *given), None
    if task.processes.is_first:
        check_folder(place, "--teacher-cache")
        is_one_disk = place.stat().st_dev == folder.stat().st_dev
        streamed = stream(kept_free=_bytes_to_write(task, trained, folder) if is_one_disk else 0)
    task.processes.broadcast(None)  # the others read what the first one wrote
    streamed = streamed or stream()
    return mode, streamed if runs_on_all else replace(streamed, first=len(task.text.windows))


def _repeated(task: Task, trained: TrainedModel, folder: Path) -> Repeated | None:
    """What keeps what a teacher in memory makes of text that comes again: text that is trained on if there is room.

    It is decided as it was when the run began, whatever room there is by now, since it decides which windows run alone.
    None in a process that does not see the folder.
    """

    def has_room() -> bool:
        text = task.text
        if not task.learns_predictions or task.layers or len(text.order) == len(text.windows) or not folder.is_dir():
            return False
        tokens = text.windows.numel() + text.held_out.numel()
        size_bytes = states_bytes(tokens, task.teacher.config.get_text_config().hidden_size, 1) * task.processes.count
        left = shutil.disk_usage(folder).free - _bytes_to_write(task, trained, folder)
        return size_bytes <= left and are_worth_keeping(size_bytes, folder)

    journal = Journal(task.processes, folder if task.processes.is_first else None)
    with_trained = journal.recall("teacher-repeats", Json(bool), has_room)
    return Repeated.of(task.text, folder, with_trained) if folder.is_dir() else None


def _free_memory(device: str, processes: Processes) -> int:
    """Bytes that each process may take."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what torch keeps for later is free, too
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // processes.count
