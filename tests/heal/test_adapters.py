"""What `recover --lora` trains: every matrix that can have an adapter, and a word about those that cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from llmprune_cli.folder.tensors import split_name
from llmprune_cli.heal.student.adapters import adapt, matrices
from support.families import FAMILIES, SIZES, model_type
from support.full import examples
from support.heal_runs import run_recover
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny, tiny_config

RANK = 4
STACKED = ("deepseek_v3", "gpt_oss", "jamba", "mixtral", "qwen2_moe", "qwen3_next")


@pytest.mark.parametrize("family", examples(STACKED, ("deepseek_v3",)))
def test_experts_have_adapters_beside_all_other_matrices(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type(family), **SIZES, **FAMILIES[family]))
    names = {name for name, _ in model.named_parameters() if split_name(name)[1]}
    layers, stacks = matrices(model, names)
    linear = {name for name, own in model.named_modules() if isinstance(own, nn.Linear) and split_name(name)[1]}
    assert set(layers) == linear
    assert set(stacks) == {name for name in names if ".experts." in name and not name.endswith("_bias")} != set()


def test_what_is_shared_or_does_more_than_multiply_has_no_adapter() -> None:
    with torch.device("meta"):
        router = PhimoeTopKRouter(tiny_config("phimoe"))
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), router.to_empty(device="cpu")])
    layers[1].weight = layers[0].weight
    model = nn.ModuleDict({"layers": layers})
    assert matrices(model, {name for name, _ in model.named_parameters()}) == (["layers.2"], [])


@pytest.mark.parametrize("family", examples(STACKED, ("deepseek_v3",)))
def test_merged_adapters_of_experts_predict_what_they_did_in_training(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path, family: str
) -> None:
    pytest.importorskip("peft")
    settings = {**SIZES, **FAMILIES[family], "initializer_range": 0.05}
    student = save_tiny(tmp_path / "student", model_type(family), **settings)
    options = ("--teacher", tiny_of(family), "--lora", str(RANK), "--tokens", "512", "--batch-tokens", "64")
    run = run_recover(student, text_file, tmp_path / "healed", *options)
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    best = min(judged["held_out"]["kl"] for judged in result["curve"])
    assert result["after"]["kl"] == pytest.approx(best, rel=1e-5) and best < result["before"]["kl"]
    model = load_stock(tmp_path / "healed")
    layers, stacks = matrices(model, {name for name, _ in model.named_parameters() if split_name(name)[1]})
    shapes = [model.get_parameter(name).shape for name in (*stacks, *(f"{name}.weight" for name in layers))]
    beside = sum(RANK * sum(shape[-2:]) * (shape[0] if len(shape) == 3 else 1) for shape in shapes)
    assert result["trained_parameters"] == beside - (0 if family != "jamba" else _beside_idle(model))
    before, after = written_tensors(student), written_tensors(tmp_path / "healed")
    changed = {split_name(name)[0] for name in before if not torch.equal(before[name], after[name])}
    assert {split_name(name)[0] for name in before if ".experts." in name and not name.endswith("bias")} <= changed


def _beside_idle(model: nn.Module) -> int:
    """Numbers in the adapters that a state space never uses, as it reads the matrix itself."""
    idle = [own.weight.shape for name, own in model.named_modules() if name.endswith("dt_proj")]
    return sum(RANK * sum(shape) for shape in idle)


def test_the_seed_alone_says_what_adapters_begin_with(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = {}
    for name, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        torch.rand(1)  # as whatever runs in this process before
        options = ("--lora", str(RANK), "--tokens", "128", "--seed", seed)
        assert run_recover(pruned, text_file, tmp_path / name, *options).code == 0
        found[name] = written_tensors(tmp_path / name)
    same, others = ([own.equal(found[run][name]) for name, own in found["one"].items()] for run in ("again", "other"))
    assert all(same) and not all(others)
    begun = [_adapters(pruned, seed) for seed in (0, 0, 1)]
    assert all(own.equal(begun[1][name]) for name, own in begun[0].items())
    assert not any(own.equal(begun[2][name]) for name, own in begun[0].items() if "lora_A" in name)


def _adapters(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """The numbers that adapters begin with; others may draw from the same generator as if there were none."""
    model = load_stock(folder)
    state = torch.get_rng_state()
    adapt(model, {name for name, _ in model.named_parameters()}, RANK, seed)
    assert torch.get_rng_state().equal(state)
    torch.rand(1)
    return {name: own.detach() for name, own in model.named_parameters() if "lora_" in name}


def test_what_stays_as_it_is_is_said(tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student = save_tiny(tmp_path / "student", "mamba", **SIZES, **FAMILIES["mamba"], initializer_range=0.05)
    options = ("--teacher", tiny_of("mamba"), "--lora", str(RANK), "--tokens", "512", "--batch-tokens", "64")
    run = run_recover(student, text_file, tmp_path / "healed", *options)
    assert run.code == 0, run.stderr
    said = " ".join(run.stderr.split())
    assert "no adapters beside 8 tensors, such as backbone.layers.0.mixer.A_log" in said
    assert "4 matrices learned nothing, such as those of backbone.layers.0.mixer.dt_proj" in said
    before, after = written_tensors(student), written_tensors(tmp_path / "healed")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = sum(RANK * sum(before[name].shape) for name in changed)
    assert json.loads(run.stdout)["trained_parameters"] == trained
