"""What `inspect` offers is what `prune` gives, and one width that is not proven does not keep the others from going."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.apply import proof, proven_widths
from llmprune_cli.coupling.subject import understand
from llmprune_cli.options import ModelReference
from llmprune_cli.source.opening import open_checkpoint
from support.cli import BY_CHANCE, BY_MAGNITUDE, run_cli
from support.full import examples, in_full
from support.stock import load_stock

LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
MINICPM = {**LATENT, "num_key_value_heads": 8, "dim_model_base": 16, "num_hidden_layers": 4}


def prunable(folder: Path) -> dict[str, str]:
    run = run_cli("inspect", folder, "--json")
    assert run.code == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout)["prunable"]
    return found


def test_one_ratio_leaves_whole_what_is_not_proven_and_says_so(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("minicpm3", **MINICPM)  # divides its logits by hidden_size / dim_model_base
    assert prunable(folder)["hidden_size"].startswith("no: The twin proof fails for minicpm3")
    run = run_cli("prune", folder, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out")
    assert run.code == 0 and "hidden_size stays 64: The twin proof fails" in run.stderr, run.stderr
    config = load_stock(tmp_path / "out").config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 4, 24)
    run = run_cli("prune", folder, *BY_MAGNITUDE, "--hidden-size", "32", "--output", tmp_path / "alone")
    assert run.code == 5 and "cannot be pruned in hidden_size: The twin proof fails" in run.stderr


def test_no_two_twins_are_compared_in_the_same_widths(
    make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    compare = proof.compare

    def counted(*arguments: Any) -> None:
        asked.append(repr(arguments[2:3] + arguments[4:]))
        compare(*arguments)

    for module in (proof, proven_widths):
        monkeypatch.setattr(module, "compare", counted)
    with open_checkpoint(ModelReference(str(make_tiny("minicpm3", **MINICPM))), need_weights=False) as checkpoint:
        assert proven_widths.find_unproven(understand(checkpoint)).keys() == {"hidden_size"}
    assert len(asked) == len({*asked}) == 6  # all, all with the last layers, and four parts


def test_heads_whose_number_gives_the_bias_of_positions_are_not_offered(make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny("bloom", n_head=4, n_layer=2)
    said = prunable(folder)
    assert said["num_attention_heads"].startswith("no: the slopes of its position bias (ALiBi)")
    assert said["hidden_size"] == said["num_attention_heads"]
    assert said["num_hidden_layers"] == "1 to 2"


@pytest.mark.parametrize("family", examples(["deepseek_v3", "glm4_moe_lite"], ["deepseek_v3"]))
def test_heads_of_latent_attention_go_with_their_rows_and_columns(
    make_tiny: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    folder = make_tiny(family, **LATENT, **experts, num_key_value_heads=8, n_group=1, topk_group=1)
    run = run_cli("prune", folder, *BY_CHANCE, "--num-attention-heads", "6", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    model = load_stock(tmp_path / "out")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 6)
    attention = model.model.layers[0].self_attn
    rows = (attention.q_b_proj.weight.shape[0], attention.kv_b_proj.weight.shape[0])
    assert (*rows, attention.o_proj.weight.shape[1]) == (6 * 16, 6 * 20, 6 * 12)


def test_neurons_that_are_unsaid_are_written_out(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("gpt2", n_inner=None, intermediate_size=None)
    run = run_cli("prune", folder, *BY_CHANCE, "--intermediate-size", "96", "--output", tmp_path / "neurons")
    assert run.code == 0, run.stderr
    run = run_cli("prune", folder, *BY_CHANCE, "--head-pruning-ratio", "0.5", "--output", tmp_path / "heads")
    assert run.code == 0, run.stderr
    said = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("neurons", "heads")}
    assert (said["neurons"]["n_inner"], said["heads"]["n_inner"], said["heads"]["n_embd"]) == (96, 256, 32)


@in_full
def test_sections_of_positions_add_up_in_every_twin(make_tiny: Callable[..., Path]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
    folder = make_tiny(
        "qwen3_5_text",
        head_dim=32,
        rope_parameters={**rope, "mrope_interleaved": True},
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    refused = [width for width, said in prunable(folder).items() if said.startswith("no: ")]
    assert refused == ["head_dim"]


def test_sizes_of_single_layers_stay_and_all_else_can_go(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Heads too, which are larger in some layers."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    folder = make_tiny(
        "gemma4_text",
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=8,
        head_dim=16,
        hidden_size_per_layer_input=0,
        per_layer_config={"2": {"head_dim": 32}, "3": {"head_dim": 32}},
    )
    said = prunable(folder)
    assert (said["num_attention_heads"], said["num_hidden_layers"]) == ("2, 4, 6, 8", "1 to 4")
    assert "only query heads can go" in said["num_key_value_heads"]
    options = ("--intermediate-size", "24", "--num-attention-heads", "2", "--drop-layers", "1")
    run = run_cli("prune", folder, *BY_CHANCE, *options, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {int(layer): own for layer, own in config["per_layer_config"].items()} == {
        1: {"head_dim": 32},
        2: {"head_dim": 32},
    }
    assert "allow_global_per_layer_attribute_access" not in config
    layers = load_stock(tmp_path / "out").model.layers
    assert [layer.self_attn.q_proj.weight.shape[0] for layer in layers] == [2 * 16, 2 * 32, 2 * 32]
    run = run_cli("prune", folder, *BY_CHANCE, "--drop-layers", "2,3", "--dry-run")
    assert run.code == 5 and "rule of its own for layer_types" in run.stderr


def test_query_heads_go_evenly_from_the_kv_heads_of_every_layer(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny(
        "mimo_v2_flash",
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],  # of which the latter has twice as many KV heads
        mlp_layer_types=["dense", "dense"],
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=16,
        v_head_dim=8,
        sliding_window=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    assert prunable(folder)["num_attention_heads"] == "6, 12"
    plan = tmp_path / "plan.json"
    options = ("--head-pruning-ratio", "0.25", "--save-plan", plan)
    run = run_cli("prune", folder, *BY_CHANCE, *options, "--output", tmp_path / "out")
    assert run.code == 0 and "6 query heads stay instead of 9" in run.stderr, run.stderr
    kept = json.loads(plan.read_text())["keep"]["num_attention_heads"]
    assert [head // 4 for head in kept["0"]] == [0, 0, 1, 1, 2, 2]
    assert [head // 2 for head in kept["1"]] == [0, 1, 2, 3, 4, 5]
    attention = [layer.self_attn for layer in load_stock(tmp_path / "out").model.layers]
    assert [own.q_proj.weight.shape[0] // 16 for own in attention] == [6, 6]
    assert [own.k_proj.weight.shape[0] // 16 for own in attention] == [3, 6]
    assert attention[1].sinks.shape == (6,)
