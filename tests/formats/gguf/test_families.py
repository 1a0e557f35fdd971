"""GGUF files of every architecture, run by llama.cpp itself, or refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import families
from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.gguf_exports import export, needs_llamacpp, tiny, verified

pytestmark = needs_llamacpp

LONG_ROPE = {
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
}
# What comes of query heads that do not fill the hidden size.
SAID = {
    "qwen2": "written as llama.cpp's llama",
    "phi3": "written as llama.cpp's llama",
    "qwen2_moe": "llama.cpp's qwen2moe does not load",
    "olmo2": "llama.cpp's olmo2 does not load",
    "starcoder2": "llama.cpp's starcoder2 does not load",
}
VARIANTS: dict[str, dict[str, Any]] = {"llama-mha": {}, "phi3-partial": LONG_ROPE, "falcon-multi-query": {}}
ARCHITECTURES = {
    family: (settings, SAID.get(family, "")) for family, settings in {**families.EXPORTED, **VARIANTS}.items()
}


@pytest.mark.parametrize("family", {**families.TRIED_EXPORTS, **VARIANTS})
def test_llama_cpp_runs_every_architecture_pruned_or_it_is_refused(family: str, tmp_path: Path) -> None:
    settings, said = ARCHITECTURES[family]
    folder = tiny(tmp_path / "model", family, **settings)
    cut = ("--head-pruning-ratio", "0.5", "--intermediate-pruning-ratio", "0.25")
    assert run_cli("prune", folder, *BY_MAGNITUDE, *cut, "--output", tmp_path / "pruned").code == 0
    run = export(tmp_path / "pruned", tmp_path / "gguf", "--dtype", "f32")
    if "does not load" in said:
        assert run.code == 4 and said in run.stderr and "is not the hidden size 64" in run.stderr
        assert not (tmp_path / "gguf").exists()
    else:
        document = verified(run)
        is_biased = bool({**families.FAMILIES[family], **settings}.get("attention_bias"))
        assert said in document["note"] and bool(said or is_biased) == bool(document["note"])
        assert ("without its biases" in document["note"]) >= is_biased
        assert document["files"] == ["README.md", "llmprune.json", "model-f32.gguf"]
        assert document["verification"]["same_tokens"] == 1
    if said:  # where heads fill the hidden size it is written as what it is
        half = run_cli("prune", folder, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "half")
        assert half.code == 0, half.stderr
        assert verified(export(tmp_path / "half", tmp_path / "full", "--dtype", "f32"))["note"] == ""


NEED_FULL_WIDTH = ["qwen2", "qwen2_moe", "phi3", "olmo2", "starcoder2"]


@pytest.mark.parametrize("family", examples(NEED_FULL_WIDTH, ["qwen2_moe", "olmo2"]))
def test_llama_cpp_indeed_loads_no_such_widths(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from llmprune_cli.formats.gguf.families import FAMILIES

    folder = tiny(tmp_path / "model", family, **ARCHITECTURES[family][0])
    assert (
        run_cli("prune", folder, *BY_MAGNITUDE, "--head-pruning-ratio", "0.5", "--output", tmp_path / "pruned").code
        == 0
    )
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], full_width=False))
    run = export(tmp_path / "pruned", tmp_path / "gguf")
    assert run.code == 7 and "llama.cpp does not load the export" in run.stderr, run.stderr
    assert not (tmp_path / "gguf").exists()


SHORT = {"rope_theta": 1e4, "original_max_position_embeddings": 12, "factor": 4.0}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 RoPE": (
        "llama",
        {"rope_parameters": {**SHORT, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "yarn RoPE": ("llama", {"rope_parameters": {**SHORT, "rope_type": "yarn"}}),
    "linear RoPE in the full layers": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "windows in unusual layers": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "windows longer than the context": ("gemma2", {"sliding_window": 64}),
    "a head tied to the embedding": ("gpt_neox", {"tie_word_embeddings": True}),
    "attention and MLP in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}


@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_is_told_of(form: str, tmp_path: Path) -> None:
    family, settings = FORMS[form]
    run = export(tiny(tmp_path / "model", family, **settings), tmp_path / "gguf", "--dtype", "f32")
    assert verified(run)["verification"]["same_tokens"] == 1
