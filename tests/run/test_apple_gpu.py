"""What runs on an Apple GPU asks it for no float64, which it does not have."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from llmprune_cli.choose.gradients import add_saliences, pull_back
from llmprune_cli.choose.selection import make_plan
from llmprune_cli.family.widths import Width
from llmprune_cli.options import Choice, WidthRequest
from llmprune_cli.plan.requested_widths import resolve
from llmprune_cli.plan.units import Scores
from llmprune_cli.progress import QUIET
from llmprune_cli.repair.dense_goals import Streams
from llmprune_cli.repair.layer_refit import LayerRefit
from llmprune_cli.run.perplexity import FirstModel, evaluate_perplexity
from llmprune_cli.run.workbench import Workbench
from support.apple_gpu import AppleGpu
from support.opened import Opened

mixture = pytest.mark.parametrize("opened", ["mixtral"], indirect=True)


def test_what_is_on_the_gpu_is_told_from_what_is_not() -> None:
    weight = torch.ones(2, 3)
    with AppleGpu():
        for refused in (lambda: weight.double(), lambda: weight.sum(dtype=torch.float64).cpu()):
            with pytest.raises(TypeError, match="float64"):
                refused()
        moved = weight.cpu()
        assert (weight.device.type, moved.device.type, weight.new_zeros(1).device.type) == ("mps", "cpu", "mps")
        assert float(moved.double().sum()) == 6
        with pytest.raises(TypeError, match="float64"):
            moved.to(weight.device).double()


@mixture
def test_units_are_scored_without_float64_on_the_gpu(opened: Opened) -> None:
    scores: Scores = {}
    layer = opened.layered.load_layer(0)
    states = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(3))
    gradients = pull_back(layer, states, torch.ones_like(states))
    with AppleGpu(), torch.no_grad():
        add_saliences(scores, opened.layered, layer, 0, gradients)
    assert {Width.EXPERTS, Width.HEADS, Width.HIDDEN} < scores.keys()


@mixture
def test_models_are_compared_without_float64_on_the_gpu(opened: Opened, tmp_path: Path) -> None:
    first, other = FirstModel(tmp_path), copy.deepcopy(opened.model)
    with AppleGpu():
        own = evaluate_perplexity(opened.model, opened.tokens, 2, lambda state: None, first=first, is_first=True)
        again = evaluate_perplexity(other, opened.tokens, 2, lambda state: None, first=first)
    assert own.perplexity == again.perplexity and again.kl == pytest.approx(0, abs=1e-6)


@mixture
def test_weights_are_solved_without_float64_on_the_gpu(opened: Opened, tmp_path: Path) -> None:
    subject = opened.subject
    request = WidthRequest(intermediate_pruning_ratio=0.5, num_attention_heads=4)
    target = resolve(subject.architecture, subject.trace.refused, request)
    plan = make_plan(Workbench(opened.layered, None, QUIET), target, Choice(importance="magnitude", refit="none"))
    layer = opened.layered.load_layer(0)
    with torch.inference_mode():
        start = opened.layered.embed(opened.tokens[:2])
        with AppleGpu():
            streams = Streams(start.clone().cpu(), start.cpu(), 2)
            report = LayerRefit(layer, opened.layered, plan, 0, streams).run("residual")
    assert report.refit_error < report.removal_error
