"""What was written is read back, and can be verified later; what changes meanwhile is noticed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder import integrity
from llmprune_cli.options import ModelReference
from llmprune_cli.source import opening as loading
from llmprune_cli.source.opening import open_checkpoint
from support.checkpoints import FP8, edit_config, flip, quantize_fp8, rewrite
from support.cli import BY_MAGNITUDE, run_cli
from support.gguf_files import gguf_pair
from support.tiny import save_tiny

CUT = (*BY_MAGNITUDE, "--intermediate-size", "24")


@pytest.fixture
def pruned(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pruned"
    assert run_cli("prune", tiny_llama, *CUT, "--max-shard-size", "20KB", "--output", folder).code == 0
    return folder


def test_a_folder_that_was_written_verifies(pruned: Path, tmp_path: Path) -> None:
    document = json.loads(run_cli("inspect", pruned, "--verify", "--json").stdout)
    listed = json.loads((pruned / "llmprune.json").read_text())["files"]
    others = {"llmprune.json", "README.md"}
    assert {path.name for path in pruned.iterdir()} == {*listed, *others} and len(
        list(pruned.glob("*.safetensors"))
    ) > 1
    assert document["files"] == len(listed) and document["parameters"] > 0
    for form in ("safetensors", "gguf"):
        assert run_cli("export", pruned, "--format", form, "--no-verify", "--output", tmp_path / form).code in (0, 4)
    assert "is what was written" in run_cli("inspect", tmp_path / "safetensors", "--verify").stdout


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(next(folder.glob("*-00002-of-*"))), "model-00002-of-"),
        (lambda folder: flip(folder / "config.json"), "config.json has other contents"),
        (lambda folder: os.truncate(folder / "tokenizer.json", 10), "tokenizer.json has 10 bytes"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "index.json is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors was not written with it"),
        (lambda folder: (folder / "model.onnx_data").write_bytes(b""), "model.onnx_data was not written with it"),
    ],
)
def test_whatever_changed_since_is_named(pruned: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(pruned)
    run = run_cli("inspect", pruned, "--verify")
    assert run.code == 7 and words in run.stderr and run.stdout == ""


def test_what_has_no_checksums_cannot_be_verified(tiny_llama: Path, pruned: Path) -> None:
    run = run_cli("inspect", tiny_llama, "--verify")
    assert run.code == 3 and "llmprune.json" in run.stderr
    (pruned / "llmprune.json").write_text('{"files": 7}')
    assert run_cli("inspect", pruned, "--verify").code == 3
    (pruned / "llmprune.json").write_text('{"files": {"../x": {"size_bytes": 1}}}')
    assert run_cli("inspect", pruned, "--verify").code == 7
    assert run_cli("inspect", pruned, "--verify", "--pruning-ratio", "0.5").code == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_not_written(make_tiny: Callable[..., Path], tmp_path: Path, value: float) -> None:
    source, name = make_tiny(shard="10MB"), "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for command in (["prune", source, *CUT], ["export", source]):
        run = run_cli(*command, "--output", tmp_path / "out")
        assert (
            run.code == 7 and name in run.stderr and not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
        )


def test_a_dtype_that_is_too_narrow_is_named(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, name = make_tiny(shard="10MB"), "model.embed_tokens.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float32)
    tensors[name][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run = run_cli("export", source, "--dtype", "float16", "--output", tmp_path / "out")
    assert run.code == 7 and f"{name} would be written with NaN or infinity as float16" in run.stderr


def test_the_same_command_writes_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    """Tensors large enough for torch to share them among threads."""
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_local_experts": 4, "num_experts_per_tok": 2}
    source = save_tiny(tmp_path / "model", "mixtral", dtype="bfloat16", shard="1GB", **sizes)
    written = []
    threads = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        try:
            out, plan = tmp_path / f"out-{number}", tmp_path / f"plan-{number}"
            run = run_cli(
                "prune", source, *BY_MAGNITUDE, "--pruning-ratio", "0.25", "--experts", "3", "--save-plan", plan,
                "--output", out,
            )  # fmt: skip
            assert run.code == 0, run.stderr
        finally:
            torch.set_num_threads(threads)
        files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        written.append({**files, "plan": plan.read_bytes()})
    assert written[0] == written[1] == written[2]


def test_no_secret_of_the_environment_is_written(
    tiny_llama: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "s3cret" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    text = ("--calibration", text_file, "--calibration-tokens", "200", "--calibration-seq-len", "40")
    run = run_cli("prune", tiny_llama, "--intermediate-size", "24", *text, "--json", "--output", tmp_path / "out")
    assert run.code == 0 and secret not in run.stdout + run.stderr
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("change", ["rewritten", "longer", "cut short", "replaced", "gone"])
def test_a_shard_that_changes_while_it_is_read_is_noticed(
    change: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_tiny(shard="10MB")
    shard = source / "model.safetensors"
    with open_checkpoint(ModelReference(str(source)), need_weights=True) as checkpoint:
        read = checkpoint.tensors()
        next(read)
        if change == "rewritten":
            flip(shard)
        elif change == "longer":
            os.truncate(shard, shard.stat().st_size + 1)
        elif change == "cut short":
            os.truncate(shard, shard.stat().st_size // 2)
        elif change == "replaced":
            shutil.copy2(shard, tmp_path / "copy")
            (tmp_path / "copy").replace(shard)
        else:
            shard.unlink()
        with pytest.raises(CheckpointError, match="while it was being read"):
            list(read)


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("folder.shards._header", "model-00002"),
        ("folder.checkpoint.stamp", "model-00003"),
        ("journal.keys.stamp", "model-00001"),
        ("source.tokenizer.copy_small", "tokenizer.json"),
    ],
)
def test_a_file_that_vanishes_before_it_is_opened_is_named(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    module, function = reader.rsplit(".", 1)
    original = getattr(importlib.import_module(f"llmprune_cli.{module}"), function)

    def remove_first(path: Path, *rest: Path) -> object:
        if path.name.startswith(name):
            path.unlink(missing_ok=True)
        return original(path, *rest)

    monkeypatch.setattr(f"llmprune_cli.{reader}", remove_first)
    text = ("--calibration", text_file, "--calibration-tokens", "240", "--calibration-seq-len", "40")
    run = run_cli("prune", source, "--intermediate-size", "24", *text, "--output", tmp_path / "out")
    assert run.code == 3 and name in run.stderr and not (tmp_path / "out").exists(), run.stderr


@pytest.mark.parametrize("converter", ["convert_bin", "convert_gguf", "dequantize"])
def test_a_file_that_changes_while_it_is_converted_is_noticed(
    converter: str, make_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if converter == "convert_bin":
        source = make_tiny(shard="10MB")
        converted = source / "pytorch_model.bin"
        torch.save(load_file(source / "model.safetensors"), converted)
        (source / "model.safetensors").unlink()
    elif converter == "convert_gguf":
        source = converted = gguf_pair(tmp_path, "llama")[1]
    else:
        source = rewrite(make_tiny(), tmp_path / "form", lambda tensors: quantize_fp8(tensors, (8, 16)))
        edit_config(source, quantization_config=FP8, dtype="bfloat16")
        converted = source / "model.safetensors"
    original = getattr(loading, converter)

    def convert(*rest: object) -> object:
        result = original(*rest)
        flip(converted)
        return result

    monkeypatch.setattr(loading, converter, convert)
    run = run_cli("export", source, "--output", tmp_path / "out")
    assert run.code == 3 and f"{converted} changed while it was being read" in run.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_what_reads_back_otherwise_is_not_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a disk had lost a bit of the first shard between the writing and the reading."""
    shard = "model-00001-of-"
    monkeypatch.setattr(integrity, "_leave_cache", lambda path: flip(path) if path.name.startswith(shard) else None)
    for command in (["prune", tiny_llama, *CUT], ["export", tiny_llama]):
        run = run_cli(*command, "--max-shard-size", "40KB", "--output", tmp_path / "out")
        assert run.code == 7 and "reads back as something else" in run.stderr and not list(tmp_path.iterdir())


def test_weights_stay_as_they_are_stored_whatever_dtype_is_asked_for_and_that_is_said(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = run_cli("prune", tiny_llama, *CUT, "--dtype", "float16", "-o", tmp_path / "out")
    assert run.code == 0 and "stored as float32" in run.stderr and "export --dtype float16" in run.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert "stored as" not in run_cli("inspect", tiny_llama, "--dtype", "float32").stderr
