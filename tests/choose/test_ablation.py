"""Layers by the loss of the model without them, against the whole stock model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmprune_cli.choose.layers.importance import ablate_layers
from llmprune_cli.coupling.subject import understand
from llmprune_cli.options import ModelReference, Text
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.windows import Reader
from support.checkpoints import rewrite
from support.cli import CALIBRATED, run_cli
from support.opened import Opened
from support.stock import stock_loss
from support.tiny import save_tiny


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
        options = Text(str(text_file), calibration_tokens=600, calibration_seq_len=40)
        windows = prepare_calibration(options, Reader(load_tokenizer(checkpoint), 96, 64), 0, print).fitted
        layered = LayeredModel(understand(checkpoint), "cpu")
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
