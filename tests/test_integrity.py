"""What was written is read back, and can be verified later."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import BY_MAGNITUDE, run_cli, save_tiny
from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder import integrity
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.staging import locked_folder
from llmprune_cli.source import opening as loading
from llmprune_cli.source.opening import ModelReference, open_checkpoint
from test_checkpoint_forms import FP8, edit_config, gguf_pair, quantize_fp8, rewrite

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
    ],
)
def test_whatever_changed_since_is_named(pruned: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(pruned)
    run = run_cli("inspect", pruned, "--verify")
    assert run.code == 7 and words in run.stderr and run.stdout == ""


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


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


# --- what changes meanwhile ----------------------------------------------------------------------------------------


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
        ("folder.checkpoint._check_named_once", "model-00002"),
        ("folder.checkpoint.stamp", "model-00003"),
        ("journal.identity.stamp", "model-00001"),
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


# --- the folders in which it is made -------------------------------------------------------------------------------


def test_a_hidden_folder_that_is_a_link_is_not_followed(tiny_llama: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (tmp_path / ".out.llmprune-work").symlink_to(elsewhere)
    run = run_cli("prune", tiny_llama, *CUT, "--output", tmp_path / "out")
    assert run.code == 6 and "hidden folder is a link" in run.stderr and not (tmp_path / "out").exists()
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_scratch_of_dead_runs_goes_and_that_of_others_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("llmprune-dead", "llmprune-running", "llmprune-of-something-else", "elsewhere"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for name in ("llmprune-dead", "elsewhere"):
        (tmp_path / name / "lock").touch()
    (tmp_path / "llmprune-link").symlink_to(tmp_path / "elsewhere")
    others = set()
    if os.geteuid() == 0:  # nobody else can make a folder that is somebody's
        others = {"llmprune-foreign"}
        (tmp_path / "llmprune-foreign").mkdir()
        (tmp_path / "llmprune-foreign" / "lock").touch()
        os.chown(tmp_path / "llmprune-foreign", 12345, 12345)
    with locked_folder(tmp_path / "llmprune-running"), scratch_folder() as scratch:
        found = {path.name for path in tmp_path.iterdir()} - {scratch.name} - others
        assert all((tmp_path / name).is_dir() for name in others)
        assert found == {"llmprune-running", "llmprune-of-something-else", "llmprune-link", "elsewhere"}
        assert (tmp_path / "elsewhere" / "deep").is_dir() and (tmp_path / "llmprune-running" / "deep").is_dir()
    assert not scratch.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_runs_that_begin_together_leave_each_other_their_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each clears away what it finds, which may be what another has just begun to make."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(100):
                    with scratch_folder() as folder:
                        (folder / "kept").touch()
                        assert (folder / "kept").exists()
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_a_temporary_disk_that_takes_nothing_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-folder"))
    run = run_cli("prune", tiny_llama, *CUT, "--output", tmp_path / "out")
    assert run.code == 6 and "TMPDIR" in run.stderr and [path.name for path in tmp_path.iterdir()] == ["no-folder"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_run_that_died_while_replacing_is_finished_or_undone(moment: str, tiny_llama: Path, tmp_path: Path) -> None:
    """`done` says that all was written; `old` is what stood at the target."""
    target, hidden = tmp_path / "out", tmp_path / ".out.llmprune-work"
    for folder, text in ((target, "old model"), (hidden / "new", "new model")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    (hidden / "done").touch()
    if moment != "before":
        target.rename(hidden / "old")
    if moment == "after":
        (hidden / "new").rename(target)
    run = run_cli("prune", tiny_llama, *CUT, "--output", target)
    assert run.code == 6 and "is not empty" in run.stderr and not hidden.exists()
    assert (target / "config.json").read_text() == ("new model" if moment == "after" else "old model")
    assert run_cli("prune", tiny_llama, *CUT, "--overwrite", "--output", target).code == 0
    assert run_cli("inspect", target, "--verify").code == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]
