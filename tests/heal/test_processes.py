"""Two processes heal as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.full import in_full
from support.heal_runs import QUICK, recover

LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "llmprune_cli")


@in_full
@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_two_processes_come_to_the_same(pruned: Path, text_file: Path, tmp_path: Path, mode: str) -> None:
    options = ("--teacher-mode", mode)
    one = recover(pruned, text_file, tmp_path / "one", *options)
    command = [sys.executable, "-m", *LAUNCH, "recover", pruned, "--text", text_file, *QUICK, *options]
    command += ["--output", tmp_path / "two", "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["steps"] == one["steps"]
    assert two["after"]["kl"] == pytest.approx(one["after"]["kl"], rel=0.005)
