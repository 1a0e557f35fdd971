"""A config.json that readers of older ones understand, and that transformers still reads as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from conftest import run_cli, save_tiny
from test_oracles import load_stock

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
