"""config.json describes the written tensors to every reader: transformers 4 and 5, llama.cpp's converter, mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune_cli.family.layers import every_nth
from support import families
from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.refusals import edit_json
from support.stock import load_stock
from support.tiny import save_tiny

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]}
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
    "a part of each head": ("gpt_neox", {}, {"rope_theta": 10000, "rotary_emb_base": 10000, "rotary_pct": 0.25}),
    "lengthened": ("phi3-partial", {}, {"rope_scaling": LONGROPE}),
    "not scaled": ("qwen2", {}, {"rope_scaling": None}),
}


@pytest.mark.parametrize("case", examples(CASES, [*CASES][:3]))
def test_older_settings_stand_beside_those_of_today(case: str, tmp_path: Path) -> None:
    family, changes, older = CASES[case]
    settings = {**families.SIZES, **families.FAMILIES[family], **changes, "initializer_range": 0.3}
    source = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    assert run_cli("export", source, "--output", tmp_path / "out").code == 0
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


EXPERT_COUNTS = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "mixtral": ("num_experts", "num_local_experts"),
    "deepseek_v3": ("n_routed_experts", "num_local_experts"),
}


@pytest.mark.parametrize("family", EXPERT_COUNTS)
def test_the_count_of_experts_has_every_name(family: str, tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli("prune", tiny_of(family), *BY_MAGNITUDE, "--experts", "4", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config.get(name) for name in EXPERT_COUNTS[family]} == dict.fromkeys(EXPERT_COUNTS[family], 4)
    load_stock(tmp_path / "out")


def test_kinds_of_layers_have_their_first_names(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli("export", tiny_of("granitemoehybrid"), "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == ["mamba", "attention"] * 2
    load_stock(tmp_path / "out")


@pytest.mark.parametrize(
    ("special", "n"), [("0001", 4), ("00010", 4), ("00000", 6), ("111", 1), ("0101", 2), ("0010", 3), ("1000", None)]
)
def test_every_nth_layer(special: str, n: int | None) -> None:
    assert every_nth([digit == "1" for digit in special]) == n


# --- what follows the layers that stay -----------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"
EVERY = {  # family, kinds of layers, layers to drop, the number of every n-th layer before, and what is written
    "gemma3": ("gemma3_text", [SLIDING, SLIDING, FULL] * 2, "1,4", "sliding_window_pattern", 3, 2),
    "gemma3, not said": ("gemma3_text", [SLIDING, SLIDING, FULL] * 2, "1,4", "sliding_window_pattern", None, 2),
    "gemma3, no rhythm": ("gemma3_text", [SLIDING, SLIDING, FULL] * 2, "1", "sliding_window_pattern", 3, None),
    "gemma3, no window": ("gemma3_text", [SLIDING, FULL] * 2, "1,3", "sliding_window_pattern", 2, 3),
    "cohere2": ("cohere2", [SLIDING, SLIDING, FULL] * 2, "2", "sliding_window_pattern", 3, 5),
    "exaone4": ("exaone4", [SLIDING, SLIDING, FULL] * 2, "0,3", "sliding_window_pattern", 3, 2),
    "qwen3_next": ("qwen3_next", ["linear_attention", FULL] * 3, "0,2,4", "full_attention_interval", 2, 1),
}


@pytest.mark.parametrize("case", examples(EVERY, ["gemma3", "gemma3, no rhythm", "qwen3_next"]))
def test_the_number_of_every_nth_layer_follows_the_layers(
    case: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    family, kinds, dropped, field, before, after = EVERY[case]
    sizes = {"num_hidden_layers": len(kinds), "layer_types": kinds, "pad_token_id": None}
    model = make_tiny(family, **{**families.FAMILIES[family], **sizes})
    edit_json(model / "config.json", lambda config: config.pop(field, None))
    if before is not None:
        edit_json(model / "config.json", lambda config: config.update({field: before}))
    run = run_cli("prune", model, *BY_MAGNITUDE, "--drop-layers", dropped, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get(field) == after
    gone = {int(layer) for layer in dropped.split(",")}
    assert config["layer_types"] == [kind for layer, kind in enumerate(kinds) if layer not in gone]
    load_stock(tmp_path / "out")


# --- what is not written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi3", "llama", "falcon"])
def test_code_that_is_not_written_is_not_named(family: str, tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    named = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "other/repo--modeling_own.OwnModel"}
    source = save_tiny(tmp_path / "model", family, **{**families.SIZES, **families.FAMILIES[family]})
    edit_json(source / "config.json", lambda config: config.update(auto_map=named))
    for command in (("export",), ("prune", *BY_MAGNITUDE, "--intermediate-size", "24")):
        out = tmp_path / command[0]
        assert run_cli(command[0], source, *command[1:], "--output", out).code == 0
        assert "auto_map" not in json.loads((out / "config.json").read_text())
        load_stock(out, trust_remote_code=True)


def test_a_tokenizers_own_code_travels_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (model / "tokenization_own.py").write_text(code)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    edit_json(model / "tokenizer_config.json", lambda config: config.update(own))
    assert run_cli("export", model, "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenization_own.py").read_text() == code
    assert run_cli("export", tiny_llama, "--output", tmp_path / "plain").code == 0
    assert not list((tmp_path / "plain").glob("*.py"))


FURTHER = {  # the settings that say so, and the name of a tensor of such a layer
    "glm4_moe": ({"num_nextn_predict_layers": 2}, "model.layers.5.eh_proj.weight"),
    "deepseek_v3": ({"num_nextn_predict_layers": 1}, "model.layers.4.enorm.weight"),
    "qwen3_next": ({}, "mtp.layers.0.input_layernorm.weight"),
    "llama": ({"num_nextn_predict_layers": 1}, "model.mtp_layers.0.norm.weight"),
}


@pytest.mark.parametrize("family", FURTHER)
def test_layers_that_predict_further_tokens_are_left_out(
    family: str, tiny_of: Callable[[str], Path], tmp_path: Path
) -> None:
    settings, name = FURTHER[family]
    source = save_tiny(tmp_path / "model", family, shard="1GB", **{**families.SIZES, **families.FAMILIES[family]})
    weights = {own: tensor.clone() for own, tensor in load_file(source / "model.safetensors").items()}
    save_file({**weights, name: torch.ones(8)}, source / "model.safetensors", {"format": "pt"})
    edit_json(source / "config.json", lambda config: config.update(settings))
    run = run_cli("prune", source, *BY_MAGNITUDE, "--drop-layers", "2", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(config.get(field) for field in settings) and config["num_hidden_layers"] == 3
    load_stock(tmp_path / "out")


def test_layers_behind_the_last_that_nothing_explains_are_refused(
    tiny_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "model", shard="1GB")
    weights = {own: tensor.clone() for own, tensor in load_file(source / "model.safetensors").items()}
    save_file({**weights, "model.layers.7.norm.weight": torch.ones(8)}, source / "model.safetensors", {"format": "pt"})
    run = run_cli("inspect", source)
    assert run.code == 3 and "model.layers.7.norm.weight, unknown" in run.stderr


def test_other_names_of_the_hidden_size_follow_it(tmp_path: Path) -> None:
    """LFM2's, which mlx-lm and vLLM read and transformers does not."""
    names = ("block_dim", "conv_dim", "conv_dim_out")
    model = save_tiny(tmp_path / "model", "lfm2", layer_types=["conv", "full_attention"], **dict.fromkeys(names, 64))
    run = run_cli("prune", model, *BY_MAGNITUDE, "--hidden-size", "48", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {settings[name] for name in ("hidden_size", *names)} == {48}
