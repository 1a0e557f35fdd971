"""`llmprune prune` beside torch-pruning's own pruner on a random 1.33B Llama, in one run.

`make bench` runs it. Exit status 1 means that a bound was missed, or that the two outputs differ. Nothing is dropped
from the page cache: both sides read files that were just written. What the bytes themselves cost is therefore told in
CPU seconds, which no disk and no cache makes fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PRUNING_RATIO = 0.5
SHARD_BYTES = 10**9
NEEDED_BYTES = 9 * 10**9  # input 2.7 GB, two outputs of 0.8 GB, one copy, two deep models, and room
SAMPLE_SECONDS = 0.03
MODEL_1B = {"hidden": 2048, "layers": 22, "heads": 32, "intermediate": 5632, "vocabulary": 49152}
MODEL_TINY = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 176, "vocabulary": 256}
MODEL_DEEP = {"hidden": 256, "heads": 4, "intermediate": 704, "vocabulary": 1024}
# What no pruning of a folder does without: its bytes are read for the scores and for the cut, and what is left is
# written and read back, with a checksum both times.
BARE = """
import hashlib, os, sys
from pathlib import Path
source, output, copy = map(Path, sys.argv[1:])
buffer = memoryview(bytearray(2**24))
for path in 2 * sorted(source.glob("*.safetensors")):
    with path.open("rb") as file:
        while file.readinto(buffer):
            pass
for path in sorted(output.glob("*.safetensors")):
    with path.open("rb") as file, copy.open("wb") as written:
        checksum = hashlib.sha256()
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            written.write(buffer[:count])
        os.fsync(written.fileno())
    with copy.open("rb") as file:
        hashlib.file_digest(file, "sha256")
copy.unlink()
"""
DEPTHS = (32, 288, 544)  # equal steps: time quadratic in the layers would make the second step 2.6 times the first

MAX_WALL_SHARE = 1 / 5  # of the example's wall time, without our imports and twin proof
MAX_ANONYMOUS_BYTES = 10**9
MAX_STREAMING_FACTOR = 2  # times the CPU seconds of `BARE`
MAX_DEPTH_FACTOR = 1.5  # time per tensor added by the second step in depth over that added by the first


@dataclass(frozen=True)
class Measurement:
    """What one child process took."""

    wall_seconds: float
    cpu_seconds: float  # user and system
    peak_bytes: int  # anonymous memory where Linux tells, else resident memory


@dataclass(frozen=True)
class Bound:
    """One figure held against its limit."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the figure is within its limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Side:
    """One of the two ways to prune: what it took and what it left."""

    measured: Measurement
    parameters: int


# --- the random checkpoints ----------------------------------------------------------------------------------------


def tensor_shapes(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an untied Llama with as many KV heads as query heads, in the model's order."""
    hidden, intermediate = sizes["hidden"], sizes["intermediate"]
    yield "model.embed_tokens.weight", (sizes["vocabulary"], hidden)
    for layer in range(sizes["layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}self_attn.{name}.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{prefix}mlp.up_proj.weight", (intermediate, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, intermediate)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (sizes["vocabulary"], hidden)


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> Path:
    """Write a random bf16 checkpoint in shards of about 1 GB, holding one shard in memory at a time."""
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        intermediate_size=sizes["intermediate"],
        vocab_size=sizes["vocabulary"],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensor_shapes(sizes):
        size_bytes = 2 * torch.Size(shape).numel()
        if filled + size_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size_bytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_shard(folder / file_name, shard, generator)
        weight_map.update({name: file_name for name, _ in shard})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> None:
    """Write one shard: normal weights of standard deviation 0.02, norm weights of 1."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, shape in shard:
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        tensors[name] = tensor if len(shape) == 1 else tensor.normal_(0, 0.02, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


# --- torch-pruning as the reference example uses it ----------------------------------------------------------------


def prune_as_the_example_does(folder: str, output: str) -> None:
    """The reference example's set-up of torch-pruning's own pruner, with the cache off; runs in a child process."""
    import torch
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.use_cache = False
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    num_heads: dict[Any, int] = {}
    for attention in attentions:
        num_heads[attention.q_proj] = model.config.num_attention_heads
        num_heads[attention.k_proj] = model.config.num_key_value_heads
        num_heads[attention.v_proj] = model.config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.arange(1, 5).unsqueeze(0),
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=[model.lm_head],
        num_heads=num_heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=PRUNING_RATIO,
        output_transform=lambda result: result.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    grouped = model.config.num_attention_heads != model.config.num_key_value_heads
    for attention in attentions:
        attention.num_heads = attention.q_proj.out_features // attention.head_dim
        model.config.num_attention_heads = attention.num_heads
        if not grouped:
            attention.num_key_value_heads = attention.num_heads
            model.config.num_key_value_heads = attention.num_heads
        attention.num_key_value_groups = attention.num_heads // model.config.num_key_value_heads
    model.config.hidden_size = model.lm_head.in_features
    model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    model.save_pretrained(output)


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(command: list[str], folder: Path | None = None) -> Measurement:
    """Run a child process to its end and say what it took.

    Args:
        folder: to run it in; Python imports from there first.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder)
        peak, ended = [0], threading.Event()
        sampler = threading.Thread(target=sample_anonymous, args=(child.pid, peak, ended))
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall_seconds = time.perf_counter() - started
        ended.set()
        sampler.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            printed = log.read()[-4000:].decode(errors="replace")
            raise RuntimeError(f"{command} ended with status {child.returncode}:\n{printed}")
    return Measurement(wall_seconds, usage.ru_utime + usage.ru_stime, peak[0] or resident_peak(usage))


def sample_anonymous(pid: int, peak: list[int], ended: threading.Event) -> None:
    """Keep the highest RssAnon of a process in `peak[0]`, bytes, until it ends; leave it alone outside Linux."""
    status = Path(f"/proc/{pid}/status")
    while not ended.wait(SAMPLE_SECONDS):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], 1024 * int(line.split()[1]))


def resident_peak(usage: resource.struct_rusage) -> int:
    """Peak resident memory of an ended child, bytes: macOS counts in bytes, others in KiB."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def llmprune_command(folder: Path, output: Path) -> list[str]:
    """What a user types to prune a folder, with the interpreter that runs this."""
    by_magnitude = ["--importance", "magnitude", "--refit", "none"]
    prune = [sys.executable, "-m", "llmprune_cli", "prune", str(folder), *by_magnitude]
    return [*prune, "--pruning-ratio", str(PRUNING_RATIO), "--output", str(output), "--overwrite"]


def measure_repeatedly(command: list[str], repeats: int) -> Measurement:
    """Run a child process a few times: medians of the times, the highest of the peaks."""
    runs = []
    for _ in range(repeats):
        os.sync()  # so that no run waits for what another has written
        runs.append(measure(command))
    return Measurement(
        statistics.median(run.wall_seconds for run in runs),
        statistics.median(run.cpu_seconds for run in runs),
        max(run.peak_bytes for run in runs),
    )


def seconds_to_read(files: list[Path], repeats: int) -> float:
    """Median seconds that `cat` takes to read files."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with Path(os.devnull).open("wb") as sink:
            subprocess.run(["cat", *files], stdout=sink, check=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def seconds_to_write(files: list[Path], copy: Path, repeats: int) -> float:
    """Median seconds that `cat` and fsync take to write the bytes of files to a new one."""
    seconds = []
    for _ in range(repeats):
        os.sync()
        started = time.perf_counter()
        with copy.open("wb") as file:
            subprocess.run(["cat", *files], stdout=file, check=True)
            os.fsync(file.fileno())
        seconds.append(time.perf_counter() - started)
        copy.unlink()
    return statistics.median(seconds)


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order."""
    return sorted(folder.glob("*.safetensors"))


# --- comparing the outputs -----------------------------------------------------------------------------------------


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    from safetensors import safe_open

    files = {}
    for shard in shards_of(folder):
        with safe_open(shard, framework="pt") as handle:
            files.update(dict.fromkeys(handle.keys(), shard))
    return files


def count_parameters(folder: Path) -> int:
    """Stored parameters, from the headers."""
    from safetensors import safe_open

    total = 0
    for shard in shards_of(folder):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                size = 1
                for length in handle.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def differing_tensors(first: Path, second: Path) -> list[str]:
    """Names of tensors that one folder lacks, or that differ in dtype, shape or any bit; one pair is held at a time."""
    import torch
    from safetensors import safe_open

    ours, theirs = tensor_files(first), tensor_files(second)
    differing = sorted(ours.keys() ^ theirs.keys())
    for name in sorted(ours.keys() & theirs.keys()):
        with safe_open(ours[name], framework="pt") as one, safe_open(theirs[name], framework="pt") as other:
            left, right = one.get_tensor(name), other.get_tensor(name)
        same_kind = left.dtype == right.dtype and left.shape == right.shape
        if not same_kind or not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            differing.append(name)
    return differing


# --- the report ----------------------------------------------------------------------------------------------------


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is text and whose others are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def side_row(name: str, side: Side) -> list[str]:
    """A row for one way to prune."""
    taken = side.measured
    return [name, *seconds_of(taken), f"{taken.peak_bytes / 1e6:,.0f}", f"{side.parameters:,}"]


def seconds_of(taken: Measurement) -> list[str]:
    """Wall and CPU seconds, as a table shows them."""
    return [f"{taken.wall_seconds:.2f}", f"{taken.cpu_seconds:.2f}"]


def print_bounds(bounds: list[Bound]) -> None:
    """Print each figure beside its limit."""
    rows = [[b.name, f"{b.value:.3f}", f"≤ {b.limit:.3f}", "yes" if b.holds else "NO"] for b in bounds]
    print_table("Bounds", ["figure", "measured", "limit", "holds"], rows)


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


# --- the benchmark -------------------------------------------------------------------------------------------------


def compare_on_1b(work: Path, fixed: Measurement, repeats: int) -> tuple[list[Bound], bool]:
    """Prune the 1.33B model both ways; the bounds on ours, and whether both outputs are the same bit for bit."""
    say("Writing a random 1.33B Llama …")
    source = make_checkpoint(work / "llama-1b", MODEL_1B)
    example_output, our_output = work / "example", work / "llmprune"
    say("Pruning it with torch-pruning as the example does …")
    as_example = [sys.executable, __file__, "--as-example", str(source), str(example_output)]
    example = Side(measure_repeatedly(as_example, repeats), count_parameters(example_output))
    say("Pruning it with llmprune …")
    ours = Side(measure_repeatedly(llmprune_command(source, our_output), repeats), count_parameters(our_output))
    bare = measure_repeatedly([sys.executable, "-c", BARE, str(source), str(our_output), str(work / "copy")], repeats)
    differing = differing_tensors(our_output, example_output)
    memory = "peak anonymous MB" if sys.platform == "linux" else "peak RSS MB (no RssAnon here)"
    rows = [
        side_row(f"torch-pruning as the example uses it (median of {repeats})", example),
        side_row(f"llmprune prune (median of {repeats})", ours),
        ["  of that, imports and twin proof (tiny model)", *seconds_of(fixed), "", ""],
        ["input read twice, output written and read back, checksums", *seconds_of(bare), "", ""],
    ]
    header = ["", "wall s", "CPU s", memory, "parameters"]
    print_table(f"Random 1.33B Llama in bf16, pruning ratio {PRUNING_RATIO}", header, rows)
    print(f"Same tensors, bit for bit: {'no: ' + ', '.join(differing[:5]) if differing else 'yes'}")
    whole = ours.measured.wall_seconds / example.measured.wall_seconds
    print(f"With imports and twin proof, llmprune takes {whole:.3f} of the example's wall time.")
    streaming = ours.measured.wall_seconds - fixed.wall_seconds
    work_done = ours.measured.cpu_seconds - fixed.cpu_seconds
    return [
        Bound("(llmprune − fixed) / example, wall time", streaming / example.measured.wall_seconds, MAX_WALL_SHARE),
        Bound("peak memory of llmprune, GB", ours.measured.peak_bytes / 1e9, MAX_ANONYMOUS_BYTES / 1e9),
        Bound("(llmprune − fixed) / bare bytes, CPU time", work_done / bare.cpu_seconds, MAX_STREAMING_FACTOR),
    ], not differing


def compare_depths(work: Path, repeats: int) -> Bound:
    """What a further tensor costs in a deep model over what it costs in a shallow one, all layers alike.

    Differences between depths need no fixed cost, whose noise would drown the shallow model's few tensors.
    """
    walls, counts, rows = [], [], []
    for layers in DEPTHS:
        say(f"Pruning {layers} layers …")
        sizes = {**MODEL_DEEP, "layers": layers}
        source, output = make_checkpoint(work / f"deep-{layers}", sizes), work / f"deep-{layers}-pruned"
        walls.append(measure_repeatedly(llmprune_command(source, output), repeats).wall_seconds)
        counts.append(len(list(tensor_shapes(sizes))))
        rows.append([str(layers), str(counts[-1]), f"{walls[-1]:.2f}"])
        shutil.rmtree(source)
        shutil.rmtree(output)
    marginal = [(walls[i] - walls[i - 1]) / (counts[i] - counts[i - 1]) for i in (1, 2)]
    for row, figure in zip(rows, ["", *(f"{1e3 * seconds:.3f}" for seconds in marginal)], strict=True):
        row.append(figure)
    header = ["layers", "tensors", "wall s", "ms per tensor beyond the row above"]
    print_table("Time per tensor by depth (hidden 256)", header, rows)
    return Bound("time per further tensor, deep / shallow", marginal[1] / marginal[0], MAX_DEPTH_FACTOR)


def fixed_cost(work: Path, repeats: int) -> Measurement:
    """What `llmprune prune` takes on a tiny model: imports and twin proof, next to no bytes."""
    source = make_checkpoint(work / "tiny", MODEL_TINY)
    measure(llmprune_command(source, work / "tiny-pruned"))  # the first run pulls the libraries from disk
    return measure_repeatedly(llmprune_command(source, work / "tiny-pruned"), repeats)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (default: $TMPDIR)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median counts (default: 3)")
    parser.add_argument("--as-example", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run everything in one temporary folder, which is gone afterwards."""
    arguments = parse_arguments()
    if arguments.as_example:
        prune_as_the_example_does(*arguments.as_example)
        return
    parent = arguments.folder or Path(tempfile.gettempdir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < NEEDED_BYTES:
        sys.exit(f"{parent} has {free_bytes / 1e9:.1f} GB free of {NEEDED_BYTES / 1e9:.0f} needed. Give --folder.")
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-", dir=parent) as folder:
        work = Path(folder)
        say("Measuring the fixed cost …")
        fixed = fixed_cost(work, arguments.repeats)
        bounds, same = compare_on_1b(work, fixed, arguments.repeats)
        bounds.append(compare_depths(work, arguments.repeats))
    print_bounds(bounds)
    sys.exit(0 if same and all(bound.holds for bound in bounds) else 1)


if __name__ == "__main__":
    main()
