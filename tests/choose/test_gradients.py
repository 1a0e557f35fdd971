"""Importance by the gradient of the loss, and of layers by leaving them out, both against the whole stock model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune_cli.choose.gradients import measure_gradients
from llmprune_cli.choose.measuring import Activity
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.family.widths import Width
from llmprune_cli.run.states import DenseStates
from support.opened import Opened
from support.stock import stock_loss


def taylor(opened: Opened, folder: Path) -> tuple[Activity, dict[str, torch.Tensor]]:
    """The scores, and |g·w| of every parameter of the stock model by plain autograd."""
    states = folder / "states"
    states.mkdir()
    activity = measure_gradients(opened.layered, opened.tokens, DenseStates(states), lambda n: None)
    assert not [*states.iterdir()]
    stock_loss(opened.model, opened.tokens).backward()
    named = opened.model.named_parameters()
    return activity, {name: (p.grad * p).abs().detach().double() for name, p in named}


def assert_equal(scores: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_taylor_scores_are_those_of_plain_autograd(opened: Opened, tmp_path: Path) -> None:
    activity, found = taylor(opened, tmp_path)
    own = {name.split("layers.1.")[1]: product for name, product in found.items() if "layers.1." in name}
    gate, up, down = (own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    neurons = gate.sum(1) + up.sum(1) + down.sum(0) + own["mlp.gate_proj.bias"] + own["mlp.up_proj.bias"]
    assert_equal(activity.scores["intermediate_size"][Instance(1)], neurons)
    rows = {n: own[f"self_attn.{n}_proj.weight"].sum(1) + own[f"self_attn.{n}_proj.bias"] for n in "qkv"}
    heads = (rows["q"] + own["self_attn.o_proj.weight"].sum(0)).view(8, -1).sum(1)
    assert_equal(activity.scores[Width.HEADS][Instance(1)], heads)
    assert_equal(
        activity.scores[Width.GROUPS][Instance(1)], (rows["k"] + rows["v"]).view(2, -1).sum(1) + heads.view(2, 4).sum(1)
    )
    channels = torch.zeros(64, dtype=torch.float64)
    for name, product in found.items():
        writes = any(word in name for word in ("o_proj", "down_proj", "norm"))
        if "layers." in name and (writes or product.ndim == 2):
            channels += product if product.ndim == 1 else product.sum(1 if writes else 0)
    assert_equal(activity.scores["hidden_size"][Instance()], channels)


@pytest.mark.parametrize("opened", ["gpt2"], indirect=True)
def test_taylor_knows_fused_and_transposed_weights(opened: Opened, tmp_path: Path) -> None:
    activity, found = taylor(opened, tmp_path)
    own = {name.split("h.2.")[1]: product for name, product in found.items() if "h.2." in name}
    neurons = own["mlp.c_fc.weight"].sum(0) + own["mlp.c_fc.bias"] + own["mlp.c_proj.weight"].sum(1)
    assert_equal(activity.scores["intermediate_size"][Instance(2)], neurons)
    fused = (own["attn.c_attn.weight"].sum(0) + own["attn.c_attn.bias"]).view(3, 8, -1).sum((0, 2))
    assert_equal(activity.scores[Width.HEADS][Instance(2)], fused + own["attn.c_proj.weight"].sum(1).view(8, -1).sum(1))


@pytest.mark.parametrize("opened", ["mixtral"], indirect=True)
def test_taylor_scores_experts_and_their_neurons(opened: Opened, tmp_path: Path) -> None:
    activity, found = taylor(opened, tmp_path)
    up, down = (found[f"model.layers.3.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    router = found["model.layers.3.mlp.gate.weight"]
    assert_equal(activity.scores[Width.EXPERTS][Instance(3)], up.sum((1, 2)) + down.sum((1, 2)) + router.sum(1))
    neurons = up.sum(2).view(6, 2, -1).sum(1) + down.sum(1)
    for expert in range(6):
        assert_equal(activity.scores["intermediate_size"][Instance(3, (expert,))], neurons[expert])


@pytest.mark.parametrize("opened", ["glm4_moe"], indirect=True)
def test_neurons_of_an_expert_that_no_token_reaches_are_ranked_by_weight(
    opened: Opened,
    tmp_path: Path,
) -> None:
    activity, found = taylor(opened, tmp_path)
    unreached = found["model.layers.3.mlp.experts.down_proj"].sum((1, 2)) == 0
    assert unreached.any() and not unreached.all()
    experts = opened.model.model.layers[3].mlp.experts
    squares = experts.gate_up_proj.double().square().sum(2).view(6, 2, -1).sum(1)
    squares = squares + experts.down_proj.double().square().sum(1)
    for expert in unreached.nonzero().flatten().tolist():
        assert_equal(activity.scores["moe_intermediate_size"][Instance(3, (expert,))], squares[expert].detach())
