"""Safetensors in another dtype or other shards, and with a config.json that readers of older ones understand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import families
from support.cli import BY_MAGNITUDE, run_cli
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny


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


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "another base": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
        {"rope_theta": 123456.0},
    ),
    "scaled": ("llama", {"rope_parameters": LLAMA3}, {"rope_theta": 5e5}),
    "two speeds": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            }
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 5e3},
    ),
    "a part of each head": ("gpt_neox", {}, {"rope_theta": 10000}),
}


@pytest.mark.parametrize("case", CASES)
def test_older_settings_stand_beside_those_of_today(case: str, tmp_path: Path) -> None:
    family, changes, older = CASES[case]
    settings = {**families.SIZES, **families.FAMILIES[family], **changes, "initializer_range": 0.3}
    source = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    assert run_cli("export", source, "--output", tmp_path / "out", "--compat").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32" and config["rope_parameters"]
    assert {name: config[name] for name in older} == older
    if case == "scaled":
        assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "llama3"
        assert config["rope_scaling"]["factor"] == 4.0
    tokens = torch.randint(3, 90, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            load_stock(tmp_path / "out")(tokens).logits, load_stock(source)(tokens).logits, rtol=0, atol=0
        )
    again = run_cli("prune", tmp_path / "out", "--intermediate-size", "8", "--dry-run")
    assert again.code == 0, again.stderr


def test_compat_is_about_safetensors(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli("export", tiny_llama, "--format", "torch-export", "--compat", "--output", tmp_path / "out")
    assert run.code == 2 and "--format safetensors" in run.stderr
