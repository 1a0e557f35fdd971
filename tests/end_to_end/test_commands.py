"""The contract with scripts and with the next maintainer: help, JSON, export, and who imports whom."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmprune_cli
import support_matrix
from conftest import BY_MAGNITUDE, run_cli, run_process
from test_oracles import load_stock
from test_peer import written_tensors

PACKAGE = Path(llmprune_cli.__file__).parent


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_leaves_torch_alone() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "llmprune_cli", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and all(name in done.stdout for name in ("inspect", "prune", "eval", "export"))
    assert statistics.median(seconds) < 0.5
    code = (
        "import sys\nfrom llmprune_cli.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy imports'"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_every_make_target_that_is_promised_runs_something() -> None:
    root = Path(__file__).parents[1]
    listed = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    promised = {*" ".join(listed).split(), *re.findall(r"`make ([a-z-]+)`", (root / "README.md").read_text())}
    assert {"bench-quality", "bench-memory", "test"} <= promised
    for target in promised:
        dry = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=root, capture_output=True, text=True)
        assert dry.returncode == 0 and "Nothing to be done" not in dry.stdout, f"make {target}: {dry.stderr}"


def test_version() -> None:
    assert run_cli("--version").stdout == f"llmprune {llmprune_cli.__version__}\n"


# --- JSON ----------------------------------------------------------------------------------------------------------


def test_every_command_prints_one_document(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    commands: list[list[str | Path]] = [
        ["inspect", tiny_llama],
        ["inspect", tiny_llama, "--pruning-ratio", "0.5"],
        ["prune", tiny_llama, "--pruning-ratio", "0.5", "--dry-run"],
        ["prune", tiny_llama, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "pruned"],
        ["eval", tmp_path / "pruned", "--dataset", text_file, "--max-seq-len", "32"],
        ["export", tmp_path / "pruned", "--output", tmp_path / "exported"],
    ]
    for command in commands:  # in a process of its own where libraries have the most to say
        run = (run_process if command[0] == "eval" else run_cli)(*command, "--json")
        assert run.code == 0, run.stderr
        assert json.loads(run.stdout)["schema_version"] == 1


def test_a_perplexity_that_overflows_is_null(make_tiny: Callable[..., Path], text_file: Path) -> None:
    folder = make_tiny("llama", tie_word_embeddings=True)
    shard = sorted(folder.glob("*.safetensors"))[0]
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.full_like(tensor, torch.inf) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    run = run_cli("eval", folder, "--dataset", text_file, "--max-seq-len", "32", "--json")
    assert run.code == 0 and json.loads(run.stdout)["results"][0]["perplexity"] is None


def test_tables_say_what_json_says(tiny_llama: Path, tmp_path: Path) -> None:
    document = json.loads(run_cli("inspect", tiny_llama, "--pruning-ratio", "0.5", "--json").stdout)
    table = run_cli("inspect", tiny_llama, "--pruning-ratio", "0.5").stdout
    for side in ("before", "after"):
        assert f"{document[side]['parameters']:,}" in table
    assert "0-1: 2 ×" in table and "48 × 64" in table and "24 × 32" in table
    written = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out").stdout
    assert f"{document['after']['parameters']:,}" in written and str(tmp_path / "out") in written.replace("\n", "")


# --- what a folder holds -------------------------------------------------------------------------------------------


def test_the_output_holds_everything_that_a_user_needs(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(settings))
    run = run_cli("prune", source, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out", "--seed", "3")
    assert run.code == 0, run.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    companions = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert companions | {"config.json", "llmprune.json", "model.safetensors"} <= names
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings
    manifest = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert manifest["source"] == str(source) and manifest["options"]["pruning_ratio"] == 0.5
    assert manifest["widths"]["after"]["hidden_size"] == 32 and manifest["options"]["seed"] == 3
    assert manifest["parameters"]["before"] > manifest["parameters"]["after"]
    assert {"llmprune", "torch", "transformers"} <= manifest["versions"].keys()


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


# --- export --------------------------------------------------------------------------------------------------------


def test_export_changes_dtype_and_shards_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    run = run_cli(
        *("export", tiny_llama, "--output", tmp_path / "half", "--dtype", "bfloat16"),
        *("--max-shard-size", "25KB", "--format", "safetensors", "--json"),
    )
    assert run.code == 0, run.stderr
    before, after = written_tensors(tiny_llama), written_tensors(tmp_path / "half")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    shards = list((tmp_path / "half").glob("model-*.safetensors"))
    assert len(shards) > 2 and max(shard.stat().st_size for shard in shards) <= 25_000
    assert "larger than" not in run.stderr
    small = run_cli("export", tiny_llama, "--output", tmp_path / "small", "--max-shard-size", "10KB")
    large = [shard for shard in (tmp_path / "small").glob("*.safetensors") if shard.stat().st_size > 10_000]
    assert large and f"Shards larger than --max-shard-size: {len(large)}." in small.stderr
    model = load_stock(tmp_path / "half")
    assert model.config.dtype == torch.bfloat16
    assert run_cli("export", tiny_llama, "--output", tmp_path / "same").code == 0
    same = written_tensors(tmp_path / "same")
    assert all(torch.equal(before[name], same[name]) for name in before)
    assert list((tmp_path / "same").glob("*.safetensors")) == [tmp_path / "same" / "model.safetensors"]


def test_export_keeps_the_manifest_of_a_pruned_model(tiny_llama: Path, tmp_path: Path) -> None:
    assert (
        run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", tmp_path / "a").code == 0
    )
    assert run_cli("export", tmp_path / "a", "--output", tmp_path / "b").code == 0
    before, after = (json.loads((tmp_path / name / "llmprune.json").read_text()) for name in ("a", "b"))
    assert after.pop("export")["format"] == "safetensors" and after == before


# --- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_readmes_script_runs(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    script = next(block for block in readme.split("```") if block.startswith("sh\n#!"))[3:]
    (tmp_path / "chain.sh").write_text(script)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "chain.sh", str(tiny_llama), str(text_file)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("table", support_matrix.TABLES)
def test_the_readmes_tables_are_what_inspect_says(table: str) -> None:
    start, end = support_matrix.marks(table)
    made = start + support_matrix.TABLES[table]() + end
    assert made in support_matrix.README.read_text(encoding="utf-8"), "run make matrix"
