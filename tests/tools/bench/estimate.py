"""What prunes are said to take, beside what they take, and what larger models would take.

`make bench-estimate` runs it. SmolLM2 is pruned in three ways, each of which says beforehand what it will take. Then
dry runs of larger shapes, whose weights are holes in files and take no room on the disk, say what these would take on
this machine; what a GPU would need is arithmetic. Exit status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.tiny import save_tokenizer
from tools.bench.exports import make_whole
from tools.bench.prune_1b import Bound, measure, print_bounds, print_table, say

QUARTER = ("--mlp", "25%")
BY_MAGNITUDE = ("--importance", "magnitude", "--refit", "none")
WAYS = {
    "magnitude": BY_MAGNITUDE,
    "range, residual refit": ("--importance", "range"),
    "calibrated, default": (),
}
# Shapes of models that people prune.
SIZES: dict[str, dict[str, int]] = {
    "0.1B": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 128256
CHARACTERS = 12  # of text for each token that is fitted on: some is left to judge the result by, and not too much
INTO_A_FILE = """
import sys
sys.stdout = open(sys.argv[1], "w")
from llmprune_cli.__main__ import main
main(sys.argv[2:])
"""
MOST_TIMES = 2.0  # that time and memory may be off, either way
MOST_DISK = 1.02


@dataclass(frozen=True)
class Taken:
    """What a run was said to take, and what it took."""

    name: str
    seconds: tuple[float, float]
    memory: tuple[int, int]
    disk: tuple[int, int]


def document(*words: str | Path) -> dict[str, Any]:
    """What a command prints."""
    say(f"llmprune {' '.join(map(str, words))}")
    command = [sys.executable, "-m", "llmprune_cli", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(model: Path, name: str, tokens: int, work: Path) -> Taken:
    """What a run says when it starts, or a dry run where it is over in a moment, and what it took."""
    path = work / "text.txt"
    path.write_text("\n\n".join(topics.values())[: CHARACTERS * tokens])
    text = ("--calibration", path, "--calibration-tokens", str(tokens))
    asked = ("prune", model, *QUARTER, *WAYS[name], *(() if name == "magnitude" else text))
    out, result = work / "out", work / "result.json"
    words = [*map(str, asked), "--output", str(out), "--overwrite", "--json"]
    say(f"llmprune {' '.join(words)}")
    taken = measure([sys.executable, "-c", INTO_A_FILE, str(result), *words])
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    found = json.loads(result.read_text())
    expected = found["estimate"] or document(*asked, "--dry-run")["estimate"]
    return Taken(
        name,
        (expected["seconds"], found["seconds"]),
        (expected["memory_bytes"], taken.peak_bytes),
        (expected["disk_bytes"], written),
    )


def make_hollow(folder: Path, sizes: dict[str, int]) -> Path:
    """A Llama of some shape whose weights are holes: read as zeros, they take no room on the disk."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from llmprune_cli.folder.shards import layout_shards
    from llmprune_cli.folder.tensors import TensorEntry

    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=8192, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    entries = [TensorEntry(name, tuple(own.shape), "BF16", None) for name, own in shapes.items()]
    shards = layout_shards(entries, 5 * 10**9)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for entry in shard:
            end = offset + entry.size_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + offset)
        weight_map |= dict.fromkeys((entry.name for entry in shard), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_tokenizer(folder)
    return folder


def row_of(name: str, seconds: float | None, memory: float, vram: float, disk: float) -> list[str]:
    """One line of the table of sizes."""
    time_ = "" if seconds is None else f"{seconds / 60:,.1f}" if seconds < 6000 else f"{seconds / 3600:,.0f} h"
    return [name, time_, *(f"{size / 1e9:,.1f}" for size in (memory, vram, disk))]


def device_memory(folder: Path, way: str, tokens: int) -> tuple[float, float]:
    """Bytes in memory and on a GPU, by the sizes of what lies there."""
    from llmprune_cli.commands.prune.decision import decide, layered
    from llmprune_cli.commands.prune.estimate.job import Job
    from llmprune_cli.commands.prune.estimate.room import peak_memory
    from llmprune_cli.commands.requests import PruneRequest
    from llmprune_cli.coupling.subject import understand
    from llmprune_cli.options import Choice, Delivery, ModelReference, Text, WidthRequest
    from llmprune_cli.progress import QUIET
    from llmprune_cli.run.workbench import Workbench
    from llmprune_cli.source.opening import open_checkpoint

    importance, refit = ("magnitude", "none") if way == "magnitude" else ("consensus", "residual")
    choice = Choice(
        WidthRequest(intermediate_pruning_ratio=0.25), importance=importance, refit=refit, compute_dtype="bfloat16"
    )
    reference = ModelReference(str(folder), device="cpu")
    request = PruneRequest(reference, choice, Text(calibration_tokens=tokens), Delivery(dry_run=True))
    with open_checkpoint(reference, need_weights=False) as checkpoint:
        decided = decide(request, understand(checkpoint), QUIET)
        memory = peak_memory(
            Job(request, decided, Workbench(layered(decided.subject, request, choice), None, QUIET)), on_gpu=True
        )
    return memory.host, memory.device


def sizes(tokens: int, names: list[str], work: Path) -> list[list[str]]:
    """A row for each size and way, all of it computed from what two layers take."""
    ways, rows = ("magnitude", "calibrated, default"), []
    for name in names:
        folder = make_hollow(work / name, SIZES[name])
        for way in ways:
            text = ("--calibration-tokens", str(tokens)) if way != "magnitude" else ()
            said = document("prune", folder, *QUARTER, *WAYS[way], *text, "--dry-run")["estimate"]
            _, vram = device_memory(folder, way, tokens)
            rows.append(row_of(f"{name}, {way}", said["seconds"], said["memory_bytes"], vram, said["disk_bytes"]))
    return rows


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model; by default the wheel's")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to calibrate on")
    parser.add_argument("--computed-tokens", type=int, default=32768, help="that larger models are calibrated on")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="that are computed")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        model = asked.model or make_whole(work / "whole")
        runs = [compare(model, way, asked.tokens, work) for way in WAYS]
        rows = [
            [
                own.name,
                *(f"{value:.1f}" for value in own.seconds),
                *(f"{value / 1e6:,.0f}" for value in (*own.memory, *own.disk)),
            ]
            for own in runs
        ]
        heads = ["", "s, said", "s, taken", "MB memory, said", "taken", "MB disk, said", "written"]
        print_table(f"SmolLM2-135M, a quarter of the MLP, {asked.tokens:,} tokens", heads, rows)
        table = sizes(asked.computed_tokens, asked.sizes, work)
        heads = ["model, computed", "minutes on this CPU", "GB of memory", "GB on a GPU (computed)", "GB of disk"]
        print_table(f"By size, {asked.computed_tokens:,} tokens", heads, table)
    bounds = []
    for own in runs:
        for what, (said, was), most in (
            ("time", own.seconds, MOST_TIMES),
            ("memory", own.memory, MOST_TIMES),
            ("disk", own.disk, MOST_DISK),
        ):
            bounds.append(Bound(f"{own.name}: {what}, times off", max(said / was, was / said), most))
    print_bounds(bounds)
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
