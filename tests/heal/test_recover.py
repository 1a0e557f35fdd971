"""Healing: a pruned model learns what the unpruned one predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.cli import run_cli

QUICK = ("--tokens", "4096", "--batch-tokens", "128", "--seq-len", "32", "--learning-rate", "0.003")


def recover(pruned: Path, text: Path, output: Path, *options: str | Path) -> dict[str, Any]:
    run = run_cli("recover", pruned, "--text", text, "--output", output, *QUICK, *options, "--json")
    assert run.code == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_a_healed_model_is_nearer_to_its_teacher(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    result = recover(pruned, text_file, tmp_path / "healed")
    assert result["after"]["kl"] < 0.8 * result["before"]["kl"]
