"""Settings that list layers follow the layers that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cli import BY_MAGNITUDE, run_cli
from support.families import FAMILIES
from support.stock import load_stock


def test_dropped_layers_take_their_settings_with_them(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    def config_of(family: str, dropped: str) -> dict[str, Any]:
        out = tmp_path / f"{family}-{dropped}"
        run = run_cli("prune", tiny_of(family), *BY_MAGNITUDE, "--drop-layers", dropped, "--output", out)
        assert run.code == 0, run.stderr
        config: dict[str, Any] = json.loads((out / "config.json").read_text())
        return config

    assert config_of("gemma3_text", "0")["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert config_of("qwen3_moe", "0")["mlp_only_layers"] == [0]
    assert config_of("qwen3_moe", "1")["mlp_only_layers"] == []
    assert config_of("deepseek_v3", "2")["first_k_dense_replace"] == 1
    assert config_of("deepseek_v3", "0")["first_k_dense_replace"] == 0
    assert config_of("smollm3", "1,-1")["no_rope_layers"] == [1, 1]
    jamba = config_of("jamba", "0")
    assert (jamba["attn_layer_period"], jamba["attn_layer_offset"]) == (2, 0)
    assert (jamba["expert_layer_period"], jamba["expert_layer_offset"]) == (2, 1)
    jamba = config_of("jamba", "0,2")  # attention alone is left, and no experts
    assert (jamba["attn_layer_period"], jamba["attn_layer_offset"]) == (1, 0)
    assert jamba["expert_layer_offset"] >= 2


def test_layers_that_no_rhythm_describes_are_refused(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli("prune", tiny_of("jamba"), *BY_MAGNITUDE, "--drop-layers", "1", "--output", tmp_path / "out")
    assert run.code == 5 and "no expert_layer_period describes the layers that would stay" in run.stderr
    run = run_cli(
        "prune", tiny_of("jamba"), *BY_MAGNITUDE, "--layers", "3", "--dry-run", "--save-plan", tmp_path / "plan"
    )
    assert run.code == 0 and "keeps its rhythm" in run.stderr
    assert json.loads((tmp_path / "plan").read_text())["layers"] == [0, 1, 2]


def test_a_rhythm_of_sparse_layers_survives_the_loss_of_one(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    options = {**FAMILIES["qwen3_moe"], "mlp_only_layers": [], "decoder_sparse_step": 2, "num_hidden_layers": 5}
    folder = make_tiny("qwen3_moe", **options)  # layers 1 and 3 are sparse
    run = run_cli("prune", folder, *BY_MAGNITUDE, "--drop-layers", "0", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [1, 3])
    load_stock(tmp_path / "out")
