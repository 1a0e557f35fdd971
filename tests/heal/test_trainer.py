"""What is made before the first step changes nothing that is trained, and training ends where it no longer serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmprune_cli.commands.recover import task
from llmprune_cli.heal.loss import Goal, Student
from llmprune_cli.heal.training.trainer import PATIENCE, _allocate_moments, _StopsInTheEnd
from support.heal_runs import recover


@pytest.mark.parametrize("is_fused", [False, True])
def test_moments_made_early_are_those_that_adamw_makes(is_fused: bool) -> None:
    trained = []
    for is_early in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        optimizer = torch.optim.AdamW([weight], 0.1, fused=is_fused)
        if is_early:
            _allocate_moments(optimizer)
        for _ in range(3):
            weight.grad = torch.randn(5, 3, generator=generator)
            optimizer.step()
        trained.append(weight.detach())
    assert torch.equal(*trained)


def test_training_ends_where_nothing_gains_but_not_while_the_learning_rate_is_high(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True, use_cpu=True
    )
    arguments.metric_for_best_model, arguments.greater_is_better = "eval_loss", False
    callback, ended = _StopsInTheEnd(PATIENCE), []
    for step in range(10, 161, 10):  # after the first judgement, none is better
        state = TrainerState(global_step=step, max_steps=160, best_metric=1.0)
        control = TrainerControl()
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": 1.5})
        if control.should_training_stop:
            ended.append(step)
    assert ended[0] == 80 + 10 * PATIENCE


def test_a_step_is_the_same_however_its_batch_is_cut(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, norms = torch.nn.utils.clip_grad_norm_, list[float]()

    def noting(*given: object, **named: object) -> torch.Tensor:
        norm: torch.Tensor = clip(*given, **named)  # type: ignore[arg-type]
        norms.append(float(norm))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
    for most in (128, 32):  # tokens that run together: all four windows of a batch, or one
        monkeypatch.setattr(task, "tokens_together", lambda device, most=most: most)
        recover(pruned, text_file, tmp_path / str(most), "--tokens", "256")
    together, one_by_one = norms[:2], norms[2:]
    assert together == pytest.approx(one_by_one, rel=1e-3) and together[0] > 0


def test_a_teacher_in_memory_runs_before_the_student_takes_memory_and_not_at_all_for_the_text_alone(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[bool, bool]] = []  # before a step, and by its end
    forward = Student.forward

    def told(own: Student, input_ids: torch.Tensor, goal: Goal, **_: object) -> torch.Tensor:
        before, loss = "made" in vars(goal), forward(own, input_ids, goal)
        ran.append((before, "made" in vars(goal)))
        return loss

    monkeypatch.setattr(Student, "forward", told)
    for loss, expected in (("kl", (True, True)), ("ce", (False, False))):
        ran.clear()
        recover(pruned, text_file, tmp_path / loss, "--teacher-mode", "resident", "--loss", loss)
        assert ran and {*ran} == {expected}
