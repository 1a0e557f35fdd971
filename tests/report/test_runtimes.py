"""Which runtimes take a model is said before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmprune_cli.report.runtimes import runtime_fits
from support import families
from support.cli import run_cli
from support.tiny import tiny_config

HEADS = ("--num-attention-heads", "4")  # of 8: query heads × head dim is then half of the hidden size


def test_inspect_and_a_dry_run_say_what_will_not_load(make_tiny: Callable[..., Path]) -> None:
    model = make_tiny("starcoder2", use_bias=True)
    for command in (["inspect", model, *HEADS], ["prune", model, *HEADS, "--dry-run"]):
        shown = run_cli(*command)
        assert shown.code == 0 and "Where it runs" in shown.stdout, shown.stderr
        runtimes = {fit["runtime"]: fit for fit in json.loads(run_cli(*command, "--json").stdout)["runtimes"]}
        assert runtimes["transformers"]["loads"] and not runtimes["llama.cpp"]["loads"]
        assert "not the hidden size 64" in runtimes["llama.cpp"]["note"]
    whole = json.loads(run_cli("inspect", model, "--json").stdout)["runtimes"]
    assert {fit["runtime"]: fit["loads"] for fit in whole}["llama.cpp"]


def test_runtimes_outside_are_named_where_they_stumble(make_tiny: Callable[..., Path]) -> None:
    model = make_tiny("llama")
    notes = {}
    for options in ([], list(HEADS)):
        document = json.loads(run_cli("inspect", model, *options, "--json").stdout)
        notes[bool(options)] = {fit["runtime"]: (fit["loads"], fit["note"]) for fit in document["runtimes"]}
    assert "CTranslate2" not in notes[False] and not notes[True]["CTranslate2"][0]
    assert notes[True]["llama.cpp"] == (True, "")
    loads, note = notes[True]["GGUF types of 8 bits and less"]
    assert loads and "48 neurons" in note and "--round-to 32" in note and "hidden" not in note
    packed = json.loads(run_cli("inspect", make_tiny("llama", intermediate_size=96), "--json").stdout)["runtimes"]
    assert not any("GGUF" in fit["runtime"] for fit in packed)


@pytest.mark.parametrize("family", ["smollm3", "olmo", "phi", "stablelm", "cohere", "deepseek_v3", "mamba"])
def test_llama_cpp_is_not_said_to_lack_families_that_are_merely_not_written(family: str) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    found = {fit.runtime: fit for fit in runtime_fits(tiny_config(family, **settings))}
    fit = found["llama.cpp, without --converter"]
    assert "llama.cpp" not in found and not fit.loads
    assert f"llmprune itself does not write {family}" in fit.note and "--converter PATH/convert_hf_to_gguf" in fit.note


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "qwen3_next"])
def test_a_runtime_that_places_every_nth_layer_is_named_where_none_fits(
    family: str, tiny_of: Callable[[str], Path]
) -> None:
    def fits(*dropped: str) -> dict[str, Any]:
        document = json.loads(run_cli("inspect", tiny_of(family), *dropped, "--json").stdout)
        return {fit["runtime"]: fit for fit in document["runtimes"]}

    assert "mlx-lm" not in fits()
    fit = fits("--drop-layers", "2")["mlx-lm"]
    assert not fit["loads"] and ("sliding_window_pattern" in fit["note"] or "full_attention_interval" in fit["note"])


# A family, its settings, and what is said of which runtime. Query heads are halved. `make check-runtimes` holds what is
# said of most of them against the runtimes.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
WINDOWS_ABOVE = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
ROPE_IN_CTRANSLATE2 = ("llama", "mistral", "qwen2", "qwen3")
STUMBLES = [
    ("qwen2", {}, "vLLM", "model_impl"),
    ("qwen2_moe", {}, "vLLM", "model_impl"),
    ("jamba", {}, "vLLM", "query heads"),
    ("falcon", {"ffn_hidden_size": 120, "new_decoder_architecture": True}, "vLLM", "120 neurons are not 4"),
    ("mixtral", {"hidden_size": 144}, "vLLM", "no multiple of 32"),
    ("gpt_oss", {"head_dim": 32, "intermediate_size": 88}, "vLLM", "88 neurons"),
    ("qwen3", {"head_dim": 40}, "vLLM", "head dim of 40"),
    ("llama", {"num_key_value_heads": 8}, "CTranslate2", "WRONG"),
    ("llama", {}, "CTranslate2", "fails at run time"),
    ("phi3", {}, "CTranslate2", "converter fails"),
    ("gemma2", {}, "CTranslate2", "other tokens"),
    ("llama", {"rope_parameters": LLAMA3_ROPE}, "CTranslate2", "RoPE scaling"),
    *((family, {"rope_parameters": YARN}, "CTranslate2", "of the kind yarn") for family in ROPE_IN_CTRANSLATE2),
    ("mistral", {"rope_parameters": LLAMA3_ROPE}, "CTranslate2", "of the kind llama3"),
    ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "CTranslate2", "Gemma's own"),
    ("gemma", {"rope_parameters": LINEAR}, "CTranslate2", "Gemma's own"),
    ("falcon", {"new_decoder_architecture": True}, "CTranslate2", "newer layers"),
    ("lfm2", {}, "vLLM", "other numbers"),
    ("phi", {}, "CTranslate2", "converter fails"),
    ("gpt_neox", {}, "CTranslate2", "converter fails"),
    ("gpt_neox", {}, "vLLM", "other numbers"),
    ("deepseek_v3", {}, "vLLM", "without YaRN"),
    ("gpt_neox", {"intermediate_size": 101}, "mlx-lm", "101 neurons are not 4"),
    ("gpt2", {"intermediate_size": 101}, "mlx-lm", "101 neurons are not 4"),
    ("gpt_oss", {}, "mlx-lm", "stores them"),
    ("phi", {}, "OpenVINO", "cannot trace"),
    ("qwen2", {}, "mlx-lm", "refuses the weights"),
    ("mixtral", {}, "mlx-lm", "refuses the weights"),
    ("starcoder2", {}, "mlx-lm", "refuses the weights"),
    ("granite", {}, "mlx-lm", "refuses the weights"),
    ("deepseek_v3", {}, "OpenVINO", "older versions"),
    ("gemma", {}, "OpenVINO", "older versions"),
    ("exaone4", {}, "OpenVINO", "older versions"),
    ("smollm3", {}, "mistral.rs", "refuses the weights"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "mistral.rs", "refuses the weights"),
    ("phi", {}, "mistral.rs", "bias of the output"),
    ("llama", {"mlp_bias": True}, "mistral.rs", "the biases (mlp_bias) out"),
    ("qwen3", {"attention_bias": True}, "mistral.rs", "the biases (attention_bias) out"),
    ("qwen3", {"rope_parameters": YARN}, "mistral.rs", "never reads RoPE scaling (yarn)"),
    ("llama", {"rope_parameters": YARN}, "mistral.rs", "refuses RoPE scaling of the kind yarn"),
    ("mistral", {"rope_parameters": YARN}, "mistral.rs", "without beta_fast"),
    ("mistral", {"rope_parameters": LINEAR}, "mistral.rs", "of the kind linear"),
    ("deepseek_v2", {}, "mistral.rs", "narrower than keys"),
    ("gpt_oss", {}, "mistral.rs", "in 4 bits alone"),
    ("deepseek_v3", {}, "mistral.rs", "narrower than keys"),
    ("llama", {"intermediate_size": 203}, "bitsandbytes NF4 on AVX-512", "--round-to 64"),
]


@pytest.mark.parametrize(("family", "changes", "runtime", "word"), STUMBLES)
def test_where_a_runtime_was_seen_to_stumble_is_said(
    family: str, changes: dict[str, Any], runtime: str, word: str
) -> None:
    own = {} if family == "falcon" else {"head_dim": 8}
    config = tiny_config(family, **{**own, **changes})
    config.num_attention_heads = 4
    if changes.get("num_key_value_heads") == 8:
        config.num_key_value_heads = 4
    found = {fit.runtime: fit for fit in runtime_fits(config)}
    assert not found[runtime].loads and word in found[runtime].note


@pytest.mark.parametrize(
    ("family", "setting", "experts", "loads", "words"),
    [
        ("deepseek_v4", "n_routed_experts", 144, False, "144 experts on CUDA; it has one for 128 or 192"),
        ("deepseek_v4", "n_routed_experts", 192, True, ""),
        ("mixtral", "num_local_experts", 6, True, "to 4 or 8 experts faster than to 6"),
        ("mixtral", "num_local_experts", 4, True, ""),
        ("qwen3_moe", "num_experts", 600, True, "to 576 experts faster than to 600"),
    ],
)
def test_numbers_of_experts_without_a_kernel_of_their_own_are_told(
    family: str, setting: str, experts: int, loads: bool, words: str
) -> None:
    config = AutoConfig.for_model(family, **{"hidden_size": 64, setting: experts})
    found = {fit.runtime: fit for fit in runtime_fits(config)}.get("vLLM")
    assert (found is None) == (not words)
    assert found is None or (found.loads == loads and words in found.note)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "gemma2"])
def test_a_runtime_without_windows_is_said_to_be_right_within_them(family: str) -> None:
    found = {
        window: {fit.runtime: fit for fit in runtime_fits(tiny_config(family, sliding_window=window))}
        for window in (16, 1_000_000)
    }
    assert found[16]["mlx-lm"].loads and "window of 16 tokens" in found[16]["mlx-lm"].note
    assert "mlx-lm" not in found[1_000_000]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_ctranslate2_is_said_to_be_right_within_windows(family: str) -> None:
    found = {
        window: {fit.runtime: fit for fit in runtime_fits(tiny_config(family, **{**WINDOWS_ABOVE, **settings}))}
        for window, settings in {
            "short": {},
            "long": {"sliding_window": 64},
            "none": {"sliding_window": None},
            "unused": {"sliding_window": None if family == "mistral" else 8, "use_sliding_window": False},
        }.items()
    }
    assert found["short"]["CTranslate2"].loads and "window of 8 tokens only" in found["short"]["CTranslate2"].note
    assert not any("CTranslate2" in own for window, own in found.items() if window != "short")


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        *((family, LINEAR) for family in ROPE_IN_CTRANSLATE2),
        ("gemma", {"rope_type": "default", "rope_theta": 10000}),
        ("llama", {"rope_type": "default", "rope_theta": 5e5}),
    ],
)
def test_rope_that_ctranslate2_has_is_no_trouble(family: str, rope: dict[str, Any]) -> None:
    config = tiny_config(family, rope_parameters=rope, sliding_window=None)
    assert "CTranslate2" not in {fit.runtime for fit in runtime_fits(config)}


def test_experts_are_said_to_stay_whole_where_transformers_quantizes() -> None:
    found = {
        family: {fit.runtime: fit for fit in runtime_fits(tiny_config(family))} for family in ("qwen3_moe", "qwen3")
    }
    runtime = "bitsandbytes, torchao, quanto"
    assert found["qwen3_moe"][runtime].loads and "experts in 16 bits" in found["qwen3_moe"][runtime].note
    assert runtime not in found["qwen3"]


@pytest.mark.parametrize(
    ("family", "sizes", "words"),
    [
        (
            "llama",
            {"hidden_size": 256, "intermediate_size": 1088},
            "with 1088 inputs whole, without a word; --round-to",
        ),
        (
            "llama",
            {"hidden_size": 576, "intermediate_size": 1152},
            "with 576 inputs whole, without a word; ask for gro",
        ),
        ("llama", {"hidden_size": 576, "intermediate_size": 1088}, "with 576 or 1088 inputs"),
        ("llama", {"hidden_size": 256, "intermediate_size": 1152}, ""),
        ("opt", {"hidden_size": 256, "ffn_dim": 1088}, "with 1088 inputs"),
        ("qwen3_moe", {"hidden_size": 256, "intermediate_size": 1088, "moe_intermediate_size": 1088}, ""),
    ],
)
def test_matrices_that_groups_do_not_divide_are_said_to_stay_whole(
    family: str, sizes: dict[str, int], words: str
) -> None:
    config = AutoConfig.for_model(family, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, **sizes)
    found = {fit.runtime: fit for fit in runtime_fits(config)}.get("4 bits in groups of 128")
    assert (found is None) == (not words) and (found is None or words in found.note)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "olmo2", "granite", "starcoder2"])
def test_runtimes_that_were_seen_to_run_a_shape_are_not_blamed(family: str) -> None:
    config = tiny_config(family, head_dim=32, intermediate_size=1088)
    config.num_attention_heads = 4
    assert {fit.runtime for fit in runtime_fits(config) if not fit.loads} <= {
        "llama.cpp",
        "onnxruntime-genai",
        "mlx-lm",
        *(("mistral.rs",) if family == "starcoder2" else ()),
    }


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen2", WINDOWS_ABOVE),
        ("mistral", {"num_attention_heads": 4, "head_dim": 8}),
        ("mistral", {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}}),
        ("gemma2", {"sliding_window": 8, "num_hidden_layers": 3}),
        ("smollm3", {}),
        ("qwen3", {**WINDOWS_ABOVE, "sliding_window": 1_000_000}),
    ],
)
def test_what_mistral_rs_computes_rightly_is_no_trouble(family: str, changes: dict[str, Any]) -> None:
    assert "mistral.rs" not in {fit.runtime for fit in runtime_fits(tiny_config(family, **changes))}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", WINDOWS_ABOVE),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
        ("gemma2", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_windows_that_mistral_rs_gives_to_other_layers_are_told(family: str, changes: dict[str, Any]) -> None:
    found = {fit.runtime: fit for fit in runtime_fits(tiny_config(family, **changes))}["mistral.rs"]
    assert found.loads and "window of 8 tokens only" in found.note
