"""Safetensors in another dtype or other shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.cli import BY_MAGNITUDE, run_cli
from support.stock import load_stock, written_tensors


def test_export_changes_dtype_and_shards_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli(
        *("export", tiny_llama, "--output", tmp_path / "half", "--dtype", "bfloat16"),
        *("--max-shard-size", "25KB", "--format", "safetensors", "--json"),
    )
    assert run.code == 0, run.stderr
    before, after = written_tensors(tiny_llama), written_tensors(tmp_path / "half")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    shards = list((tmp_path / "half").glob("model-*.safetensors"))
    assert len(shards) > 2 and max(shard.stat().st_size for shard in shards) <= 25_000
    assert "larger than" not in run.stderr
    small = run_cli("export", tiny_llama, "--output", tmp_path / "small", "--max-shard-size", "10KB")
    large = [shard for shard in (tmp_path / "small").glob("*.safetensors") if shard.stat().st_size > 10_000]
    assert large and f"Shards larger than --max-shard-size: {len(large)}." in small.stderr
    model = load_stock(tmp_path / "half")
    assert model.config.dtype == torch.bfloat16
    assert run_cli("export", tiny_llama, "--output", tmp_path / "same").code == 0
    same = written_tensors(tmp_path / "same")
    assert all(torch.equal(before[name], same[name]) for name in before)
    assert list((tmp_path / "same").glob("*.safetensors")) == [tmp_path / "same" / "model.safetensors"]


def test_export_keeps_the_manifest_of_a_pruned_model(tiny_llama: Path, tmp_path: Path) -> None:
    assert (
        run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", tmp_path / "a").code == 0
    )
    assert run_cli("export", tmp_path / "a", "--output", tmp_path / "b").code == 0
    before, after = (json.loads((tmp_path / name / "llmprune.json").read_text()) for name in ("a", "b"))
    assert after.pop("export")["format"] == "safetensors" and after == before
