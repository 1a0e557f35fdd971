"""Help that is quick, and the version."""

from __future__ import annotations

import os
import subprocess
import sys

import llmprune_cli
from support.cli import run_cli


def cpu_seconds() -> float:
    """Of all processes that this one has waited for; what else the machine does is none of its business."""
    used = os.times()
    return used.children_user + used.children_system


def test_help_is_quick_and_leaves_torch_alone() -> None:
    seconds = []
    for _ in range(3):
        started = cpu_seconds()
        done = subprocess.run([sys.executable, "-m", "llmprune_cli", "--help"], capture_output=True, text=True)
        seconds.append(cpu_seconds() - started)
        assert done.returncode == 0 and all(name in done.stdout for name in ("inspect", "prune", "eval", "export"))
    assert min(seconds) < 0.5  # what else the machine does makes it more
    code = (
        "import sys\nfrom llmprune_cli.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy imports'"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_version() -> None:
    assert run_cli("--version").stdout == f"llmprune {llmprune_cli.__version__}\n"
