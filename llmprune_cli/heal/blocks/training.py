"""The training of one layer: what it makes of the pruned model's residual stream becomes the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import get_cosine_schedule_with_warmup

from llmprune_cli.errors import DivergedError
from llmprune_cli.heal.layers import relative_error
from llmprune_cli.heal.training.trainer import BETAS, warm_up_steps
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.run.layer import Layer, windows_together


@dataclass(frozen=True)
class Streams:
    """Residual streams of all windows, those that are learned from and those that are held out, [N + M, T, D]."""

    pruned: torch.Tensor
    teacher: torch.Tensor


def train_layer(layer: Layer, weights: list[torch.Tensor], streams: Streams, text: TrainingText, rate: float) -> None:
    """Train weights of a layer to turn the pruned stream before it into the teacher's behind it.

    A block with its non-linearity is fitted, and not one matrix after the other (arXiv 2510.14444).

    Raises:
        DivergedError: the loss is no number.
    """
    schedule = text.schedule
    optimizer = torch.optim.AdamW(weights, rate, BETAS, weight_decay=0.0)
    slower = get_cosine_schedule_with_warmup(optimizer, warm_up_steps(schedule.steps), schedule.steps)
    for number, rows in enumerate(text.order.split(schedule.together), 1):
        loss = _loss(layer, streams, rows)
        if not bool(loss.isfinite()):
            raise DivergedError(
                f"The loss became NaN or infinite in step {-(-number // schedule.accumulated)} of a layer, so nothing "
                f"was written. Give a smaller --learning-rate than {rate:g}."
            )
        (loss / schedule.accumulated).backward()
        if number % schedule.accumulated == 0:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            slower.step()
            optimizer.zero_grad()


@torch.no_grad()
def judge_layer(layer: Layer, streams: Streams, text: TrainingText) -> float:
    """The relative error of what a layer makes of held-out text, see `relative_error`."""
    numbers, total = torch.arange(len(text.windows), len(streams.pruned)), 0.0
    for rows in numbers.split(windows_together(text.held_out)):
        total += len(rows) * float(_loss(layer, streams, rows))
    return total / len(numbers)


def _loss(layer: Layer, streams: Streams, rows: torch.Tensor) -> torch.Tensor:
    made = layer.run(streams.pruned[rows].to(layer.device))
    assert made is not None
    return relative_error(made, streams.teacher[rows].to(layer.device))
