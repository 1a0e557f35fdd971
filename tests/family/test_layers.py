"""Settings that list layers follow the layers that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.layers import can_keep_layers, find_layer_kinds, layer_changes, sample_layers
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


# --- on paper ------------------------------------------------------------------------------------------------------


def of_layers(count: int, **settings: Any) -> PretrainedConfig:
    """A configuration of no model at all."""
    config = PretrainedConfig()
    for name, value in {"num_hidden_layers": count, **settings}.items():
        setattr(config, name, value)
    return config


ATTENTION = {"attn_layer_period": 4, "attn_layer_offset": 2}
CHANGES: list[tuple[int, dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    (4, {}, (0, 3), {}),
    (3, {"layer_types": ["a", "b", "c"]}, (0, 2), {"layer_types": ["a", "c"]}),
    (3, {"no_rope_layers": [1, 0, 1]}, (1,), {"no_rope_layers": [0]}),
    (3, {"layer_types": ["a", "b"]}, (0, 2), {}),  # not one for each layer
    (2, {"eos_token_id": [1, 2], "rope_limit": [1, 2], "mlp_multipliers": [1, 2]}, (1,), {}),
    (2, {"architectures": ["A", "B"]}, (1,), {}),
    (4, {"mlp_only_layers": [1, 3]}, (0, 3), {"mlp_only_layers": [1]}),
    (4, {"mlp_only_layers": [0, 1, 2, 3]}, (1, 2), {"mlp_only_layers": [0, 1]}),  # numbers, although as many as layers
    (4, {"attn_layer_indices": []}, (1, 2), {"attn_layer_indices": []}),
    (4, {"first_k_dense_replace": 2}, (0, 3), {"first_k_dense_replace": 1}),
    (4, {"first_k_dense_replace": 2}, (2, 3), {"first_k_dense_replace": 0}),
    (4, {"num_dense_layers": 4}, (2, 3), {"num_dense_layers": 2}),
    (
        4,
        {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
        (0, 2, 3),
        {"moe_layer_end_index": 1, "moe_layer_start_index": 1},
    ),
    (
        4,
        {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
        (2, 3),
        {"moe_layer_end_index": 1, "moe_layer_start_index": 0},
    ),
    (4, {"hybrid_layer_ids": [0, 2]}, (1, 2, 3), {"hybrid_layer_ids": [1]}),
    (3, {"moe_layers": [0, 1, 2]}, (1, 2), {"moe_layers": [0, 1]}),
    (4, {"ple_layer_ids": [3]}, (0, 1), {"ple_layer_ids": []}),
    (2, {"no_rope_layers": [0, 1]}, (1,), {"no_rope_layers": [1]}),  # one for each, although they could be numbers
    (4, {"layers_block_type": ["a", "b", "c", "d"]}, (0, 3), {"layers_block_type": ["a", "d"]}),
    (4, {"hybrid_override_pattern": "M*M-"}, (0, 1, 3), {"hybrid_override_pattern": "M*-"}),
    (
        12,
        {"settings_by_layer": {"05": {"head_dim": 8}, "11": {"head_dim": 4}}},
        (5, 6),
        {"settings_by_layer": {"0": {"head_dim": 8}}},
    ),
    (2, {"id2label": {0: "A", 1: "B"}, "mtp_layer_types": ["a", "b"]}, (1,), {}),
    (4, {"num_kv_shared_layers": 2}, (0, 1, 3), {"num_kv_shared_layers": 1}),
    (
        4,
        {"num_kv_shared_layers": 2, "layer_types": ["a", "b", "a", "b"]},
        (0, 2),
        {"num_kv_shared_layers": 1, "layer_types": ["a", "a"]},
    ),
    (4, {"indexer_types": ["full", "full", "shared", "shared"]}, (1, 3), {"indexer_types": ["full", "shared"]}),
    (6, {"decoder_sparse_step": 1, "mlp_only_layers": []}, (0, 5), {"mlp_only_layers": []}),
    (6, {"decoder_sparse_step": 2}, (0, 1, 3), {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    (
        6,
        {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
        (1, 2, 5),
        {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]},
    ),
    (5, {"block_types": ["a", "a", "b"]}, (1, 2, 4), {"block_types": ["a", "b", "a"]}),
    (3, {"block_types": ["a", "a", "b"]}, (1, 2), {"block_types": ["a", "b"]}),
    (8, ATTENTION, (0, 1, 2, 3), ATTENTION),
    (8, ATTENTION, (4, 5, 6, 7), ATTENTION),
    (8, ATTENTION, (1, 2, 5, 6), {"attn_layer_period": 2, "attn_layer_offset": 1}),
    (8, ATTENTION, (2, 6), {"attn_layer_period": 1, "attn_layer_offset": 0}),
    (8, ATTENTION, (0, 1), ATTENTION),  # none is left, and none comes before the offset
    (8, {"attn_layer_period": 4, "attn_layer_offset": 0}, (1, 2, 3), {"attn_layer_period": 4, "attn_layer_offset": 3}),
    (3, {**ATTENTION, "layers_block_type": ["a", "b", "b"]}, (0, 2), {"layers_block_type": ["a", "b"]}),
    (
        4,
        {"model_type": "hrm_text", "num_layers_per_stack": 2},
        (1,),
        {"num_layers_per_stack": 1, "num_hidden_layers": 2},
    ),
]


@pytest.mark.parametrize(("count", "settings", "kept", "expected"), CHANGES)
def test_settings_follow_the_layers_that_stay(
    count: int, settings: dict[str, Any], kept: tuple[int, ...], expected: dict[str, Any]
) -> None:
    config = of_layers(count, **settings)
    assert can_keep_layers(config, kept)
    assert layer_changes(config, kept) == {"num_hidden_layers": len(kept), **expected}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"indexer_types": ["full", "full", "shared", "shared"]}, (0, 2, 3)),
        ({"indexer_types": ["full", "shared", "full", "shared"]}, (0, 1, 3)),
        ({"num_kv_shared_layers": 1}, (0, 1, 3)),
        ({"num_kv_shared_layers": 2, "layer_types": ["a", "b", "a", "b"]}, (0, 2, 3)),
    ],
)
def test_layers_that_take_what_another_computes_stay_with_it(settings: dict[str, Any], kept: tuple[int, ...]) -> None:
    config = of_layers(4, **settings)
    assert not can_keep_layers(config, kept)
    with pytest.raises(ValueError, match=r"layer \d takes what layer \d computes, which would go"):
        layer_changes(config, kept)


def is_special(config: PretrainedConfig, layer: int) -> tuple[bool, bool]:
    """Whether a layer is sparse, and whether it has attention, as models read the two rhythms."""
    named = config.mlp_only_layers
    sparse = layer not in named and (layer + 1) % config.decoder_sparse_step == 0
    return sparse, layer % config.attn_layer_period == config.attn_layer_offset


@pytest.mark.parametrize("kept", [kept for n in range(1, 7) for kept in combinations(range(6), n)])
def test_every_layer_that_stays_remains_of_its_kind(kept: tuple[int, ...]) -> None:
    """All ways to keep some of six layers: the changed settings describe them, or no period could."""
    rhythms = {"decoder_sparse_step": 2, "mlp_only_layers": [3], "attn_layer_period": 3, "attn_layer_offset": 1}
    config = of_layers(6, **rhythms)
    kinds = [is_special(config, layer) for layer in kept]
    if can_keep_layers(config, kept):
        changed = of_layers(0, **{**rhythms, **layer_changes(config, kept)})
        assert [is_special(changed, layer) for layer in range(len(kept))] == kinds
        return
    periods = [(every, start) for every in range(1, 8) for start in range(every)]
    attention = [attends for _, attends in kinds]
    assert all([n % every == start for n in range(len(kept))] != attention for every, start in periods)
    with pytest.raises(ValueError, match=r"no attn_layer_period describes .* Drop whole periods, or the last layers"):
        layer_changes(config, kept)


@pytest.mark.parametrize(
    ("kinds", "each", "settings", "expected"),
    [
        ((0, 0, 0, 0), 1, {}, (0, 1)),  # of one kind, two all the same
        ((0,), 1, {}, (0,)),
        ((0, 0, 0, 0), 3, {}, (0, 1, 2)),
        ((0, 1, 0, 1), 1, {}, (0, 1)),
        ((0, 1, 0, 1, 4), 1, {}, (0, 1, 4)),
        ((0, 1, 1, 0, 1), 2, {}, (0, 1, 2, 3)),
        ((0, 1, 2, 0, 0, 0, 6), 1, {"attn_layer_period": 5, "attn_layer_offset": 1}, (0, 1, 2, 6)),  # every other
        # of layers 0, 1 and 5 the last two would have attention, which no period says
        ((0, 1, 0, 0, 0, 5), 1, {"attn_layer_period": 4, "attn_layer_offset": 1}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_a_sample_has_every_kind_of_layer(
    kinds: tuple[int, ...], each: int, settings: dict[str, int], expected: tuple[int, ...]
) -> None:
    assert sample_layers(of_layers(len(kinds), **settings), kinds, each) == expected


def test_layers_are_alike_by_their_tensors_and_by_their_settings() -> None:
    same = {f"layers.{layer}.{name}": (2, 3) for layer in range(4) for name in ("up.weight", "down.weight")}
    assert find_layer_kinds(of_layers(4), same) == (0, 0, 0, 0)
    assert find_layer_kinds(of_layers(4, layer_types=["a", "b", "a", "b"]), same) == (0, 1, 0, 1)
    wider = {**same, "layers.2.up.weight": (4, 3), "layers.3.gate.weight": (1, 3), "norm.weight": (3,)}
    assert find_layer_kinds(of_layers(4), wider) == (0, 0, 2, 3)
    experts = {**same, "layers.1.experts.0.up.weight": (2, 3), "layers.3.experts.0.up.weight": (2, 3)}
    assert find_layer_kinds(of_layers(4), experts) == (0, 1, 0, 1)
    assert find_layer_kinds(of_layers(4), {**experts, "layers.3.experts.1.up.weight": (2, 3)}) == (0, 1, 0, 3)


def test_layers_that_run_several_times_are_refused() -> None:
    stack = {f"stack.layers.{layer}.up.weight": (2, 3) for layer in range(2)}
    with pytest.raises(UnsupportedError, match="counts 16 layers and has tensors of 2"):
        find_layer_kinds(of_layers(16), stack)
