"""Perplexity against a plain transformers loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.run import perplexity as evaluation
from support.cli import WINDOW, evaluated, run_cli
from support.stock import plain_perplexity


def test_a_perplexity_that_overflows_is_null(make_tiny: Callable[..., Path], text_file: Path) -> None:
    folder = make_tiny("llama", tie_word_embeddings=True)
    shard = sorted(folder.glob("*.safetensors"))[0]
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.full_like(tensor, torch.inf) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    run = run_cli("eval", folder, "--dataset", text_file, "--max-seq-len", "32", "--json")
    assert run.code == 0 and json.loads(run.stdout)["results"][0]["perplexity"] is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 0.25}),
        ("gpt2", {"n_inner": 48}),
        ("mixtral", {"num_local_experts": 3}),
    ],
)
def test_it_agrees_with_a_plain_loop(
    make_tiny: Callable[..., Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(evaluation, "LOGIT_ELEMENTS", 96 * 5)  # five positions at a time, so that chunks matter
    folder = make_tiny(family, **changes)
    report = evaluated(folder, "--dataset", text_file, "--max-seq-len", str(WINDOW), "--batch-size", "3")
    expected = plain_perplexity(folder, text_file.read_text(), WINDOW)
    assert report["results"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_the_window_is_the_models_maximum_unless_said_otherwise(tiny_llama: Path, text_file: Path) -> None:
    assert evaluated(tiny_llama, "--dataset", text_file)["results"][0]["max_seq_len"] == 64


def test_long_windows_by_default_are_warned_about(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("llama", max_position_embeddings=8200, num_hidden_layers=1)
    (tmp_path / "long.txt").write_text("word " * 1700)
    run = run_cli("eval", folder, "--dataset", tmp_path / "long.txt", "--json")
    assert run.code == 0 and "--max-seq-len" in run.stderr and json.loads(run.stdout)["results"][0]["windows"] == 1
