"""Healing of tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.heal.training import trainer
from support.cli import Run, run_cli

QUICK = ("--tokens", "2048", "--batch-tokens", "128", "--seq-len", "32", "--learning-rate", "0.003")

LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "llmprune_cli")


def run_recover(pruned: Path, text: Path, output: Path, *options: str | Path) -> Run:
    return run_cli("recover", pruned, "--text", text, "--output", output, *QUICK, *options, "--json")


def recover(pruned: Path, text: Path, output: Path, *options: str | Path) -> dict[str, Any]:
    run = run_recover(pruned, text, output, *options)
    assert run.code == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def interrupt_at(patched: pytest.MonkeyPatch, step: int, marked: bool) -> None:
    """Press Ctrl-C when the checkpoint of a step is written, before or after it is known to be whole."""
    mark = trainer.mark_whole

    def interrupted(folder: Path, number: int) -> None:
        if marked or number != step:
            mark(folder, number)
        if number == step:
            raise KeyboardInterrupt

    patched.setattr(trainer, "mark_whole", interrupted)


def recover_in_two(pruned: Path, text: Path, output: Path, *options: str | Path) -> dict[str, Any]:
    """In two processes of one machine."""
    command = (sys.executable, "-m", *LAUNCH, "recover", pruned, "--text", text, *QUICK, *options, "--output", output)
    run = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result
