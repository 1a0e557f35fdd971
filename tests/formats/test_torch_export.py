"""Graphs of torch.export: the same logits for any batch and length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmprune_cli.formats import torch_export
from llmprune_cli.formats.registry import Fit, load_format
from support import families
from support.exports import export, pruned, verified
from support.full import examples, in_full
from support.stock import load_stock
from support.tiny import save_tiny


@pytest.mark.parametrize("family", examples(families.TRIED_EXPORTS, ["qwen3_moe"]))
def test_a_torch_graph_gives_the_logits_of_any_batch_and_length(family: str, tmp_path: Path) -> None:
    folder = pruned(tmp_path, family)
    document = verified(export(folder, tmp_path / "graph", "torch-export", "--dtype", "f32"))
    assert document["verification"]["same_tokens"] == 1 and "model.pt2" in document["files"]
    graph, model = torch.export.load(tmp_path / "graph" / "model.pt2").module(), load_stock(folder)
    for shape in ((1, 2), (3, 20)):
        tokens = torch.randint(3, 90, shape)
        with torch.no_grad():
            torch.testing.assert_close(graph(tokens), model(input_ids=tokens, use_cache=False).logits)


@in_full
def test_a_graph_of_steps_indeed_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    willing = replace(load_format("torch-export"), fit=lambda config: Fit(loads=True))
    monkeypatch.setattr(torch_export, "TORCH_EXPORT", willing)
    settings = {**families.SIZES, **families.FAMILIES["mamba2"], "num_hidden_layers": 1}
    folder = save_tiny(tmp_path / "model", "mamba2", **settings)
    run = export(folder, tmp_path / "graph", "torch-export")
    assert run.code == 7 and "does not run" in run.stderr and not (tmp_path / "graph").exists()


def test_a_model_of_few_positions_is_verified_within_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=16)
    assert verified(export(folder, tmp_path / "graph", "torch-export"))["verification"]["tokens"] == 3 * 8
