"""Layers that run one at a time compute what the stock model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune_cli.coupling.subject import understand
from llmprune_cli.options import ModelReference
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.opened import Opened
from support.tiny import save_tiny

every_family = pytest.mark.parametrize("opened", families.TRIED, indirect=True)


@every_family
def test_layers_run_one_at_a_time_as_the_stock_model_runs_them(opened: Opened) -> None:
    with torch.inference_mode():
        *_, (states, items) = opened.layered.walk(opened.tokens)
        logits = opened.layered.load_ends().logits(states, items)
        expected = opened.model(opened.tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_layer_alone_keeps_the_scale_of_its_number(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2", num_hidden_layers=3, scale_attn_by_inverse_layer_idx=True)
    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        layered, model = LayeredModel(understand(checkpoint), "cpu"), load_model(checkpoint, "cpu", "float32")
        with torch.inference_mode():
            *_, (states, _) = layered.walk(tokens)
            expected = model(tokens, use_cache=False).logits
            logits = layered.load_ends().logits(states, 0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
