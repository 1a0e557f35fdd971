"""How well a model does on held-out text, with one of its layers in memory at a time."""

from __future__ import annotations

import torch
from torch.nn import functional

from llmprune_cli.heal.figures import HeldOut
from llmprune_cli.heal.judging import held_out
from llmprune_cli.heal.loss import divergence
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.progress import Listener
from llmprune_cli.run.divergence import predicted
from llmprune_cli.run.layered_model import LayeredModel


@torch.no_grad()
def judge_layered(model: LayeredModel, teacher: Teacher, text: TrainingText, listener: Listener) -> HeldOut:
    """Run held-out text.

    Args:
        teacher: whose numbers of windows are those of held-out text alone.
    """
    kl, lost = 0.0, 0.0
    for states, items in model.walk(text.held_out):  # noqa: B007 - those behind the last layer are wanted
        listener.advance(1)
    ends = model.load_ends(exact=True, compute=model.compute)
    for number, places, wanted in predicted(ends, text.held_out):
        window = text.held_out[number : number + 1].to(wanted.device)
        logits = ends.logits(states[number : number + 1, places], items)[0]
        goal = teacher.goal(window, torch.tensor([number])).at(places)
        kl += float(divergence(logits, goal, 1.0))
        lost += float(functional.cross_entropy(logits, wanted, reduction="sum"))
    return held_out(kl, lost, text)
