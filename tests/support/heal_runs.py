"""Healing of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.cli import Run, run_cli

QUICK = ("--tokens", "2048", "--batch-tokens", "128", "--seq-len", "32", "--learning-rate", "0.003")


def run_recover(pruned: Path, text: Path, output: Path, *options: str | Path) -> Run:
    return run_cli("recover", pruned, "--text", text, "--output", output, *QUICK, *options, "--json")


def recover(pruned: Path, text: Path, output: Path, *options: str | Path) -> dict[str, Any]:
    run = run_recover(pruned, text, output, *options)
    assert run.code == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result
