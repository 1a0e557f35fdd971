"""The training: transformers' Trainer with a loss, a judge and a folder of its own."""

from __future__ import annotations

import logging
import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from llmprune_cli.errors import CheckpointError, DivergedError, OutputError, first_line
from llmprune_cli.heal import OPTIMIZERS
from llmprune_cli.heal.figures import HeldOut, Judgement, Training
from llmprune_cli.heal.judging import check_judged, judge
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.options import Healing
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.training.checkpoints import (
    STATE,
    WEIGHTS,
    has_ended,
    keep_last,
    last_checkpoints,
    mark_whole,
)
from llmprune_cli.heal.training.reporters import PROJECT, Reports, end_reports
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.processes import Processes
from llmprune_cli.progress import Listener

WARM_UP = 0.1  # share of the steps in which the rate rises, from nothing in the first one
BETAS = 0.9, 0.95
UNWRITTEN = ("PytorchStreamWriter", "inline_container", "iostream")  # in what torch says of a file that it cannot write
PATIENCE = 3  # judgements without a better one, after which training ends, once the learning rate has half fallen


@dataclass(frozen=True)
class Lesson:
    """Everything that a training needs beside the student."""

    healing: Healing
    teacher: Teacher
    text: TrainingText
    learning_rate: float
    processes: Processes
    listener: Listener
    reports: Reports | None  # of every loss, if they are wanted

    def judge(self, student: Student) -> HeldOut:
        """How a student stands on held-out text."""
        return judge(student, self.teacher, self.text, self.healing.temperature, self.processes)

    def loss(self, found: HeldOut) -> float:
        """What is learned of what was judged, nats per token."""
        return found.loss(self.healing.loss_weights, self.healing.temperature)


def warm_up_steps(steps: int) -> int:
    """In how many of the steps the learning rate rises; the last is none of them."""
    return min(math.ceil(WARM_UP * steps), steps - 1)


class _Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows in the order in which they are learned from, with their numbers."""

    def __init__(self, text: TrainingText) -> None:
        self._text = text

    def __len__(self) -> int:
        return len(self._text.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, learned = self._text.order[index], self._text.learned
        of_all = {} if learned is None else {"learned": learned[number]}
        return {"input_ids": self._text.windows[number], "number": number, **of_all}


class _Distiller(Trainer):
    """A Trainer whose loss is what the student loses against a teacher, and which judges as we do."""

    def __init__(
        self, student: Student, lesson: Lesson, folder: Path, is_trial: bool = False, best_before: Path | None = None
    ) -> None:
        """Of a student.

        Args:
            folder: for checkpoints.
            is_trial: whether nothing is kept, and the model is the last one and not the best.
            best_before: the best checkpoint of a run that this one goes on with.
        """
        self._lesson, on_cpu = lesson, next(student.parameters()).device.type == "cpu"
        schedule = lesson.text.schedule
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.together,
            gradient_accumulation_steps=schedule.accumulated,
            learning_rate=lesson.learning_rate,
            optim=OPTIMIZERS[lesson.healing.optimizer],
            lr_scheduler_type="cosine",
            warmup_steps=warm_up_steps(schedule.steps),
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=1.0,
            eval_strategy="no" if is_trial else "steps",
            eval_steps=schedule.between,
            save_strategy="no" if is_trial else "steps",
            save_steps=schedule.between,
            save_total_limit=None,  # it removes the last one before the next is marked as whole
            load_best_model_at_end=not is_trial,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=True,
            logging_strategy="steps" if lesson.reports else "no",
            logging_steps=1,
            report_to="none",
            project=PROJECT,
            run_name=lesson.reports.run if lesson.reports else None,
            hub_private_repo=True,
            trackio_static_space_id=False,  # which would be a copy for everybody
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
            dataloader_pin_memory=not on_cpu,
            use_cpu=on_cpu,
            seed=lesson.healing.seed,
        )
        for package in ("accelerate", "bitsandbytes"):
            logging.getLogger(package).setLevel(logging.ERROR)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
        callbacks: list[Any] = [] if is_trial else [_StopsInTheEnd(PATIENCE), _Reports(lesson, best_before)]
        if lesson.reports is not None and not is_trial:
            callbacks.append(lesson.reports.begin())
        windows = _Windows(lesson.text)
        super().__init__(student, arguments, train_dataset=windows, eval_dataset=windows, callbacks=callbacks)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(range(len(self._lesson.text.order)))

    def create_optimizer(self, *arguments: Any, **named: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments, **named)
        if self.args.use_cpu and isinstance(optimizer, torch.optim.AdamW) and not self.is_fsdp_enabled:
            _allocate_moments(optimizer)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        windows = inputs["input_ids"]
        goal, healing = self._lesson.teacher.goal(windows, inputs["number"]), self._lesson.healing
        if healing.loss_weights.kl or healing.hidden_weight:
            goal.prepare()
        loss = model(input_ids=windows, goal=goal, learned=inputs.get("learned"))
        (broken,) = self._lesson.processes.add_up(float(not loss.isfinite()))  # all of them end, or none
        if broken:
            raise DivergedError(
                f"The loss became NaN or infinite in step {self.state.global_step + 1}, so nothing was written. Give "
                f"`recover` a smaller --learning-rate than {self._lesson.learning_rate:g}."
            )
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        found = self._lesson.judge(cast(Student, self.model))
        loss = self._lesson.loss(found)
        if not math.isfinite(loss):
            raise DivergedError(
                f"After {self.state.global_step} steps the model predicts NaN, so nothing was written. Give `recover` "
                f"a smaller --learning-rate than {self._lesson.learning_rate:g}."
            )
        metrics = {
            "eval_loss": loss,
            "eval_kl": found.kl,
            "eval_perplexity": found.perplexity,
            "eval_bits_per_byte": found.bits_per_byte,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make what AdamW makes in its first step, before activations come and go, which leave holes around it."""
    for parameter in (own for group in optimizer.param_groups for own in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


class _StopsInTheEnd(EarlyStoppingCallback):
    """Stops where held-out text gains no more, in the second half of the steps.

    Before, the learning rate is so high that a model may well be worse than before, and better once it falls.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
        if 2 * state.global_step > state.max_steps:
            super().on_evaluate(args, state, control, metrics, **given)  # type: ignore[no-untyped-call]


class _Reports(TrainerCallback):
    """Says how far the training is, and marks checkpoints that are whole."""

    def __init__(self, lesson: Lesson, best_before: Path | None) -> None:
        self._lesson, self._note, self._best_before = lesson, "", best_before

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._best_before is not None:  # which the Trainer takes for gone where the folder has moved since
            state.best_model_checkpoint = str(self._best_before)
        self._lesson.listener.stage("Healing", state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._lesson.listener.stand_at(state.global_step, self._note)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        metrics = given["metrics"]
        self._note = f"KL {metrics['eval_kl']:.4f}, perplexity {metrics['eval_perplexity']:,.2f}"
        self._lesson.listener.stand_at(state.global_step, self._note)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            mark_whole(folder, state.global_step)
            keep_last(folder, state.global_step, state.best_model_checkpoint)


def loss_after(student: Student, lesson: Lesson, folder: Path) -> float:
    """The held-out loss of a student after a training of which nothing is kept.

    Raises:
        DivergedError: the loss is no number.
    """
    trainer = _Distiller(student, lesson, folder, is_trial=True)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def _train(
    student: Student, lesson: Lesson, folder: Path, begun: Path | None, best_before: Path | None
) -> TrainerState:
    """Train a student, which then has the weights of the best state.

    Args:
        begun, best_before: the last and the best checkpoint of a run that this one goes on with.

    Raises:
        OutputError: see `train`.
    """
    try:
        trainer = _Distiller(student, lesson, folder, best_before=best_before)
        with redirect_stdout(sys.stderr):  # what others say of it is no result
            try:
                trainer.train(resume_from_checkpoint=str(begun) if begun else None)
            finally:
                end_reports(trainer.callback_handler.callbacks)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in UNWRITTEN):
            raise
        raise OutputError(
            f"The training cannot be kept in {folder}: {first_line(error)}. Make room there, or choose another "
            "--output."
        ) from error
    return trainer.state


def train(student: Student, lesson: Lesson, folder: Path) -> Training:
    """Train a student; what a folder holds of the same run goes on from there.

    Args:
        folder: for checkpoints.

    Raises:
        CheckpointError: a checkpoint in the folder is damaged, or a model predicts no numbers.
        DivergedError: the loss is no number.
        OutputError: a checkpoint cannot be written.
    """
    lesson.listener.stage("Judging on held-out text", 1)
    before = check_judged(lesson.judge(student))
    lesson.listener.advance(1)
    nothing: tuple[Path | None, Path | None] = (None, None)
    begun, best_before = lesson.processes.broadcast(last_checkpoints(folder) if lesson.processes.is_first else nothing)
    if begun and best_before and has_ended(begun) and (best_before / WEIGHTS).is_file():
        others = student.load_state_dict(load_file(best_before / WEIGHTS))
        if others.missing_keys or others.unexpected_keys:
            raise CheckpointError(f"{best_before} has other weights than the model. Leave out --resume to start over.")
        state = TrainerState.load_from_json(str(begun / STATE))
    else:
        state = _train(student, lesson, folder, begun, best_before)
    each = lesson.text.trained_tokens // lesson.text.schedule.steps
    curve = tuple(
        Judgement(
            each * int(entry["step"]), HeldOut(entry["eval_kl"], entry["eval_perplexity"], entry["eval_bits_per_byte"])
        )
        for entry in state.log_history
        if "eval_kl" in entry
    )
    best = min((Judgement(0, before), *curve), key=lambda judged: lesson.loss(judged.held_out))
    return Training(before, curve, state.global_step, state.global_step < state.max_steps, best)
