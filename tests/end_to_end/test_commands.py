"""The contract with scripts: JSON, tables that say the same, and what a folder holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llmprune_cli.cli.screen.table_parts import count_text
from support.cli import BY_MAGNITUDE, run_cli, run_process


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


def test_tables_say_what_json_says(tiny_llama: Path, tmp_path: Path) -> None:
    document = json.loads(run_cli("inspect", tiny_llama, "--pruning-ratio", "0.5", "--json").stdout)
    table = run_cli("inspect", tiny_llama, "--pruning-ratio", "0.5").stdout
    for side in ("before", "after"):
        assert f"{document[side]['parameters']:,}" in table
    gate = next(line for line in table.splitlines() if "mlp.gate_proj" in line)
    assert gate.split()[1:] == ["0-1", "48", "×", "64", "24", "×", "32", "1.54k", "9.0%"]
    written = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out").stdout
    assert count_text(document["after"]["parameters"]) in written and str(tmp_path / "out") in written.replace("\n", "")


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
