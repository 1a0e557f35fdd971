"""Run the command line as users do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BY_MAGNITUDE = ("--importance", "magnitude", "--refit", "none")  # as torch-pruning's example does, without any text
BY_CHANCE = ("--importance", "random", "--refit", "none")
CALIBRATED = ("--calibration-tokens", "600", "--calibration-seq-len", "40")
WINDOW = 32  # tokens that a text is evaluated in at a time


@dataclass(frozen=True)
class Run:
    """What a finished command left."""

    code: int
    stdout: str
    stderr: str


def run_cli(*args: str | Path) -> Run:
    """Run `llmprune` within this process: the same code, without the seconds that imports take."""
    from llmprune_cli.__main__ import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    code = ended.value.code
    return Run(code if isinstance(code, int) else int(code is not None), stdout.getvalue(), stderr.getvalue())


def run_process(*args: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Run:
    """Run `llmprune` in a process of its own."""
    command = [sys.executable, "-m", "llmprune_cli", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **(env or {})}
    )
    return Run(done.returncode, done.stdout, done.stderr)


def evaluated(folder: Path, *options: str | Path) -> dict[str, Any]:
    run = run_cli("eval", folder, *options, "--json")
    assert run.code == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report
