"""A few faults of the campaign that `make faults` runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support import TESTS

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
