"""transformers 4 computes from what was written what transformers 5 computes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from support import families
from support.cli import BY_MAGNITUDE, run_cli
from support.stock import load_stock
from support.tiny import save_tiny

OLDER_PYTHON = os.environ.get("LLMPRUNE_OLDER_PYTHON", "")
READ = """
import json, os, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.load(open(sys.argv[1])))
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.float().eval()(tokens, use_cache=False).logits, os.path.join(folder, "older.pt"))
"""
BASE = {"rope_theta": 54321.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **BASE}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **BASE}
TWO_SPEEDS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, **BASE},
    "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"rope_parameters": {"rope_type": "default", **BASE}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **BASE}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **BASE}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "longrope": ("phi3-partial", {}),
    "part": (
        "glm4",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **BASE}, "head_dim": 16},
    ),
    "neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **BASE}}),
    "two speeds": ("gemma3_text", {"rope_parameters": TWO_SPEEDS}),
    "windows": ("cohere2", {"rope_parameters": {"rope_type": "default", **BASE}}),
    "no rope": ("smollm3", {"rope_parameters": {"rope_type": "default", **BASE}}),
    "experts": ("qwen3_moe", {"rope_parameters": {"rope_type": "default", **BASE}}),
    "experts of mixtral": ("mixtral", {}),
    "experts of gpt-oss": ("gpt_oss", {}),
    "unscaled gpt-oss": ("gpt_oss", {"rope_parameters": {"rope_type": "default", **BASE}}),
    "groups of experts": ("deepseek_v3", {"rope_parameters": {"rope_type": "default", **BASE}}),
    "state spaces": ("granitemoehybrid", {}),
    "rhythms": ("jamba", {}),
    "state spaces beside heads": ("falcon_h1", {}),
    "linear attention": ("qwen3_next", {}),
    "positions that are learned": ("gpt2", {}),
}
WIDTHS = {"deepseek_v3": ("--experts", "4"), "gpt2": ("--intermediate-size", "24"), "mixtral": ("--experts", "4")}


@pytest.mark.skipif(not OLDER_PYTHON, reason="run make check-consumers")
def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    tokens = torch.arange(80).reshape(2, 40) * 7 % 90 + 3
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    folders = {}
    for name, (family, changes) in MODELS.items():
        settings = {**families.SIZES, **families.FAMILIES[family], "initializer_range": 0.3, **changes}
        source = save_tiny(tmp_path / f"{name}-source", families.model_type(family), **settings)
        folders[name] = tmp_path / name
        widths = WIDTHS.get(family, ("--layers", "3"))
        run = run_cli("prune", source, *BY_MAGNITUDE, *widths, "--output", folders[name])
        assert run.code == 0, (name, run.stderr)
    _read(tmp_path / "tokens.json", *folders.values())
    wrong = {}
    for name, folder in folders.items():
        with torch.no_grad():
            logits = load_stock(folder)(tokens, use_cache=False).logits
        difference = float((torch.load(folder / "older.pt") - logits).abs().max() / logits.abs().max())
        wrong |= {name: difference} if difference > 1e-4 else {}
    assert not wrong


@pytest.mark.skipif(not OLDER_PYTHON, reason="run make check-consumers")
def test_transformers_4_computes_the_same_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    options = ("--num-key-value-heads", "2", "--intermediate-size", "1472")
    run = run_cli("prune", smollm2, *options, *BY_MAGNITUDE, "--output", tmp_path / "pruned")
    assert run.code == 0, run.stderr
    tokens = torch.arange(60).reshape(1, 60) * 37 % 4000 + 3
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    _read(tmp_path / "tokens.json", tmp_path / "pruned")
    with torch.no_grad():
        logits = load_stock(tmp_path / "pruned").float()(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.load(tmp_path / "pruned" / "older.pt"), logits, rtol=1e-3, atol=1e-3)


def _read(*arguments: Path) -> None:
    env = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [OLDER_PYTHON, "-W", "ignore", "-c", READ, *map(str, arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
