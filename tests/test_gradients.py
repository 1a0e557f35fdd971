"""Importance by the gradient of the loss, and of layers by leaving them out, both against the whole stock model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibration import CALIBRATED
from torch.nn.functional import cross_entropy

from conftest import Opened, run_cli, save_tiny
from llmprune_cli.choose.ablation import ablate_layers
from llmprune_cli.choose.activity import Activity
from llmprune_cli.choose.gradients import measure_gradients
from llmprune_cli.choose.magnitude import EXPERTS, GROUPS, HEADS
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import OutputError
from llmprune_cli.run.calibration import CalibrationOptions, prepare_calibration
from llmprune_cli.run.states import copy_states
from llmprune_cli.source.opening import ModelReference, open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from test_checkpoint_forms import rewrite


def stock_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def taylor(opened: Opened, folder: Path) -> tuple[Activity, dict[str, torch.Tensor]]:
    """The scores, and |g·w| of every parameter of the stock model by plain autograd."""
    states = folder / "states"
    states.mkdir()
    activity = measure_gradients(opened.layered, opened.subject.trace, opened.tokens, states, lambda n: None)
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
    assert_equal(activity.scores["intermediate_size"]["1"], neurons)
    rows = {n: own[f"self_attn.{n}_proj.weight"].sum(1) + own[f"self_attn.{n}_proj.bias"] for n in "qkv"}
    heads = (rows["q"] + own["self_attn.o_proj.weight"].sum(0)).view(8, -1).sum(1)
    assert_equal(activity.scores[HEADS]["1"], heads)
    assert_equal(activity.scores[GROUPS]["1"], (rows["k"] + rows["v"]).view(2, -1).sum(1) + heads.view(2, 4).sum(1))
    channels = torch.zeros(64, dtype=torch.float64)
    for name, product in found.items():
        writes = any(word in name for word in ("o_proj", "down_proj", "norm"))
        if "layers." in name and (writes or product.ndim == 2):
            channels += product if product.ndim == 1 else product.sum(1 if writes else 0)
    assert_equal(activity.scores["hidden_size"][""], channels)


@pytest.mark.parametrize("opened", ["gpt2"], indirect=True)
def test_taylor_knows_fused_and_transposed_weights(opened: Opened, tmp_path: Path) -> None:
    activity, found = taylor(opened, tmp_path)
    own = {name.split("h.2.")[1]: product for name, product in found.items() if "h.2." in name}
    neurons = own["mlp.c_fc.weight"].sum(0) + own["mlp.c_fc.bias"] + own["mlp.c_proj.weight"].sum(1)
    assert_equal(activity.scores["intermediate_size"]["2"], neurons)
    fused = (own["attn.c_attn.weight"].sum(0) + own["attn.c_attn.bias"]).view(3, 8, -1).sum((0, 2))
    assert_equal(activity.scores[HEADS]["2"], fused + own["attn.c_proj.weight"].sum(1).view(8, -1).sum(1))


@pytest.mark.parametrize("opened", ["mixtral"], indirect=True)
def test_taylor_scores_experts_and_their_neurons(opened: Opened, tmp_path: Path) -> None:
    activity, found = taylor(opened, tmp_path)
    up, down = (found[f"model.layers.3.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    router = found["model.layers.3.mlp.gate.weight"]
    assert_equal(activity.scores[EXPERTS]["3"], up.sum((1, 2)) + down.sum((1, 2)) + router.sum(1))
    neurons = up.sum(2).view(6, 2, -1).sum(1) + down.sum(1)
    for expert in range(6):
        assert_equal(activity.scores["intermediate_size"][f"3.{expert}"], neurons[expert])


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
        assert_equal(activity.scores["moe_intermediate_size"][f"3.{expert}"], squares[expert].detach())


@pytest.mark.parametrize("opened", ["llama", "gemma3_text", "granite", "jamba"], indirect=True)
def test_the_loss_of_a_layer_is_that_of_the_model_without_it(opened: Opened, tmp_path: Path) -> None:
    with torch.inference_mode():
        scores = ablate_layers(opened.layered, opened.tokens, tmp_path, lambda n: None)
        whole = float(stock_loss(opened.model, opened.tokens))
        for number, layer in enumerate(opened.model.model.layers):
            forward = layer.forward
            layer.forward = lambda hidden, *args, **kwargs: hidden
            assert scores[number] == pytest.approx(float(stock_loss(opened.model, opened.tokens)) - whole, abs=1e-5)
            layer.forward = forward
    assert len({round(score, 3) for score in scores}) > 1


def test_layers_go_by_their_influence_or_by_the_loss_without_them(tmp_path: Path, text_file: Path) -> None:
    """A layer that writes nothing has no influence; among random ones there are some whose absence is a gain."""

    def silence(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        silent = ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")
        return {
            name: 0 * tensor if any(word in name for word in silent) else tensor for name, tensor in tensors.items()
        }

    source = rewrite(save_tiny(tmp_path / "saved", num_hidden_layers=4), tmp_path / "model", silence)
    with open_checkpoint(ModelReference(str(source)), need_weights=True) as checkpoint:
        options = CalibrationOptions(str(text_file), tokens=600, seq_len=40)
        windows = prepare_calibration(options, load_tokenizer(checkpoint), 96, 64, 0, print).fitted
        layered = understand(checkpoint).layered("cpu")
        with torch.inference_mode():
            scores = ablate_layers(layered, windows, tmp_path, lambda n: None)
    by_loss = [layer for layer in range(4) if scores[layer] > min(scores)]
    assert len(by_loss) == 3 and 1 in by_loss
    for importance, by, kept in (("taylor", "influence", [0, 2, 3]), ("magnitude", "loss", by_loss)):
        run = run_cli(
            *("prune", source, "--layers", "3", "--intermediate-size", "24", "--importance", importance),
            *("--layer-importance", by, "--calibration", text_file, *CALIBRATED, "--output", tmp_path / by),
        )
        assert run.code == 0, run.stderr
        manifest = json.loads((tmp_path / by / "llmprune.json").read_text())
        assert manifest["layers"] == kept
        assert manifest["options"]["layer_importance"] == by and manifest["options"]["importance"] == importance


def test_hidden_states_that_cannot_be_kept_are_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--offload-dir"):
        copy_states(torch.zeros(1, 2, 3), tmp_path / "absent")


def test_what_is_written_into_kept_states_stays(tmp_path: Path) -> None:
    states = torch.randn(2, 3, 4)
    kept = copy_states(states[:, ::2], tmp_path)
    assert torch.equal(kept, states[:, ::2])
    kept[1] = 7
    assert torch.equal(kept[1], torch.full((2, 4), 7.0)) and (states != 7).all()
