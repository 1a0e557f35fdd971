"""The learning rate: what is usual for a model's size and the number of steps, or what a few short trials find."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from llmprune_cli.errors import VerificationError
from llmprune_cli.heal.figures import RateTrial
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.options import usual_learning_rate
from llmprune_cli.heal.training.trainer import Lesson, loss_after
from llmprune_cli.heal.training_text import TrainingText

TRIAL_STEPS = 16  # of the optimizer, at most
MOST_TRIALS = 6
START = "start.safetensors"


def best_rate(trials: tuple[RateTrial, ...], parameters: int, steps: int) -> float:
    """The rate for so many steps that is as many times the usual one as the best trial's was for its own steps."""
    best = min(trials, key=_loss)
    return best.learning_rate * usual_learning_rate(parameters, steps) / usual_learning_rate(parameters, best.steps)


Judge = Callable[[float, TrainingText], float]  # from a rate and a text to the held-out loss after a training on it


def search_rates(parameters: int, text: TrainingText, judge: Judge) -> tuple[RateTrial, ...]:
    """Try the usual rate, and then ones twice as large, or else half as large, as long as they are better.

    Args:
        text: whose first steps are tried.
    """
    steps = min(TRIAL_STEPS, text.schedule.steps)
    begun = replace(
        text,
        order=text.order[: steps * len(text.order) // text.schedule.steps],
        schedule=replace(text.schedule, steps=steps, between=steps),
    )
    trials: list[RateTrial] = []

    def is_best(rate: float) -> bool:
        try:
            loss = judge(rate, begun)
        except VerificationError:
            loss = math.inf
        trials.append(RateTrial(rate, steps, loss if math.isfinite(loss) else None))
        return _loss(trials[-1]) < min(map(_loss, trials[:-1]), default=math.inf)

    usual = usual_learning_rate(parameters, steps)
    is_best(usual)
    for factor in (2.0, 0.5):
        rate = usual * factor
        while is_best(rate) and len(trials) < MOST_TRIALS:
            rate *= factor
        if min(trials, key=_loss).learning_rate != usual:
            break
    return tuple(trials)


def _loss(trial: RateTrial) -> float:
    return math.inf if trial.loss is None else trial.loss


def search_learning_rates(student: Student, lesson: Lesson, parameters: int, folder: Path) -> tuple[RateTrial, ...]:
    """Try rates on a student, whose weights are afterwards what they were.

    Args:
        folder: where they lie meanwhile.
    """
    if lesson.processes.is_first:
        save_file(student.state_dict(), folder / START)
    lesson.processes.broadcast(None)  # all of them read it

    def judge(rate: float, text: TrainingText) -> float:
        try:
            return loss_after(student, replace(lesson, text=text, learning_rate=rate), folder)
        finally:
            student.load_state_dict(load_file(folder / START))

    lesson.listener.stage("Trying learning rates", 0)
    trials = search_rates(parameters, lesson.text, judge)
    lesson.processes.broadcast(None)  # none of them needs it any more
    if lesson.processes.is_first:
        (folder / START).unlink()
    return trials
