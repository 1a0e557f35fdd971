"""A few faults of the campaign that `make faults` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from support import TESTS
from support.cli import run_cli
from support.refusals import OUTPUT
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

PAIRS = [("prune, overwriting", kind) for kind in ("kill", "other shard")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_a_few_faults_lose_nothing() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); from tools.faults.campaign import run_campaign\n"
        f"met, problems = run_campaign(0, 3, print, {PAIRS})\n"
        f"assert met.total() == {len(PAIRS)} and not problems, problems"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


READ_ONLY = """
import errno, os, sys

def refuse(name, arguments):
    if name == "open" and str(arguments[0]).endswith("points/mlp-50%/pruned/llmprune.json"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

sys.addaudithook(refuse)
from llmprune_cli.__main__ import main
main(sys.argv[1:])
"""


def test_a_sweep_whose_disk_turns_read_only_ends_in_words_and_goes_on(tmp_path: Path) -> None:
    """While a point is written, of which no folder that becomes the output is there yet."""
    model, text, out = (
        save_tiny(tmp_path / "model", vocab_size=BYTE_LEVEL_VOCABULARY),
        tmp_path / "text.txt",
        tmp_path / "out",
    )
    save_byte_level(model)
    text.write_text("\n\n".join(topics.values())[:20000])
    asked = ["sweep", model, "--mlp", "25%,50%", "--calibration", text, "--calibration-tokens", "240"]
    asked += ["--calibration-seq-len", "40", "--output", out]
    words = list(map(str, asked))
    done = subprocess.run([sys.executable, "-c", READ_ONLY, *words], capture_output=True, text=True)
    assert done.returncode == OUTPUT, done.stderr
    assert "Traceback" not in done.stderr and "Read-only file system" in done.stderr, done.stderr
    assert f"beside {out}" in done.stderr and "--resume" in done.stderr and not out.exists()
    run = run_cli(*words, "--resume")
    assert run.code == 0, run.stderr
    assert sorted(path.name for path in out.glob("*%.json")) == ["mlp-25%.json", "mlp-50%.json"]
