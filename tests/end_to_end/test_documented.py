"""What the README promises runs, and its tables are what `inspect` says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmprune_cli
from support import ROOT
from tools import support_matrix

PACKAGE = Path(llmprune_cli.__file__).parent


def test_every_make_target_that_is_promised_runs_something() -> None:
    root = ROOT
    listed = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    promised = {*" ".join(listed).split(), *re.findall(r"`make ([a-z-]+)`", (root / "README.md").read_text())}
    assert {"bench-quality", "bench-memory", "test"} <= promised
    for target in promised:
        dry = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=root, capture_output=True, text=True)
        assert dry.returncode == 0 and "Nothing to be done" not in dry.stdout, f"make {target}: {dry.stderr}"


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_readmes_script_runs(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    readme = (ROOT / "README.md").read_text()
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
