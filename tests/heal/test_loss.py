"""The loss, formed a few tokens at a time, is the loss of all tokens at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from llmprune_cli.heal import loss as losses
from llmprune_cli.heal.loss import Predicted, Student, divergence
from llmprune_cli.heal.teacher.resident import ResidentTeacher

KINDS = ("kl", "ce", "kl+ce")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_all_tokens_at_once(
    dense: Path, pruned: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", 7 * 96)  # logits of seven tokens
    teacher, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, pruned))
    windows = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    logits, wanted = model(windows).logits[:, :-1] / 2, teacher(windows).logits[:, :-1] / 2
    kl = functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
    expected = torch.zeros(())
    if "kl" in kind:
        expected = expected + 4 * kl.sum(-1).mean()
    if "ce" in kind:
        expected = expected + functional.cross_entropy(2 * logits.flatten(0, 1), windows[:, 1:].flatten())
    expected.backward()
    plain = {name: own.grad for name, own in model.named_parameters()}
    model.zero_grad()
    student = Student(model, kind, 2.0, torch.float32)
    goal = ResidentTeacher(teacher, 2.0, torch.float32).goal(windows, torch.arange(3))
    found = student(windows, goal)
    (3 * found).backward()
    torch.testing.assert_close(found, expected)
    for name, own in model.named_parameters():
        torch.testing.assert_close(own.grad, 3 * plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_likeliest_tokens_and_all_others_as_one_are_nearly_the_whole_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (6 * torch.randn(40, 96, generator=generator) for _ in range(2))
    logs = teacher.log_softmax(-1)
    exact = divergence(student, Predicted(logs), 1.0)
    for count, tolerance in ((96, 1e-6), (24, 0.01)):
        likeliest = logs.topk(count)
        others = logs.scatter(-1, likeliest.indices, -torch.inf).logsumexp(-1)
        kept = Predicted(likeliest.values, likeliest.indices, others if count < 96 else None)
        found = divergence(student, kept, 1.0)
        assert exact * (1 - tolerance) <= found <= exact * 1.000001
