"""What a proof on a small model could miss: numbers of layers, tables, stale settings, ways of asking."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llmprune_cli.apply.proof import prove
from llmprune_cli.apply.pruned_folder import prune_twin
from llmprune_cli.apply.reference.answers import answer, differ
from llmprune_cli.coupling.discovery import trace
from llmprune_cli.coupling.twin import build_twin, proof_sizes, settle_head_dim
from llmprune_cli.errors import LlmpruneError, UnsupportedError
from llmprune_cli.family import architecture as rules
from llmprune_cli.family.architecture import Architecture, discover, reconfigure
from llmprune_cli.family.kept_layers import check_kept_layers
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.source.configuration import text_part
from support.cli import BY_CHANCE, BY_MAGNITUDE, run_cli
from support.families import FAMILIES, SIZES, model_type
from support.stock import load_stock
from support.tiny import tiny_config
from tools.families.oracle import difference

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_key_value_heads": 8}
INDEXED = {
    **LATENT,
    **ROUTED,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "indexer_types": ["full", "full", "shared", "shared"],
}
HASHED = {
    **ROUTED,
    "num_key_value_heads": 1,
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "layer_types": ["sliding_attention"] * 4,
    "compress_rates": {},
    "sliding_window": 8,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
}


def found_out(family: str, **changes: Any) -> Architecture:
    config: Any = text_part(tiny_config(family, **{**SIZES, **changes}))
    return settle_head_dim(discover(config, expected_index(config)))


# --- numbers of layers ---------------------------------------------------------------------------------------------

BY_NUMBER: dict[str, dict[str, Any]] = {
    "diffllama": {},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 48},
}


@pytest.mark.parametrize("family", BY_NUMBER)
def test_layers_whose_work_follows_their_number_go_from_the_end_alone(
    family: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_tiny(family, **{**SIZES, **BY_NUMBER[family]})
    run = run_cli("prune", model, *BY_MAGNITUDE, "--drop-layers", "1", "--output", tmp_path / "early")
    assert run.code == 4 and "layer 2 where it becomes layer 1" in run.stderr and not (tmp_path / "early").exists()
    run = run_cli("prune", model, *BY_MAGNITUDE, "--drop-layers", "2,3", "--output", tmp_path / "last")
    assert run.code == 0, run.stderr
    load_stock(tmp_path / "last")


@pytest.mark.parametrize("family", BY_NUMBER)
def test_the_proof_drops_an_early_layer(family: str) -> None:
    architecture = found_out(family, **BY_NUMBER[family])
    traced = trace(architecture)
    with pytest.raises(UnsupportedError, match=r"only the last layers can go"):
        prove(architecture, traced, ("num_hidden_layers",), prune_twin)
    prove(architecture, traced, ("num_hidden_layers",), prune_twin, False)


def test_a_scale_by_the_number_of_layers_stays_what_it_was(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = make_tiny("minicpm3", **{**SIZES, **LATENT, "num_key_value_heads": 8, "scale_depth": 1.4})
    run = run_cli("prune", model, *BY_MAGNITUDE, "--drop-layers", "1,2,3", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scale_depth"] == pytest.approx(0.7)
    whole, part = load_stock(model), load_stock(tmp_path / "out")
    del whole.model.layers[1:]
    tokens = torch.randint(3, 90, (2, 20))
    torch.testing.assert_close(part(tokens).logits, whole(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_an_indexer_stays_with_the_layers_that_share_its_choice(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = make_tiny("glm_moe_dsa", **{**SIZES, **INDEXED})
    run = run_cli("prune", model, *BY_MAGNITUDE, "--drop-layers", "1", "--output", tmp_path / "early")
    assert run.code == 5 and "layer 2 takes what layer 1 computes, which would go" in run.stderr, run.stderr
    run = run_cli("prune", model, *BY_MAGNITUDE, "--drop-layers", "0,2", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["indexer_types"] == ["full", "shared"]
    load_stock(tmp_path / "out")(torch.randint(3, 90, (2, 20)))


SHARING = {
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "laurel_rank": 8,
    "pad_token_id": 0,
}


def test_kv_groups_that_layers_share_stay_where_query_heads_go(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Each layer would keep groups of its own choice, and read the keys of others."""
    model, plan = make_tiny("gemma3n_text", **{**SIZES, **SHARING}), tmp_path / "plan.json"
    run = run_cli("prune", model, *BY_CHANCE, "--num-key-value-heads", "1", "--output", tmp_path / "groups")
    assert run.code == 5 and "keep the same groups" in run.stderr and not (tmp_path / "groups").exists(), run.stderr
    heads = ["--num-attention-heads", "4", "--output", tmp_path / "heads", "--save-plan", plan]
    run = run_cli("prune", model, *BY_CHANCE, *heads)
    assert run.code == 0, run.stderr
    assert difference(model, tmp_path / "heads", plan) < 1e-4


# --- what a text does not reach --------------------------------------------------------------------------------------


def test_what_takes_no_part_in_text_keeps_its_heads() -> None:
    sizes = {"layers": 2, "attention_heads": 8, "ffn_dim": 48}
    halves = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in sizes.items()}
    config: Any = AutoConfig.for_model("bart", vocab_size=96, d_model=64, max_position_embeddings=64, **halves)
    traced = trace(settle_head_dim(discover(config, expected_index(config))))
    refused = {width for width, reason in traced.refused.items() if "encoder_attn" in reason}
    assert refused == {"hidden_size", "num_attention_heads", "num_key_value_heads"}
    assert traced.of("intermediate_size")


# --- what is stored beside the weights -----------------------------------------------------------------------------


def test_a_table_of_experts_can_lose_none(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = make_tiny("deepseek_v4", **{**SIZES, **HASHED})
    run = run_cli("prune", model, *BY_MAGNITUDE, "--experts", "4", "--output", tmp_path / "out")
    assert run.code == 5 and "tid2eid names experts by their numbers" in run.stderr, run.stderr
    legal = json.loads(run_cli("inspect", model, "--json").stdout)["prunable"]["num_experts"]
    assert legal.startswith("no: ") and "tid2eid" in legal


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_what_a_twin_stores_beside_its_weights_has_values(family: str) -> None:
    architecture = found_out(family, **FAMILIES[family])
    model = build_twin(architecture, proof_sizes(architecture.config, False)).model
    stored = [own for name, own in model.named_buffers() if name in model.state_dict()]
    assert stored and all(len(own.unique()) == own.numel() and own.all() for own in stored)


# --- settings of layers --------------------------------------------------------------------------------------------

SETTINGS = {
    "gemma3_text": ("layer_types",),
    "cohere2": ("layer_types",),
    "smollm3": ("no_rope_layers",),
    "qwen3_moe": ("mlp_only_layers",),
    "deepseek_v3": ("first_k_dense_replace",),
    "qwen3_next": ("layer_types",),
    "gpt_oss": ("layer_types",),
}


@pytest.mark.parametrize("family", SETTINGS)
def test_a_setting_that_does_not_follow_the_layers_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer goes, and each setting in turn is cut as if the last one had gone."""
    config: Any = tiny_config(model_type(family), **{**SIZES, **FAMILIES[family]})
    kept = (1, 2, 3)
    check_kept_layers(config, kept)
    changes = rules.layer_changes(config, kept)
    for name in SETTINGS[family]:
        wrong = {**changes, name: rules.layer_changes(config, (0, 1, 2))[name]}
        assert wrong[name] != changes[name]
        monkeypatch.setattr("llmprune_cli.family.kept_layers.layer_changes", lambda *_, wrong=wrong: wrong)
        with pytest.raises(UnsupportedError, match=r"makes another layer of layer|cannot have only some"):
            check_kept_layers(config, kept)
        monkeypatch.undo()


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "smollm3"])
def test_the_proof_notices_stale_settings_of_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = found_out(family, **FAMILIES[family])
    traced = trace(architecture)

    def stale(config: Any, kept: Sequence[int]) -> dict[str, Any]:
        changes = right(config, kept)
        return {**changes, **{name: right(config, range(len(kept)))[name] for name in SETTINGS[family]}}

    right = rules.layer_changes
    monkeypatch.setattr(rules, "layer_changes", stale)
    with pytest.raises((LlmpruneError, ValueError)):
        prove(architecture, traced, ("num_hidden_layers",), prune_twin)


# --- ways of asking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "jamba", "mamba", "falcon_h1"])
def test_a_twin_answers_in_every_way_and_shows_its_window(family: str) -> None:
    architecture = found_out(model_type(family), **FAMILIES[family])
    twin = build_twin(architecture, proof_sizes(architecture.config, False))
    answers = answer(twin.model, twin.tokens)
    assert all(isinstance(logits, torch.Tensor) and logits.isfinite().all() for logits in answers.values()), answers
    assert differ(answers, answers)[0] == 0.0
    if family == "gemma3_text":
        wider = reconfigure(twin.architecture.config, {"sliding_window": 20})
        other = type(twin.model)(wider).double().eval()
        other.load_state_dict(twin.model.state_dict())
        assert differ(answers, answer(other, twin.tokens))[0] > 1e-3


def test_a_pruned_twin_that_does_not_run_is_refused() -> None:
    logits = torch.arange(6.0).reshape(1, 2, 3)
    with pytest.raises(UnsupportedError, match=r"A pruned twin does not run from a cache \(index 7"):
        differ(
            {"in a batch": logits, "from a cache": logits},
            {"in a batch": logits, "from a cache": IndexError("index 7")},
        )
    assert (
        differ({"in a batch": logits, "from a cache": ValueError()}, {"in a batch": logits, "from a cache": logits})[0]
        == 0
    )
    alike = {"in a batch": torch.ones(1, 2, 3)}
    assert math.isnan(differ(alike, alike)[0])  # which is no proof


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "lfm2_moe"])
def test_every_expert_of_a_twin_is_reached(family: str) -> None:
    architecture = found_out(family, **FAMILIES[family])
    twin = build_twin(architecture, proof_sizes(architecture.config, False))
    name = next(name for name, own in twin.model.named_parameters() if name.endswith("down_proj") and own.ndim == 3)
    experts, answers = twin.model.get_parameter(name), answer(twin.model, twin.tokens)
    for expert in range(len(experts)):
        with torch.no_grad():
            experts[expert].neg_()
            assert differ(answers, answer(twin.model, twin.tokens))[0] > 1e-5, expert
            experts[expert].neg_()


# --- logits that cannot differ -------------------------------------------------------------------------------------


def test_a_cap_on_the_logits_hides_no_difference() -> None:
    """The router of Gemma 4 divides by the root of the hidden size, which nothing makes up for."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 2, "head_dim": 16}
    routed = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 8}
    alone = {"hidden_size_per_layer_input": 0, "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 2}}}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    gemma = found_out("gemma4_text", final_logit_softcapping=30.0, **sizes, **routed, **alone, **kinds)
    found = trace(gemma)
    prove(gemma, found, ("num_attention_heads", "num_experts"), prune_twin)
    with pytest.raises(UnsupportedError, match="The twin proof fails"):
        prove(gemma, found, ("hidden_size", "num_experts"), prune_twin)


# --- layers without their like -------------------------------------------------------------------------------------


def test_a_width_is_proven_on_the_only_layer_of_a_kind_though_layers_go_beside_it() -> None:
    lfm2 = found_out("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    found = trace(lfm2)
    prove(lfm2, found, ("hidden_size", "num_hidden_layers"), prune_twin)
    bindings = tuple(own for own in found.bindings if not (own.template.endswith("in_proj.weight") and own.axis == 1))
    assert len(bindings) < len(found.bindings)
    with pytest.raises(LlmpruneError, match="in_proj"):
        prove(lfm2, replace(found, bindings=bindings), ("hidden_size", "num_hidden_layers"), prune_twin)
