"""How well a model does on held-out text."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from llmprune_cli.errors import NoNumbersError
from llmprune_cli.heal.figures import HeldOut
from llmprune_cli.heal.loss import Student, divergence, only, parts
from llmprune_cli.heal.teacher import Teacher
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.processes import Processes
from llmprune_cli.run.perplexity import bits_per_byte


def judge(student: Student, teacher: Teacher, text: TrainingText, temperature: float, processes: Processes) -> HeldOut:
    """Run held-out text, of which each process takes its share.

    Args:
        teacher: whose numbers of held-out windows follow those of the others.
    """
    judged = text.held_out_judged
    shares = processes.share(torch.arange(len(text.held_out)))
    kl, lost = 0.0, 0.0
    device = next(student.parameters()).device
    with torch.no_grad(), student.head_cast_once():
        for number in shares.tolist():
            window = text.held_out[number : number + 1].to(device)
            counted = None if judged is None else judged[number].to(device)
            goal = teacher.judged_goal(window, torch.tensor([len(text.windows) + number]))
            hidden, following = student.hidden_states(window), window[0, 1:]
            for places in parts(len(hidden), student.vocabulary):
                chosen = None if counted is None else counted[places]
                logits = student.logits(only(hidden[places], chosen))
                kl += float(divergence(logits, goal.at(places).only(chosen), temperature)) / temperature**2
                lost += float(functional.cross_entropy(logits, only(following[places], chosen), reduction="sum"))
    kl, lost = processes.add_up(kl, lost)
    return held_out(kl, lost, text)


def held_out(kl: float, lost: float, text: TrainingText) -> HeldOut:
    """From sums over all held-out tokens that count, in nats; what is no number is infinite."""
    tokens = text.judged_tokens
    kl, lost = (own if math.isfinite(own) else math.inf for own in (kl, lost))
    perplexity = math.exp(min(lost / tokens, 700)) if math.isfinite(lost) else math.inf
    return HeldOut(max(0.0, kl / tokens), perplexity, bits_per_byte(lost, text.held_out_bytes))


def check_judged(found: HeldOut) -> HeldOut:
    """Hold that models which nothing was done to yet predict numbers.

    Raises:
        NoNumbersError: they do not.
    """
    if not (math.isfinite(found.kl) and math.isfinite(found.perplexity)):
        raise NoNumbersError(
            "The pruned model or its teacher turns text into NaN or into numbers that the computation cannot hold. "
            "Its weights are damaged, or --compute-dtype is too narrow for it."
        )
    return found
