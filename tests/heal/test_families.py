"""Every family is healed: some steps, and it is nearer to its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.families import FAMILIES, SIZES, TRIED, model_type
from support.full import examples
from support.heal_runs import recover
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny


@pytest.mark.parametrize("family", examples(TRIED, ("qwen2_moe",)))
def test_a_few_steps_bring_it_nearer_to_its_teacher(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    settings = {**SIZES, **FAMILIES[family], "initializer_range": 0.05}
    student = save_tiny(tmp_path / "student", model_type(family), **settings)
    options = ("--teacher", tiny_of(family), "--tokens", "1024", "--batch-tokens", "64")
    result = recover(student, text_file, tmp_path / "healed", *options)
    assert result["after"]["kl"] < result["before"]["kl"]
    load_stock(tmp_path / "healed")
    before, after = written_tensors(student), written_tensors(tmp_path / "healed")
    assert {name: own.shape for name, own in before.items()} == {name: own.shape for name, own in after.items()}


@pytest.mark.parametrize("family", examples(TRIED, ()))
def test_layer_by_layer_it_comes_nearer_to_its_teacher(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    settings = {**SIZES, **FAMILIES[family], "initializer_range": 0.05}
    student = save_tiny(tmp_path / "student", model_type(family), **settings)
    options = ("--teacher", tiny_of(family), "--tokens", "2048", "--batch-tokens", "64", "--mode", "blocks")
    result = recover(student, text_file, tmp_path / "healed", *options)
    assert all(own["error_after"] < own["error_before"] for own in result["layers"])
    load_stock(tmp_path / "healed")


def test_a_model_with_older_names_is_written_with_those_of_today(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    settings = {**SIZES, **FAMILIES["gpt2"], "initializer_range": 0.05}
    student = save_tiny(tmp_path / "student", "gpt2", shard="1GB", **settings)
    today = load_file(student / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in today.items()}
    save_file(older, student / "model.safetensors", metadata={"format": "pt"})
    options = ("--teacher", tiny_of("gpt2"), "--tokens", "256", "--batch-tokens", "64")
    recover(student, text_file, tmp_path / "healed", *options)
    load_stock(tmp_path / "healed")
    assert written_tensors(tmp_path / "healed").keys() == today.keys() != older.keys()
