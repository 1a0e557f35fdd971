"""What healing makes of a real model: a quarter of the MLP of SmolLM2 removed and refitted, then trained.

`make bench-recover` runs it: perplexity on WikiText-2's test split, on Python's documentation and on texts that nothing
is healed with, of the dense model, of the pruned one, and of what `llmprune recover` makes of it with ever more tokens:
on WikiText-2, on the default text with the usual loss, by the teacher's predictions alone and by as much of the text,
on text that the dense model writes itself, with a streamed teacher, and by `--mode blocks`. Beside it stand a plain
transformers loop and trl's GKDTrainer, both with the teacher in memory, on as many tokens of the same text in batches
of the same size. trl is left out where it is not installed. Models that are pruned to a share of the parameters follow,
calibrated and healed on the default text. Finished rows are kept in `bench-recover-output/`. Exit status 1
means that a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import make_whole
from tools.bench.judged_texts import write_judged_texts
from tools.bench.prune_1b import Bound, print_bounds, print_table, say

OUTPUT = Path("bench-recover-output")
WINDOW, WINDOWS = 512, 12  # that perplexity is measured on
BATCH, LENGTH = 1024, 256  # tokens of a step and of a window
TOKENS = (65536, 262144, 1048576, 4194304)
OURS = (
    *("recovered", "on the default text", "the same, kl", "the same, kl+ce"),
    *("on its own text", "streamed", "by blocks"),
)
OTHERS = ("plain loop", "trl")
KINDS = (*OURS, *OTHERS)
RECOVERED, BY_DEFAULT, BY_TEACHER, BY_BOTH, BY_ITSELF, STREAMED, BY_BLOCKS, PLAIN, TRL = KINDS
QUARTER = "3/4 of the MLP"
SHARES = ("85%", "70%", "50%")  # of the parameters, that models are pruned to beside that
ON_WIKITEXT2 = ("--text", "wikitext2")
AS_OTHERS = (*ON_WIKITEXT2, "--loss", "kl")  # which the plain loop and trl learn
OPTIONS = {
    RECOVERED: (*AS_OTHERS, "--teacher-mode", "resident", "--batch-tokens", str(BATCH)),
    BY_DEFAULT: ("--teacher-mode", "resident", "--batch-tokens", str(BATCH)),
    BY_TEACHER: ("--loss", "kl", "--teacher-mode", "resident", "--batch-tokens", str(BATCH)),
    BY_BOTH: ("--loss", "kl+ce", "--teacher-mode", "resident", "--batch-tokens", str(BATCH)),
    BY_ITSELF: ("--text", "self", "--teacher-mode", "resident", "--batch-tokens", str(BATCH)),
    STREAMED: (*AS_OTHERS, "--teacher-mode", "streamed", "--batch-tokens", str(BATCH)),
    BY_BLOCKS: (*ON_WIKITEXT2, "--mode", "blocks"),
}
Worth = dict[str, dict[str, float]]  # figures by text
MOST_AT_A_MILLION = {  # times the dense model, healed on so many tokens of the default text
    QUARTER: {"WikiText-2": 1.20, "documentation": 1.55},
    "70%": {"WikiText-2": 1.6, "documentation": 2.5},
}
MAX_STREAMED_MEMORY = 0.6  # of what trl, or else the plain loop, takes


def llmprune(*arguments: str | Path) -> dict[str, Any]:
    """What a command printed as JSON."""
    command = [sys.executable, "-m", "llmprune_cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"llmprune {arguments[0]} ended with status {done.returncode}.")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def worth(folder: Path, dense: Path, windows: int) -> Worth:
    """Perplexity, bits per byte and KL divergence of a model from the dense one, by text."""
    dtype = str(fast_dtype()).removeprefix("torch.")
    options = ("--max-seq-len", str(WINDOW), "--limit", str(windows), "--dtype", dtype)
    found = {}
    for name, text in write_judged_texts(OUTPUT, dense).items():
        row = llmprune("eval", dense, folder, "--dataset", text, *options)["results"][1]
        found[name] = {key: row[key] for key in ("perplexity", "bits_per_byte", "kl")}
    return found


def fast_dtype() -> Any:
    """The dtype in which this machine multiplies what is stored in bfloat16."""
    import torch

    from llmprune_cli.run.precision import native_dtype

    return native_dtype(torch.bfloat16, torch.device("cpu"))


def windows_in_order(dense: Path, tokens: int) -> Any:
    """So many tokens as windows [N, T] in the order in which they are learned from."""
    import torch
    from transformers import AutoTokenizer

    from llmprune_cli.text.corpus import load_corpus

    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer(load_corpus("wikitext2", "validation").text, return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    count = tokens // BATCH * (BATCH // LENGTH)
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(len(windows), generator=generator) for _ in range(-(-count // len(windows)))]
    return windows[torch.cat(rounds)[:count]]


def usual_rate(pruned: Path, tokens: int) -> float:
    """What llmprune takes for the pruned model."""
    from llmprune_cli.heal.options import usual_learning_rate
    from llmprune_cli.options import ModelReference
    from llmprune_cli.source.opening import open_checkpoint

    with open_checkpoint(ModelReference(str(pruned)), need_weights=True) as checkpoint:
        return usual_learning_rate(checkpoint.parameter_count, tokens // BATCH)


def plain_loop(dense: Path, pruned: Path, output: Path, windows: Any, rate: float) -> None:
    """What one writes in thirty lines: both models in memory, whole logits, AdamW, one cycle."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = fast_dtype()
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    student = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    batches = windows.split(BATCH // LENGTH)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches), pct_start=0.1)
    for batch in batches:
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
    AutoTokenizer.from_pretrained(dense).save_pretrained(output)


def has_trl(python: Path | None) -> bool:
    """Whether an interpreter can import trl's trainer; if not, that is said."""
    if python is None:
        say(f"Left out: {TRL}, which --trl PYTHON names an environment of.")
        return False
    tried = subprocess.run([python, "-c", "import trl.experimental.gkd"], capture_output=True, text=True)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or ["it cannot be run"])[-1]
        say(f"Left out: {TRL}, which is not installed in {python.parents[1]} ({reason}).")
    return not tried.returncode


def training_command(kind: str, models: tuple[Path, Path], folder: Path, tokens: int, trl: Path | None) -> list[str]:
    """What trains a model; what the rows of other programs need is written beside its folder.

    Args:
        models: the dense one and the pruned one.
    """
    from safetensors.torch import save_file

    dense, pruned = models
    if kind in OPTIONS:
        own = [sys.executable, "-m", "llmprune_cli", "recover", str(pruned), "--teacher", str(dense)]
        own += ["--tokens", str(tokens), "--seq-len", str(LENGTH), *OPTIONS[kind]]
        return [*own, "--output", str(folder), "--overwrite"]
    if kind == PLAIN:
        return [sys.executable, __file__, "--plain", str(dense), str(pruned), str(folder), str(tokens)]
    text = folder.with_name(f"{folder.name}.safetensors")
    save_file({"windows": windows_in_order(dense, tokens)}, text)
    dtype, rate = str(fast_dtype()).removeprefix("torch."), usual_rate(pruned, tokens)
    script = Path(__file__).with_name("trl_loop.py")
    return [*map(str, (trl, script, dense, pruned, folder, text, dtype, rate, BATCH))]


def make(
    kind: str, models: tuple[Path, Path], tokens: int, windows: int, trl: Path | None, share: str = QUARTER
) -> dict[str, Any]:
    """A healed model and what it cost, kept for the next time."""
    name = kind if share == QUARTER else f"{share} {kind}"
    folder = OUTPUT / f"{name.replace(',', '').replace(' ', '-')}-{tokens}"
    record = folder.with_name(f"{folder.name}.json")
    kept = json.loads(record.read_text()) if record.exists() else {}
    options = [*OPTIONS.get(kind, ())]
    texts = write_judged_texts(OUTPUT, models[0]).keys()
    if texts == kept.get("worth", {}).keys() and options == kept.get("options"):
        return dict(kept)
    command = training_command(kind, models, folder, tokens, trl)
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{kind} with {tokens:,} tokens ended with status {status}.")
    cpu_seconds = used.ru_utime + used.ru_stime
    cost = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds, "peak_kib": used.ru_maxrss}
    row = {**cost, "options": options, "worth": worth(folder, models[0], windows)}
    record.write_text(json.dumps(row))
    return row


def bounds_of(
    share: str, tokens: int, made: dict[str, dict[str, Any]], whole: Worth, cut: Worth
) -> Iterator[tuple[str, float, float]]:
    """What must hold of the models that were healed on so many tokens: of what, the figure, and its limit.

    Args:
        share: what the pruned one has.
        whole, cut: of the dense model and of the pruned one.
    """
    values = {kind: {text: own["perplexity"] for text, own in row["worth"].items()} for kind, row in made.items()}
    others = [kind for kind in OTHERS if kind in made]
    for text in whole:
        own = {kind: perplexities[text] for kind, perplexities in values.items()}
        for kind in (kind for kind in OURS if kind in own):
            yield f"{text}: {kind}, against pruned", own[kind] / cut[text]["perplexity"], 1.0
        if RECOVERED in own:
            for kind in others:
                yield f"{text}: recovered, against {kind}", own[RECOVERED] / own[kind], 1.01
            for kind, most in ((STREAMED, 1.01), (BY_BLOCKS, 1.05)):
                if kind in own:
                    yield f"{text}: {kind}, against recovered", own[kind] / own[RECOVERED], most
        most_of_dense = MOST_AT_A_MILLION.get(share, {}).get(text)
        if tokens >= 2**20 and BY_DEFAULT in own and most_of_dense:
            yield f"{text}: by default, against dense", own[BY_DEFAULT] / whole[text]["perplexity"], most_of_dense
    for kind in others:
        if RECOVERED in made:
            yield f"CPU seconds against {kind}", made[RECOVERED]["cpu_seconds"] / made[kind]["cpu_seconds"], 1.0
        if STREAMED in made:
            memory = made[STREAMED]["peak_kib"] / made[kind]["peak_kib"]
            yield f"memory, streamed, against {kind}", memory, MAX_STREAMED_MEMORY


def pruned_to(share: str, dense: Path) -> Path:
    """The folder of a pruned model, made once: a quarter of the MLP by WikiText-2, or a share by the default text."""
    folder = OUTPUT / ("pruned" if share == QUARTER else f"pruned-{share}")
    quarter = ("--intermediate-pruning-ratio", "0.25", "--calibration", "wikitext2")
    if not folder.exists():
        llmprune("prune", dense, *(quarter if share == QUARTER else ("--target-params", share)), "--output", folder)
    return folder


def main() -> int:
    """Measure, print and judge."""
    asked = arguments().parse_args()
    if asked.plain:
        dense, pruned, output = map(Path, asked.plain[:3])
        tokens = int(asked.plain[3])
        plain_loop(dense, pruned, output, windows_in_order(dense, tokens), usual_rate(pruned, tokens))
        return 0
    started = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    dense = asked.model or OUTPUT / "dense"
    if not dense.exists():
        make_whole(dense)
    kinds = [kind for kind in asked.rows if kind != TRL or has_trl(asked.trl)]
    folders = {QUARTER: asked.pruned or pruned_to(QUARTER, dense)}
    folders |= {share: pruned_to(share, dense) for share in asked.shares}
    whole = worth(dense, dense, asked.windows)
    cut = {share: worth(folder, dense, asked.windows) for share, folder in folders.items()}
    rows = [["dense", "", *_cells(whole), "", "", ""]]
    rows += [[f"{share}: pruned", "0", *_cells(own), "", "", ""] for share, own in cut.items()]
    bounds: list[Bound] = []
    for tokens in asked.tokens:
        for share, folder in folders.items():
            if time.perf_counter() - started > 60 * asked.minutes:
                say(f"Left out for lack of time: {tokens:,} tokens, {share}.")
                continue
            own = kinds if share == QUARTER else [BY_DEFAULT]
            made = {kind: make(kind, (dense, folder), tokens, asked.windows, asked.trl, share) for kind in own}
            for kind, row in made.items():
                cost = [f"{row['seconds']:.0f} s", f"{row['cpu_seconds']:.0f} s", f"{row['peak_kib'] / 2**20:.2f} GiB"]
                rows.append([f"{share}: {kind}", f"{tokens:,}", *_cells(row["worth"]), *cost])
            found = bounds_of(share, tokens, made, whole, cut[share])
            bounds += [Bound(f"{share}, {tokens:,} tokens: {what}", figure, most) for what, figure, most in found]
    heads = ["model", "tokens", *whole, "wall", "CPU", "peak memory"]
    print_table("Perplexity, bits per byte, KL in nats", heads, rows)
    print_bounds(bounds)
    return int(not all(bound.holds for bound in bounds))


def arguments() -> argparse.ArgumentParser:
    """What the command can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further row is begun")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="that are trained on, of each row")
    parser.add_argument(
        "--rows", nargs="*", default=KINDS, choices=KINDS, help="of the model that lacks a quarter of its MLP"
    )
    parser.add_argument("--shares", nargs="*", default=SHARES, help="of the parameters, that models are pruned to")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 512 tokens that perplexity is measured on")
    parser.add_argument("--model", type=Path, help="the dense model (default: SmolLM2 from its wheel)")
    parser.add_argument("--pruned", type=Path, help="the pruned one (default: a quarter of its MLP removed)")
    parser.add_argument("--trl", type=Path, help="the python of an environment with trl in it")
    parser.add_argument("--plain", nargs=4, help=argparse.SUPPRESS)
    return parser


def _cells(worth: Worth) -> list[str]:
    return [f"{own['perplexity']:.2f} {own['bits_per_byte']:.3f} {own['kl']:.3f}" for own in worth.values()]


if __name__ == "__main__":
    sys.exit(main())
