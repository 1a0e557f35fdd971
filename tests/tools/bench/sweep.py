"""What a sweep over four sizes costs, in prunes to one of them.

`make bench-sweep` prunes SmolLM2 to one target and sweeps over four, both calibrated alike, and holds the CPU seconds
of the sweep against those of the prune. Exit status 1 means that the bound was missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import make_whole
from tools.bench.prune_1b import Bound, Measurement, measure, print_bounds, print_table, say, seconds_of

TARGETS = ("90%", "80%", "70%", "60%")
RATIOS = ("10%", "20%", "30%", "40%")
MAX_PRUNES = 2.5  # CPU seconds of a sweep over four, in those of one prune


def run(*words: str | Path) -> Measurement:
    """What a command takes."""
    say(f"llmprune {' '.join(map(str, words))}")
    return measure([sys.executable, "-m", "llmprune_cli", *map(str, words)])


def main() -> int:
    """Print both measurements and the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of the model; by default the wheel's")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument("--mlp", action="store_true", help="neurons alone, where nothing is searched")
    asked = parser.parse_args()
    option, values, alone = ("--mlp", RATIOS, "--mlp") if asked.mlp else ("--targets", TARGETS, "--target")
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as scratch:
        work = Path(scratch)
        model = asked.model or make_whole(work / "whole")
        text = ("--calibration", "python-docs", "--calibration-tokens", str(asked.tokens))
        single = run("prune", model, alone, values[1], *text, "--output", work / "one")
        swept = run("sweep", model, option, ",".join(values), *text, "--output", work / "sizes")
    rows = [[name, *seconds_of(taken)] for name, taken in ((f"prune {values[1]}", single), ("sweep", swept))]
    print_table(f"SmolLM2, {asked.tokens:,} tokens", ["command", "seconds", "CPU seconds"], rows)
    bound = Bound("sweep, in prunes", swept.cpu_seconds / single.cpu_seconds, MAX_PRUNES)
    print_bounds([bound])
    return 0 if bound.holds else 1


if __name__ == "__main__":
    sys.exit(main())
