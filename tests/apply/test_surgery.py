"""What is cut keeps what it was worth: embeddings that are scaled, and norms over fewer channels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmprune_cli.apply.surgery import widen
from llmprune_cli.plan.document import read_plan
from support.cli import BY_MAGNITUDE, run_cli
from support.stock import written_tensors


def test_a_pruned_gemma_makes_up_for_its_embedding_scale(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_of("gemma")
    run = run_cli(
        *("prune", folder, *BY_MAGNITUDE, "--hidden-size", "16"),
        *("--save-plan", tmp_path / "plan", "--output", tmp_path / "out"),
    )
    assert run.code == 0, run.stderr
    kept = json.loads((tmp_path / "plan").read_text())["keep"]["hidden_size"][""]
    dense, pruned = written_tensors(folder), written_tensors(tmp_path / "out")
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(pruned[name], dense[name][:, kept] * 2)  # √(64/16)
    name = "model.norm.weight"
    torch.testing.assert_close(1 + pruned[name], (1 + dense[name][kept]) / 2)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_wider_norm_gives_fewer_channels_what_they_had(offset: float, tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli(
        "prune", tiny_llama, *BY_MAGNITUDE, "--hidden-size", "40", "--dry-run", "--save-plan", tmp_path / "plan.json"
    )
    assert run.code == 0, run.stderr
    plan = read_plan(tmp_path / "plan.json")
    weight = torch.randn(64, dtype=torch.float64)
    states = torch.randn(3, 64, dtype=torch.float64)
    states[:, 40:] = 0
    whole = torch.nn.functional.rms_norm(states, [64], weight + offset, eps=1e-20)[:, :40]
    cut = torch.nn.functional.rms_norm(states[:, :40], [40], widen(weight[:40], offset, plan) + offset, eps=1e-20)
    torch.testing.assert_close(cut, whole)
