"""What a calibrated prune costs, in forward passes of plain transformers over the same text.

`make bench-calibrated` prints in one run: (a) that forward pass in the checkpoint's dtype, (b) optipfair's data-driven
choice of the same share of neurons, (c) another build of llmprune, which the command checks out, (d) this build: time,
peak memory, and what the result is worth. Exit status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.judged_texts import write_documentation
from tools.bench.prune_1b import Bound, Measurement, measure, print_bounds, print_table, say
from tools.bench.quality import prepare
from tools.bench.quality_runs import Bench
from tools.bench.quality_runs import measure as measure_worth

ROOT = Path(__file__).parents[3]
BASE = "f00d1a8"  # the build that took some 24 forward passes
WINDOW = 512  # the default of --calibration-seq-len
NEURONS = 1152  # three quarters of SmolLM2's
QUARTER = ("--intermediate-pruning-ratio", "0.25")
CHEAP = (*QUARTER, "--importance", "range", "--refit", "residual")
TARGET = ("--target-params", "85%")
MAX_SHARE = 1 / 3  # of the wall time of the other build
MAX_PASSES, MAX_CHEAP_PASSES = 8, 4  # forward passes of plain transformers over the same tokens
MAX_SEARCH = 2  # times the calibrated prune
MAX_PERPLEXITY = 1.01  # times what the other build's result has
PASS = str(Path(__file__).with_name("forward_pass.py"))
OPTIPFAIR = str(Path(__file__).with_name("optipfair_choice.py"))


@dataclass(frozen=True)
class Run:
    """One way to use the text, what it took, and what came out."""

    name: str
    taken: Measurement
    worth: dict[str, float]  # perplexity by corpus; empty where nothing was written


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A checkout of another build."""
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as scratch:
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--detach", f"{scratch}/build", revision], check=True, capture_output=True)
        try:
            yield Path(scratch, "build")
        finally:
            subprocess.run([*git, "remove", "--force", f"{scratch}/build"], check=True)


def prune(name: str, build: Path, bench: Bench, options: tuple[str, ...], tokens: int, corpus: str) -> Run:
    """Prune with a build, and judge what it writes."""
    output = bench.work / "calibrated-output"
    shutil.rmtree(output, ignore_errors=True)
    text = ("--calibration", corpus, "--calibration-tokens", str(tokens), "--calibration-seq-len", str(WINDOW))
    command = [sys.executable, "-m", "llmprune_cli", "prune", str(bench.model)]
    say(f"{name}, {tokens:,} tokens …")
    taken = measure([*command, *options, *text, "--output", str(output)], build)
    run = Run(name, taken, measure_worth(output, bench.texts)[1])
    shutil.rmtree(output)
    return run


def program(name: str, path: str, bench: Bench, *arguments: str) -> Run:
    """Run one of the programs beside this file."""
    say(f"{name} …")
    return Run(name, measure(["env", f"PYTHONPATH={ROOT}", sys.executable, path, str(bench.model), *arguments]), {})


def forward_pass(bench: Bench, tokens: int, corpus: str) -> Run:
    """Plain transformers reads the text: the time with all windows less that with one."""
    whole, one = (
        program(f"(a) plain forward pass, {part:,} tokens", PASS, bench, corpus, str(tokens), str(WINDOW), str(part))
        for part in (tokens, WINDOW)
    )
    share = tokens / (tokens - WINDOW)
    wall = share * (whole.taken.wall_seconds - one.taken.wall_seconds)
    cpu = share * (whole.taken.cpu_seconds - one.taken.cpu_seconds)
    return Run("(a) plain forward pass", Measurement(wall, cpu, whole.taken.peak_bytes), {})


def row(run: Run, passes: float) -> list[str]:
    """One line of the table."""
    worth = " / ".join(f"{perplexity:.2f}" for perplexity in run.worth.values()) or "–"
    taken = run.taken
    figures = [f"{taken.wall_seconds:.1f}", f"{taken.wall_seconds / passes:.1f}", f"{taken.cpu_seconds:.1f}"]
    return [run.name, *figures, f"{taken.peak_bytes / 1e6:,.0f}", worth]


def compare(bench: Bench, base: Path, tokens: int, corpus: str, with_target: bool) -> list[Bound]:
    """All ways on so many tokens of a corpus: a table, and the bounds."""
    plain = forward_pass(bench, tokens, corpus)
    other = prune("(c) the other build", base, bench, QUARTER, tokens, corpus)
    own = prune("(d) this build", ROOT, bench, QUARTER, tokens, corpus)
    cheap = prune("(d) this build, range", ROOT, bench, CHEAP, tokens, corpus)
    runs = [plain, other, own, cheap]
    output = bench.work / "optipfair-output"
    choice = (str(output), str(NEURONS), corpus, str(tokens), str(WINDOW))
    try:
        taken = program("(b) optipfair, data-driven", OPTIPFAIR, bench, *choice).taken
        runs.insert(1, Run("(b) optipfair, data-driven", taken, measure_worth(output, bench.texts)[1]))
    except RuntimeError as error:
        say(str(error).strip().splitlines()[-1])
    shutil.rmtree(output, ignore_errors=True)
    wall = own.taken.wall_seconds
    label, passes = f"{tokens:,} tokens", plain.taken.wall_seconds
    bounds = [
        Bound(f"{label}: wall time, share of (c)", wall / other.taken.wall_seconds, MAX_SHARE),
        Bound(f"{label}: range, in passes of (a)", cheap.taken.wall_seconds / passes, MAX_CHEAP_PASSES),
        Bound(f"{label}: peak memory, share of (c)", own.taken.peak_bytes / other.taken.peak_bytes, 1.0),
    ]
    if tokens > 16384:
        bounds.append(Bound(f"{label}: in passes of (a)", wall / passes, MAX_PASSES))
    bounds += [
        Bound(f"{label}: perplexity on {name}, share of (c)", own.worth[name] / other.worth[name], MAX_PERPLEXITY)
        for name in own.worth
    ]
    if with_target:
        found = prune("(d) this build, --target-params 85%", ROOT, bench, TARGET, tokens, corpus)
        runs.append(found)
        bounds.append(Bound(f"{label}: a target, share of (d)", found.taken.wall_seconds / wall, MAX_SEARCH))
    header = ["", "wall s", "passes of (a)", "CPU s", "peak MB", f"perplexity {' / '.join(bench.texts)}"]
    print_table(f"A quarter of SmolLM2's MLP, {label}", header, [row(run, passes) for run in runs])
    return bounds


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE, help="revision of (c)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="calibration tokens")
    parser.add_argument("--calibration", help="calibration text (default: Python's documentation, in a file)")
    parser.add_argument("--no-target", action="store_true", help="leave the search for a target size out")
    parser.add_argument("--work", type=Path, default=Path("bench-quality-output"), help="keeps the model")
    asked = parser.parse_args()
    bench, bounds = prepare(asked.work.resolve()), []
    text = asked.calibration or str(write_documentation(bench.work / "documentation.txt"))
    with checked_out(asked.base) as base:
        for tokens in asked.tokens:
            with_target = tokens == asked.tokens[0] and not asked.no_target
            bounds += compare(bench, base, tokens, text, with_target)
    print_bounds(bounds)
    return int(not all(bound.holds for bound in bounds))


if __name__ == "__main__":
    sys.exit(main())
