"""Memory that is freed serves again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from llmprune_cli.__main__ import main

def cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [torch.ones(4 * 2**20) for _ in range(6)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = cleared()
try:
    main(["--version"])
except SystemExit:
    pass
cleared()
print(before, cleared(), file=sys.stderr)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is Linux that clears what is given back")
def test_what_one_layer_frees_serves_the_next() -> None:
    """Six tensors of 16 MiB, again and again: otherwise Linux clears pages for most of them each time."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(int, done.stderr.split())
    assert after < before / 10
