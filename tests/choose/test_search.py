"""A target for the size is met by the best candidate of those that were tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmprune_cli.options import ModelReference
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.cli import CALIBRATED, run_cli
from support.tiny import save_tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("share", ["85%", "60%"])
def test_a_target_is_reached_and_never_exceeded(family: str, share: str, tmp_path: Path, text_file: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    source = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    run = run_cli(
        *("prune", source, "--target-params", share, "--output", tmp_path / "out", "--json"),
        *("--calibration", text_file, *CALIBRATED),
    )
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    limit = float(share[:-1]) / 100 * result["before"]["parameters"]
    assert 0.5 * limit < result["after"]["parameters"] <= limit
    assert result["importance"] == "consensus" and result["refit"] == "residual"
    divergences = [candidate["kl"] for candidate in result["candidates"]]
    assert divergences == sorted(divergences) and all(c["parameters"] <= limit for c in result["candidates"])
    assert result["candidates"][0]["widths"] == result["after"]["widths"]
    tried = {"llama": "num_attention_heads", "qwen3_moe": "num_experts"}
    if family in tried:
        assert len({candidate["widths"][tried[family]] for candidate in result["candidates"]}) > 1
    with open_checkpoint(ModelReference(str(tmp_path / "out")), need_weights=True) as pruned:
        load_model(pruned, "cpu", "float32")


def test_a_dry_run_shows_the_candidates(tiny_llama: Path, text_file: Path) -> None:
    options = ("--target-size", "100KB", "--dry-run", "--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", tiny_llama, *options)
    assert run.code == 0 and "Candidates, best first" in run.stdout and "Dry run" in run.stdout
    assert json.loads(run_cli("prune", tiny_llama, *options, "--json").stdout)["after"]["size_bytes"] <= 100_000
