"""What healing makes of a real model: a quarter of the MLP of SmolLM2 removed and refitted, then trained.

`make bench-recover` runs it: perplexity on WikiText-2's test split and on Python's documentation of the dense model, of
the pruned one, and of what `llmprune recover` makes of it with ever more tokens, as a whole and with `--mode blocks`,
beside a plain transformers loop with the teacher in memory on the same tokens. Finished rows are kept in
`bench-recover-output/`. Exit status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import make_whole
from tools.bench.prune_1b import Bound, print_bounds, print_table, say

OUTPUT = Path("bench-recover-output")
TEXTS = {"WikiText-2": "wikitext2", "Python's documentation": "python-docs"}
WINDOW, WINDOWS = 512, 12  # that perplexity is measured on
BATCH, LENGTH = 1024, 256  # tokens of a step and of a window of the plain loop
TOKENS = (65536, 262144, 1048576)
KINDS = ("recovered", "by blocks", "plain loop")


def llmprune(*arguments: str | Path) -> dict[str, Any]:
    """What a command printed as JSON."""
    command = [sys.executable, "-m", "llmprune_cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"llmprune {arguments[0]} ended with status {done.returncode}.")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def perplexities(folder: Path, windows: int) -> list[float]:
    """Of a model, on all texts, in the dtype that is fast here."""
    dtype = str(fast_dtype()).removeprefix("torch.")
    options = ("--max-seq-len", str(WINDOW), "--limit", str(windows), "--dtype", dtype)
    runs = [llmprune("eval", folder, "--dataset", text, *options) for text in TEXTS.values()]
    return [run["results"][0]["perplexity"] for run in runs]


def fast_dtype() -> Any:
    """The dtype in which this machine multiplies what is stored in bfloat16."""
    import torch

    from llmprune_cli.run.layer import native_dtype

    return native_dtype(torch.bfloat16, torch.device("cpu"))


def plain_loop(dense: Path, pruned: Path, output: Path, tokens: int) -> None:
    """What one writes in thirty lines: both models in memory, whole logits, AdamW, one cycle."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmprune_cli.heal.training.learning_rate import usual_learning_rate
    from llmprune_cli.run.corpus import load_corpus

    torch.manual_seed(0)
    dtype = fast_dtype()
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    student = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer(load_corpus("wikitext2", "validation").text, return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    each, steps = BATCH // LENGTH, tokens // BATCH
    order = torch.cat([torch.randperm(len(windows)) for _ in range(steps * each // len(windows) + 1)])
    rate = usual_learning_rate(student.num_parameters(), steps)  # as llmprune's
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = windows[order[step * each : (step + 1) * each]]
        with torch.no_grad():
            wanted = teacher(batch).logits.float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = student(batch).logits
        logs = logits.float().log_softmax(-1)
        loss = functional.kl_div(logs.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    student.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def make(kind: str, dense: Path, pruned: Path, tokens: int, windows: int) -> dict[str, Any]:
    """A healed model and what it cost, kept for the next time."""
    folder = OUTPUT / f"{kind.replace(' ', '-')}-{tokens}"
    record = folder.with_suffix(".json")
    if record.exists():
        return dict(json.loads(record.read_text()))
    started = time.perf_counter()
    own = [sys.executable, __file__, "--plain", str(dense), str(pruned), str(folder), str(tokens)]
    if kind != "plain loop":
        own = [sys.executable, "-m", "llmprune_cli", "recover", str(pruned), "--teacher", str(dense)]
        own += ["--tokens", str(tokens), "--seq-len", str(LENGTH)]
        own += ["--output", str(folder), "--overwrite", "--text", "wikitext2"]
        own += ["--mode", "blocks"] if kind == "by blocks" else ["--batch-tokens", str(BATCH)]
    process = subprocess.Popen(own)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{kind} with {tokens:,} tokens ended with status {status}.")
    cost = {"seconds": time.perf_counter() - started, "cpu_seconds": used.ru_utime, "peak_kib": used.ru_maxrss}
    row = {**cost, "perplexities": perplexities(folder, windows)}
    record.write_text(json.dumps(row))
    return row


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further row is begun")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="that are trained on, of each row")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 512 tokens that perplexity is measured on")
    parser.add_argument("--model", type=Path, help="the dense model (default: SmolLM2 from its wheel)")
    parser.add_argument("--pruned", type=Path, help="the pruned one (default: a quarter of its MLP removed)")
    parser.add_argument("--plain", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plain:
        dense, pruned, output = map(Path, asked.plain[:3])
        plain_loop(dense, pruned, output, int(asked.plain[3]))
        return 0
    started = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    dense, pruned = asked.model or OUTPUT / "dense", asked.pruned or OUTPUT / "pruned"
    if not dense.exists():
        make_whole(dense)
    if not pruned.exists():
        llmprune("prune", dense, "--intermediate-pruning-ratio", "0.25", "--output", pruned)
    whole, cut = (perplexities(folder, asked.windows) for folder in (dense, pruned))
    rows = [["dense", "", *map(_two, whole), "", "", ""], ["pruned", "0", *map(_two, cut), "", "", ""]]
    bounds = []
    for tokens in asked.tokens:
        if time.perf_counter() - started > 60 * asked.minutes:
            say(f"Left out for lack of time: {tokens:,} tokens.")
            continue
        made = {kind: make(kind, dense, pruned, tokens, asked.windows) for kind in KINDS}
        for kind, row in made.items():
            cost = [f"{row['seconds']:.0f} s", f"{row['cpu_seconds']:.0f} s", f"{row['peak_kib'] / 2**20:.2f} GiB"]
            rows.append([kind, f"{tokens:,}", *map(_two, row["perplexities"]), *cost])
        ours, blocks, theirs = (made[kind]["perplexities"] for kind in KINDS)
        for place, text in enumerate(TEXTS):
            name = f"{tokens:,} tokens, {text}"
            bounds.append(Bound(f"{name}: against pruned", ours[place] / cut[place], 1.0))
            bounds.append(Bound(f"{name}: against the plain loop", ours[place] / theirs[place], 1.01))
            bounds.append(Bound(f"{name}: blocks against pruned", blocks[place] / cut[place], 1.0))
            bounds.append(Bound(f"{name}: blocks against the whole", blocks[place] / ours[place], 1.05))
    print_table("Perplexity", ["model", "tokens", *TEXTS, "wall", "CPU", "peak memory"], rows)
    print_bounds(bounds)
    return int(not all(bound.holds for bound in bounds))


def _two(value: float) -> str:
    return f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
