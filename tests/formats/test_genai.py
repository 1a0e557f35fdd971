"""onnxruntime-genai generates what transformers does, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.formats.genai import FAMILIES as GENAI_FAMILIES
from llmprune_cli.formats.genai import PACKAGE, fit_genai
from support import families
from support.exports import export, needs_genai, pruned, verified
from support.full import examples
from support.tiny import save_tiny, tiny_config


@needs_genai
@pytest.mark.parametrize("family", examples(families.TRIED_EXPORTS, ["phi3", "gpt2"]))
def test_genai_generates_what_transformers_does_or_is_refused(family: str, tmp_path: Path) -> None:
    folder = pruned(tmp_path, family, **families.HEADS_OF_16)
    run = export(folder, tmp_path / "genai", "genai", "--dtype", "f32")
    if family not in GENAI_FAMILIES:
        assert run.code == 4 and "its builder" in run.stderr and not (tmp_path / "genai").exists()
        return
    document = verified(run)
    assert document["verification"]["same_tokens"] == 1 and document["verification"]["runtime"].startswith(PACKAGE)
    assert {"genai_config.json", "model.onnx", "tokenizer.json", "config.json"} <= {*document["files"]}


LEAST_LIMITS = {"int8": 0.01, "int4": 0.5}  # of the KL per token


@needs_genai
@pytest.mark.parametrize("dtype", examples(LEAST_LIMITS, []))
def test_genai_quantizes_within_its_limits(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", **families.HEADS_OF_16)
    found = verified(export(folder, tmp_path / "genai", "genai", "--dtype", dtype))["verification"]
    assert found["kl_limit"] >= LEAST_LIMITS[dtype]


BASE = {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048}
YARN = {**BASE, "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
LLAMA3 = {**BASE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
TAKEN = {
    "llama as in Llama 3.1": ("llama", LLAMA3),
    "mistral, linear": ("mistral", LINEAR),
    "mistral, YaRN": ("mistral", YARN),
    "qwen3, linear": ("qwen3", LINEAR),
    "qwen3, YaRN": ("qwen3", YARN),
}
MISTAKEN = [
    ("llama", LINEAR, "RoPE of the kind linear in llama"),
    ("llama", YARN, "RoPE of the kind yarn in llama"),
    ("mistral", LLAMA3, "RoPE of the kind llama3 in mistral"),
    ("qwen2", {**LINEAR, "rope_type": "dynamic"}, "RoPE of the kind dynamic in qwen2"),
    ("gpt_oss", {"rope_type": "default", "rope_theta": 1e4}, "RoPE of the kind default in gpt_oss"),
    ("qwen3", {**BASE, "rope_type": "yarn"}, "beta_fast and beta_slow alone"),
    ("qwen3", {**YARN, "truncate": True}, "without truncate"),
    ("qwen3", {**YARN, "attention_factor": 1.0}, "an attention factor"),
]


@pytest.mark.parametrize(
    ("family", "rope", "reason"), [*MISTAKEN, ("gpt_oss", YARN, ""), *((*own, "") for own in TAKEN.values())]
)
def test_rope_that_the_builder_does_not_get_is_refused(family: str, rope: dict[str, Any], reason: str) -> None:
    config: Any = tiny_config(family, head_dim=64, sliding_window=None, rope_parameters=rope)
    fit = fit_genai(config)
    assert fit.loads == (not reason) and reason in fit.note


WIDE = {
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 160,
    "intermediate_size": 192,
}
MATRICES = {"output of heads": 160, "query": 128, "key": 64, "gate": 192}
OUTPUTS = [("llama", size, name) for name, size in MATRICES.items()]
OUTPUTS += [
    ("lfm2", 3 * 160, "convolution"),
    ("lfm2", 256, "gate"),
    ("gpt_oss", 160, "output of heads"),
    ("phi", 192, "first of the MLP"),
]
OUTPUTS += [
    ("llama", 320, ""),
    ("gpt_oss", 192, ""),
    ("lfm2", 192, ""),
]  # experts are no linear layers; LFM2 widens its MLP


@pytest.mark.parametrize(("family", "tokens", "matrix"), OUTPUTS)
def test_a_vocabulary_as_large_as_another_matrix_is_refused(family: str, tokens: int, matrix: str) -> None:
    own = {"gpt_oss": {"rope_parameters": YARN}, "lfm2": {"layer_types": ["conv", "full_attention"]}}.get(family, {})
    config: Any = tiny_config(family, **WIDE, **own, vocab_size=tokens)
    fit = fit_genai(config)
    assert fit.loads == (not matrix) and (not matrix or f"any matrix with {tokens} outputs" in fit.note)


@needs_genai
@pytest.mark.parametrize("kind", examples(TAKEN, []))
def test_genai_turns_positions_as_the_model_does(kind: str, tmp_path: Path) -> None:
    family, rope = TAKEN[kind]
    sizes = {"head_dim": 64, "num_hidden_layers": 1, "sliding_window": None, "max_position_embeddings": 8192}
    model = save_tiny(tmp_path / "model", family, initializer_range=0.1, rope_parameters=rope, **sizes)
    assert verified(export(model, tmp_path / "genai", "genai", "--dtype", "f32"))["verification"]["same_tokens"] == 1


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {}, "head dim in multiples of 16, not 8"),
        ("phi", families.HEADS_OF_16, "share of a head that turns in multiples of 16, not 8"),
        ("opt", {}, "not known to be right for opt"),
    ],
)
def test_genai_is_refused_from_the_configuration(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family], **changes}
    run = export(save_tiny(tmp_path / "model", family, **settings), tmp_path / "genai", "genai")
    assert run.code == 4 and reason in run.stderr and not (tmp_path / "genai").exists()
