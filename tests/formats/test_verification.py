"""An export that is not the model is not kept, and rounding may cost what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmprune_cli.formats import torch_export
from llmprune_cli.formats.registry import Limits, load_format
from llmprune_cli.formats.verification import kl_limit
from support.exports import export, needs_onnx, verified
from support.full import in_full
from support.tiny import save_tiny


@pytest.mark.parametrize("form", ["torch-export", pytest.param("onnx", marks=[needs_onnx, in_full])])
def test_half_precision_is_within_its_limit(form: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1)
    assert verified(export(folder, tmp_path / "graph", form, "--dtype", "f16"))["dtype"] == "float16"


@pytest.mark.parametrize("form", ["torch-export", pytest.param("onnx", marks=[needs_onnx, in_full])])
def test_a_model_to_which_no_token_is_likely_is_verified(form: str, tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "model", num_hidden_layers=1, hidden_size=8, vocab_size=20_000, initializer_range=1e-6
    )
    verified(export(folder, tmp_path / "graph", form))


def test_rounding_may_cost_as_much_again_as_it_costs_in_transformers() -> None:
    assert kl_limit(1e-3, 0.0) == kl_limit(1e-3, 5e-4) == 1e-3
    assert kl_limit(1e-3, 1.5e-3) == 3e-3
    assert kl_limit(1e-2, 5e-4) == 1e-2
    assert kl_limit(1e-2, 2e-3) == 2e-2


def test_a_graph_that_is_not_the_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(load_format("torch-export"), limits={"float32": Limits(-1.0)})
    monkeypatch.setattr(torch_export, "TORCH_EXPORT", strict)
    run = export(save_tiny(tmp_path / "model", num_hidden_layers=1), tmp_path / "graph", "torch-export")
    assert run.code == 7 and "KL per token" in run.stderr and not (tmp_path / "graph").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
