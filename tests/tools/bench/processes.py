"""Two processes against one on SmolLM2-135M, one thread each: perplexity, plan, refitted tensors and wall time.

`make bench-processes` runs it. Both read the English of Python's documentation, which is on every machine. Exit
status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import make_whole
from tools.bench.prune_1b import Bound, print_bounds, print_table, say

ONE = (sys.executable, "-m", "llmprune_cli")
TWO = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
TWO += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "llmprune_cli")
MAX_PERPLEXITY_CHANGE = 1e-6  # relative
MAX_TENSOR_CHANGE = 1e-5  # of a tensor, relative to its norm


def timed(launcher: tuple[str, ...], *arguments: str) -> tuple[dict[str, Any], float]:
    """What a command printed, and its wall time in seconds, imports included."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments, "--json"], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with status {done.returncode}.")
    document: dict[str, Any] = json.loads(done.stdout)
    return document, time.perf_counter() - started


def largest_change(one: Path, two: Path) -> float:
    """Of all tensors, relative to their norms."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return float("inf")
    pairs = [(first[name].double(), second[name].double()) for name in first]
    return max(float((b - a).norm() / a.norm()) for a, b in pairs)


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="a folder with a model in one shard (default: SmolLM2 from its wheel)"
    )
    parser.add_argument("--windows", type=int, default=12, help="that are evaluated (default: 12)")
    parser.add_argument("--tokens", type=int, default=8192, help="that are calibrated on (default: 8192)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window (default: 512)")
    asked = parser.parse_args()
    length = str(asked.seq_len)
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        model = str(asked.model or make_whole(work / "whole"))
        evaluate = ("eval", model, "--dataset", "python-docs", "--max-seq-len", length, "--limit", str(asked.windows))
        prune = ("prune", model, "--intermediate-pruning-ratio", "0.25", "--calibration", "python-docs")
        prune += ("--calibration-tokens", str(asked.tokens), "--calibration-seq-len", length)
        results, walls, plans = [], [], []
        for side, launcher in (("one", ONE), ("two", TWO)):
            say(f"Evaluating and pruning with {side} …")
            report, evaluated = timed(launcher, *evaluate)
            plan = work / f"{side}.json"
            pruned, refitted = timed(launcher, *prune, "--output", str(work / side), "--save-plan", str(plan))
            results.append((report["results"][0]["perplexity"], pruned["calibration"]["perplexity_after"]))
            walls.append((evaluated, report["results"][0]["seconds"], refitted))
            plans.append(plan.read_bytes())
        change = largest_change(work / "one", work / "two")
    labels = ("perplexity", "perplexity of the pruned model on held-out text")
    rows = [[label, *(f"{side[at]:.10f}" for side in results)] for at, label in enumerate(labels)]
    labels = ("eval, wall s", "  of that, windows", "calibrated prune, wall s")
    rows += [[label, *(f"{side[at]:.1f}" for side in walls)] for at, label in enumerate(labels)]
    print_table(f"SmolLM2-135M, {asked.tokens:,} tokens, one thread each", ["", "one process", "two"], rows)
    (one, _), (two, _) = results
    bounds = [
        Bound(f"perplexity, change / {MAX_PERPLEXITY_CHANGE:.0e}", abs(two / one - 1) / MAX_PERPLEXITY_CHANGE, 1.0),
        Bound("plans that differ", float(plans[0] != plans[1]), 0.0),
        Bound(f"largest change of a tensor / {MAX_TENSOR_CHANGE:.0e}", change / MAX_TENSOR_CHANGE, 1.0),
    ]
    print_bounds(bounds)
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
