"""Peak memory of `recover --mode blocks` on two layers of an 8B Llama with its embeddings.

`make bench-memory` runs it. A quarter of the neurons goes by magnitude, and the rest is trained on a few tokens. Exit
status 1 means that the bound was missed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.calibrated_memory import SLICE_8B, make_model, row
from tools.bench.prune_1b import Bound, measure, print_bounds, print_table, say

LLMPRUNE = (sys.executable, "-m", "llmprune_cli")
LAYERS, VOCABULARY = 2, 128256
TOKENS, WINDOW = 1024, 128
MAX_ANONYMOUS_BYTES = 8 * 10**9


def main() -> int:
    """Measure, print and judge."""
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        text = work / "text.txt"
        text.write_text("".join(f"{number} times {number + 7} is {number * (number + 7)}.\n" for number in range(200)))
        say("Pruning two layers of an 8B Llama …")
        dense, pruned = make_model(work / "dense", SLICE_8B, LAYERS, VOCABULARY), work / "pruned"
        by_magnitude = ("--importance", "magnitude", "--refit", "none", "--intermediate-pruning-ratio", "0.25")
        subprocess.run([*LLMPRUNE, "prune", dense, *by_magnitude, "--output", pruned], check=True, capture_output=True)
        say("Healing it layer by layer …")
        options = ("--tokens", str(TOKENS), "--seq-len", str(WINDOW), "--text", str(text))
        taken = measure(
            [*LLMPRUNE, "recover", str(pruned), "--mode", "blocks", *options, "--output", str(work / "out")]
        )
    print_table(
        f"Healing by blocks on {TOKENS:,} tokens",
        ["", "wall s", "CPU s", "peak anonymous MB"],
        [row(f"two layers of 8B, vocabulary {VOCABULARY:,}", taken)],
    )
    bound = Bound("peak anonymous memory, GB", taken.peak_bytes / 1e9, MAX_ANONYMOUS_BYTES / 1e9)
    print_bounds([bound])
    return int(not bound.holds)


if __name__ == "__main__":
    sys.exit(main())
