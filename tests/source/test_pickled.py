"""Pickled weights prune as safetensors do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from support.cli import BY_MAGNITUDE, run_cli
from support.stock import written_tensors


def test_pickled_weights_prune_as_safetensors_do(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (False, True):
        folder = make_tiny("llama", tie_word_embeddings=tied)
        work = tmp_path / f"tied-{tied}"
        state = written_tensors(folder)
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]  # as torch.save stores both names
        pickled = work / "pickled"
        shutil.copytree(folder, pickled, ignore=shutil.ignore_patterns("*.safetensors*"))
        torch.save(
            {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, pickled / "pytorch_model.bin"
        )
        for source, target in ((folder, "a"), (pickled, "b")):
            run = run_cli("prune", source, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", work / target)
            assert run.code == 0, run.stderr
        first, second = written_tensors(work / "a"), written_tensors(work / "b")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        shutil.rmtree(folder)
