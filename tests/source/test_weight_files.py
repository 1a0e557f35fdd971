"""Where weights lie in several forms, every command reads the one that transformers reads, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.cli import BY_MAGNITUDE, Run, evaluated, run_cli
from support.refusals import CHECKPOINT, assert_refused, edit_json
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
Tensors = dict[str, torch.Tensor]


def put(folder: Path, form: str, tensors: Tensors) -> None:
    """Write all tensors into one file, or into two and their index."""
    stem = form.removesuffix(".index.json")
    if stem == form:
        files = {form: tensors}
    else:
        halves = {1: list(tensors)[::2], 2: list(tensors)[1::2]}
        files = {stem.replace(".", f"-{half}."): {own: tensors[own] for own in names} for half, names in halves.items()}
        index = {"metadata": {}, "weight_map": {own: name for name, part in files.items() for own in part}}
        (folder / form).write_text(json.dumps(index))
    for name, part in files.items():
        save_file(part, folder / name, {"format": "pt"}) if "safetensors" in name else torch.save(part, folder / name)


def said(run: Run) -> str:
    """What a command warned of, in one line."""
    return " ".join(run.stderr.split())


def negated(tensors: Tensors) -> Tensors:
    return {name: -tensor for name, tensor in tensors.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder; a test puts the weights into it."""
    return save_tiny(tmp_path / "model", shard="1GB")


def taken(folder: Path) -> Tensors:
    """The tensors of a folder, which are taken out of it."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    (folder / SINGLE).unlink()
    return tensors


@pytest.mark.parametrize(
    ("read", "passed_over"),
    [(SINGLE, INDEX), (SINGLE, BIN), (INDEX, BIN), (INDEX, BIN_INDEX), (BIN, BIN_INDEX)],
)
def test_of_two_forms_all_commands_read_the_one_that_transformers_reads(
    read: str, passed_over: str, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    tensors = taken(folder)
    put(folder, passed_over, negated(tensors))
    put(folder, read, tensors)
    expected = load_stock(folder).state_dict()["model.norm.weight"]
    run = run_cli("export", folder, "--output", tmp_path / "out")
    assert run.code == 0 and f"{read}, which is read as transformers does, and not {passed_over}" in said(run)
    written = written_tensors(tmp_path / "out")
    assert torch.equal(written["model.norm.weight"], expected)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in written.items())
    options = ("--dataset", text_file, "--max-seq-len", "32", "--limit", "2")
    ours, copy = (evaluated(one, *options)["results"][0]["perplexity"] for one in (folder, tmp_path / "out"))
    assert ours == copy


def test_an_index_of_shards_that_are_gone_is_passed_over(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "gone.safetensors"}}))
    options = ("--intermediate-size", "24", "--output", tmp_path / "out")
    run = run_cli("prune", folder, *BY_MAGNITUDE, *options)
    assert run.code == 0 and INDEX in said(run), run.stderr
    (folder / SINGLE).unlink()
    assert_refused(run_cli("inspect", folder), CHECKPOINT, "gone.safetensors, which is missing")


@pytest.mark.parametrize("form", ["other.safetensors", "other.safetensors.index.json"])
def test_the_file_that_config_json_names_is_read(form: str, folder: Path, tmp_path: Path) -> None:
    tensors = taken(folder)
    put(folder, SINGLE, negated(tensors))
    put(folder, form, tensors)
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights=form))
    run = run_cli("export", folder, "--output", tmp_path / "out")
    assert run.code == 0 and f"{form}, which is read" in said(run)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in written_tensors(tmp_path / "out").items())
    load_stock(tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "words"), [("gone.safetensors", "missing"), ("../x.safetensors", "beside it"), (3, "")]
)
def test_a_file_that_config_json_names_must_be_there(named: object, words: str, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights=named))
    assert_refused(run_cli("inspect", folder), CHECKPOINT, "config.json", str(named), words)


# --- adapters ------------------------------------------------------------------------------------------------------


def adapt(folder: Path) -> None:
    """Put a LoRA adapter of the queries into a folder."""
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    sides = {f"{prefix}A.weight": torch.ones(4, 64), f"{prefix}B.weight": torch.ones(64, 4)}
    save_file(sides, folder / "adapter_model.safetensors")


def test_an_adapter_beside_weights_is_left_alone_by_all_commands(folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--dataset", text_file, "--max-seq-len", "32", "--limit", "2")
    before = evaluated(folder, *options)["results"][0]["perplexity"]
    adapt(folder)
    run = run_cli("export", folder, "--output", tmp_path / "out")
    assert run.code == 0 and "a LORA adapter of some/base" in said(run) and "Merge it first" in said(run)
    assert evaluated(folder, *options)["results"][0]["perplexity"] == before  # with peft, transformers applies it


@pytest.mark.parametrize("gone", [("config.json", SINGLE), (SINGLE,)])
def test_an_adapter_alone_is_named(gone: tuple[str, ...], folder: Path, make_tiny: Callable[..., Path]) -> None:
    adapt(folder)
    for name in gone:
        (folder / name).unlink()
    assert_refused(run_cli("inspect", folder), CHECKPOINT, "a LORA adapter of some/base", "merged model")
