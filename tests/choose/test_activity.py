"""Importance from activations is what its formulas say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmprune_cli.choose.activity import _Inputs, measure_activity
from llmprune_cli.coupling.products import Product
from llmprune_cli.coupling.subject import understand
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.family.widths import Width
from llmprune_cli.options import ModelReference, Text
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.windows import Reader
from support.checkpoints import rewrite
from support.cli import CALIBRATED, run_cli
from support.opened import Opened
from support.tiny import save_tiny


@pytest.mark.parametrize("opened", ["llama", "gpt2"], indirect=True)
def test_activity_is_what_its_formulas_say(opened: Opened) -> None:
    model = opened.model
    seen: dict[str, torch.Tensor] = {}
    base = "model.layers.1.mlp.down_proj" if "llama" in type(model).__name__.lower() else "transformer.h.1.mlp.c_proj"
    model.get_submodule(base).register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.inference_mode():
        hidden = model(opened.tokens, use_cache=False, output_hidden_states=True).hidden_states
        start = opened.layered.embed(opened.tokens)
        activity = measure_activity(opened.layered, start, "activation", lambda n: None)
        weight = model.get_submodule(base).weight.double()
        matrix = weight if "llama" in base or "model." in base else weight.T
        expected = matrix.square().sum(0) * seen["x"].double().square().flatten(0, 1).mean(0)
        torch.testing.assert_close(activity.scores["intermediate_size"][Instance(1)], expected, rtol=1e-5, atol=0)
        cosine = torch.nn.functional.cosine_similarity(hidden[1], hidden[2], dim=-1).double().mean()
        assert activity.influence[1] == pytest.approx(1 - float(cosine), abs=1e-6)


def test_layers_go_by_block_influence(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny(tmp_path / "model", num_hidden_layers=5)
    plan = tmp_path / "plan.json"
    options = ("--importance", "activation", "--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", source, "--layers", "3", "--save-plan", plan, "--output", tmp_path / "out", *options)
    assert run.code == 0, run.stderr
    with open_checkpoint(ModelReference(str(source)), need_weights=True) as checkpoint:
        subject = understand(checkpoint)
        text = prepare_calibration(
            Text(str(text_file), calibration_tokens=600, calibration_seq_len=40),
            Reader(load_tokenizer(checkpoint), 96, 64),
            0,
            print,
        )
        with torch.inference_mode():
            layered = LayeredModel(subject, "cpu")
            start = layered.embed(text.fitted)
            activity = measure_activity(layered, start, "activation", lambda n: None)
    least = sorted(range(5), key=activity.influence.__getitem__)[:2]
    assert json.loads(plan.read_text())["layers"] == [layer for layer in range(5) if layer not in least]


@pytest.mark.parametrize("own", [".experts.", ".experts.0.", ".experts.5."])
def test_experts_have_a_say_in_the_scores_of_channels(tiny_of: Callable[[str], Path], tmp_path: Path, own: str) -> None:
    """The channel that all of them, or one of them, read most strongly goes last."""

    def strengthen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            if own in name and name.endswith(("w1.weight", "w3.weight")):
                tensor[:, 7] *= 50
        return tensors

    source = rewrite(tiny_of("mixtral"), tmp_path / "model", strengthen)
    tokens = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(source)), need_weights=True) as checkpoint:
        layered = LayeredModel(understand(checkpoint), "cpu")
        with torch.inference_mode():
            scores = measure_activity(layered, layered.embed(tokens), "activation", lambda n: None).scores
    assert int(scores[Width.HIDDEN][Instance()].argmax()) == 7


def test_what_several_weights_read_is_added_up_for_each_of_them() -> None:
    """Processes add up sums in place, so that no two of them may be one."""
    inputs, values = _Inputs(), torch.randn(2, 3)
    for name in ("q", "k"):
        inputs.seen(Product(name, 1, None, values, None, values))
    query, key = inputs.squares.values()
    assert torch.equal(query, key) and query is not key
    query += 1
    inputs.seen(Product("k", 1, None, 2 * values, None, values))
    torch.testing.assert_close(inputs.squares["k", 1, None], 5 * values.square().sum(0).double())
