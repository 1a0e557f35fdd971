"""The widths and parameter counts that the reference example printed, from configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import run_cli

LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "float16",
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
CONFIGS = {
    "Llama-3.1-8B": {**LLAMA3, "max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE},
    "Llama-3-8B": {**LLAMA3, "max_position_embeddings": 8192, "rope_theta": 5e5},
    "Llama-2-7B": {
        **LLAMA3,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 4096,
    },
    "Phi-3-mini-4k": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
    },
    "Qwen2-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    },
}
ROWS = [
    ("Llama-3.1-8B", "0.5", (2048, 16, 8, 7168), 2_337_409_024),
    ("Llama-3-8B", "0.5", (2048, 16, 8, 7168), 2_337_409_024),
    ("Llama-2-7B", "0.5", (2048, 16, 16, 5504), 1_750_206_464),
    ("Phi-3-mini-4k", "0.5", (1536, 16, 16, 4096), 1_004_570_112),
    ("Qwen2-7B", "0.428571428", (2048, 16, 4, 10825), 2_778_904_576),
]
WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@pytest.mark.parametrize(("model", "pruning_ratio", "widths", "parameters"), ROWS, ids=[row[0] for row in ROWS])
def test_dry_run_reproduces_the_reference_table(
    tmp_path: Path, model: str, pruning_ratio: str, widths: tuple[int, ...], parameters: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[model]))
    run = run_cli("prune", tmp_path, "--pruning-ratio", pruning_ratio, "--dry-run", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert tuple(result["after"]["widths"][name] for name in WIDTHS) == widths
    assert result["after"]["parameters"] == parameters
    assert result["output"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
