"""The loss, formed a few tokens at a time, is the loss of all tokens at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmprune_cli.heal import head as heads
from llmprune_cli.heal import loss as losses
from llmprune_cli.heal.judging import judge
from llmprune_cli.heal.loss import Predicted, Student, divergence
from llmprune_cli.heal.options import parse_loss
from llmprune_cli.heal.teacher.repeated import Repeated
from llmprune_cli.heal.teacher.resident import ResidentTeacher
from llmprune_cli.heal.teacher.streamed import DRAWN, LIKELIEST, StreamedTeacher
from llmprune_cli.heal.training_text import Schedule, TrainingText
from llmprune_cli.processes import ALONE
from llmprune_cli.run import states
from llmprune_cli.text.corpus import Corpus

KINDS = {"kl": (1.0, 0.0), "ce": (0.0, 1.0), "kl+ce": (1.0, 1.0), "kl+0.25ce": (1.0, 0.25), "kl+.5ce": (1.0, 0.5)}
REVERSE = {f"reverse-{name}": weights for name, weights in KINDS.items() if name != "ce"}


class OtherProjection(nn.Linear):
    """A projection that is no plain one, though it does the same."""


class InPlace(LlamaForCausalLM):
    """A model that changes what its projection makes."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> CausalLMOutputWithPast:
        logits = self.lm_head(self.model(input_ids=input_ids, **options)[0])
        logits /= 4
        return CausalLMOutputWithPast(logits=logits)


class Bypassing(LlamaForCausalLM):
    """A model that multiplies with its projection's weights itself."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> CausalLMOutputWithPast:
        states = self.model(input_ids=input_ids, **options)[0]
        return CausalLMOutputWithPast(logits=functional.linear(states, self.lm_head.weight))


OWN_FORWARD = {"in place": InPlace, "bypassed": Bypassing}


@pytest.mark.parametrize("projection", ["plain", "biased", "other", *OWN_FORWARD])
@pytest.mark.parametrize("kind", KINDS | REVERSE)
def test_loss_and_gradients_are_those_of_all_tokens_at_once(
    dense: Path, pruned: Path, kind: str, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", 7 * 96)  # logits of seven tokens
    monkeypatch.setattr(heads, "WAITING_ELEMENTS", 15 * 96)
    monkeypatch.setattr(heads, "ROWS", 40)
    teacher, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, pruned))
    if projection == "biased":
        model.lm_head.bias = nn.Parameter(torch.randn(96, generator=torch.Generator().manual_seed(5)))
    elif projection == "other":
        model.lm_head.__class__ = OtherProjection
    elif projection in OWN_FORWARD:
        model.__class__ = OWN_FORWARD[projection]
    windows = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    logits, wanted = model(windows).logits[:, :-1] / 2, teacher(windows).logits[:, :-1] / 2
    sides = (logits.log_softmax(-1), wanted.log_softmax(-1))
    sides = sides[::-1] if kind in REVERSE else sides
    kl = functional.kl_div(*sides, reduction="none", log_target=True)
    of_kl, of_ce = (KINDS | REVERSE)[kind]
    text = functional.cross_entropy(2 * logits.flatten(0, 1), windows[:, 1:].flatten())
    expected = of_kl * 4 * kl.sum(-1).mean() + of_ce * text
    expected.backward()
    plain = {name: own.grad for name, own in model.named_parameters()}
    model.zero_grad()
    student = Student(model, parse_loss(kind), 2.0, torch.float32)
    goal = ResidentTeacher(teacher, 2.0, torch.float32).goal(windows, torch.arange(3))
    found = student(windows, goal)
    (3 * found).backward()
    torch.testing.assert_close(found, expected)
    for name, own in model.named_parameters():
        torch.testing.assert_close(own.grad, 3 * plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_judged_is_what_is_trained(dense: Path, pruned: Path, kind: str) -> None:
    teacher, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, pruned))
    windows = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    text = TrainingText(Corpus("", "", ""), windows[:0], torch.arange(0), windows, 1, Schedule(1, 1, 1, 1))
    weights, own = parse_loss(kind), ResidentTeacher(teacher, 2.0, torch.float32)
    student = Student(model, weights, 2.0, torch.float32)
    trained = student(windows, own.goal(windows, torch.arange(3))).detach()
    assert judge(student, own, text, 2.0, ALONE).loss(weights, 2.0) == pytest.approx(float(trained), rel=1e-5)


def test_tokens_that_are_kept_of_a_teacher_stand_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(4000, 200, generator=generator)
    student = teacher + torch.randn(4000, 200, generator=generator)
    exact = divergence(student, Predicted(teacher.log_softmax(-1)), 1.0)
    logs = torch.empty(1, 4000, LIKELIEST + 1 + DRAWN, dtype=torch.float16)
    tokens = torch.empty(1, 4000, LIKELIEST + DRAWN, dtype=torch.int32)
    kept = StreamedTeacher(logs, tokens, LIKELIEST)
    kept.keep(0, slice(None), teacher.log_softmax(-1), generator)
    goal = kept.goal(torch.zeros(1, 4001), torch.zeros(1, dtype=torch.long))
    assert divergence(student, goal.at(slice(None)), 1.0) == pytest.approx(float(exact), rel=0.005)
    assert abs(float(divergence(teacher, goal.at(slice(None)), 1.0)) / float(exact)) < 0.002


def test_a_teacher_in_memory_runs_once_on_windows_that_come_again(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    windows = torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(1))
    repeated = Repeated(tmp_path, windows[2:], first=2)
    teacher, alone = (ResidentTeacher(model, 1.0, torch.float32, repeated=own) for own in (repeated, None))
    runs: list[int] = []
    counted = model.model.layers[0].register_forward_hook(lambda _, given, __: runs.append(len(given[0])))
    for numbers in ([0, 1], [2, 5], [5, 3], [3, 2], [7], [7], [0, 1]):
        wanted = alone.goal(windows[numbers], torch.tensor(numbers)).at(slice(None)).logs
        runs.pop()
        found = teacher.goal(windows[numbers], torch.tensor(numbers)).at(slice(None)).logs
        torch.testing.assert_close(found, wanted)
    assert runs == [2, 1, 1, 1, 1, 2]  # the first and the last time all at once
    assert not any(tmp_path.iterdir())
    counted.remove()
    alive = weakref.ref(teacher)
    gc.disable()
    try:
        del teacher
        assert alive() is None
    finally:
        gc.enable()


def test_a_teacher_runs_again_where_there_is_no_room_for_what_it_made(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "MOST_OF_FREE_SPACE", 0.0)
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    windows, numbers = torch.arange(48).view(2, 24), torch.arange(2)
    teacher = ResidentTeacher(model, 1.0, torch.float32, repeated=Repeated(tmp_path, windows, first=0))
    runs: list[None] = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(None))
    first, again = (teacher.judged_goal(windows, numbers).at(slice(None)).logs for _ in range(2))
    assert torch.equal(first, again) and len(runs) == 4


def test_the_residual_stream_of_a_teacher_is_there_whatever_is_kept_of_it(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    windows, numbers = torch.arange(48).view(2, 24), torch.arange(2)
    repeated = Repeated(tmp_path, windows, first=0)
    teacher = ResidentTeacher(model, 1.0, torch.float32, layers=(0,), repeated=repeated)
    for _ in range(2):
        assert len(list(teacher.goal(windows, numbers).streams)) == 1
        assert not list(teacher.judged_goal(windows, numbers).streams)
