"""Models larger than memory: an 8B Llama pruned under a limit of 2 GB, what a gigabyte costs, and planning for 405B.

`make bench-8b` runs it. Exit status 1 means that a bound was missed. Every command that is timed runs under the limit,
`cat` too, and reads its input from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.prune_1b import (
    Bound,
    Measurement,
    count_parameters,
    llmprune_command,
    measure,
    print_bounds,
    print_table,
    say,
    shards_of,
)

LIMIT_BYTES = 2 * 10**9
SHARD_BYTES = 5 * 10**9
PARAMETERS_8B = 2_337_409_024  # of Llama-3.1-8B at ratio 0.5, as torch-pruning's example prints
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
LLAMA_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256}
# Other shapes as well: 1 GB in few wide layers, 4 GB in many narrow ones.
OTHERS = {
    "1 GB": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 16384},
    "4 GB": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 31, "vocab_size": 32768},
}
TINY = {"hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 256}
REPEATS = 5  # of runs that take seconds

MAX_FACTOR = 2  # times reading the input twice, writing the output and reading it back
MAX_SPREAD = 1.25  # of the time per GB
MAX_PLANNING_SECONDS = 10
MAX_PLANNING_BYTES = 10**9

CGROUP_FILES = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))


@contextmanager
def memory_limit(size_bytes: int) -> Iterator[list[str]]:
    """What to put before a command to have the system limit its memory, page cache included; nothing where none can."""
    for root, name in CGROUP_FILES:
        group = Path(root, f"llmprune-bench-{os.getpid()}")
        try:
            group.mkdir()
            (group / name).write_text(str(size_bytes))
        except OSError:
            continue
        try:
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        finally:
            group.rmdir()
        return
    yield []


def empty_cache(files: list[Path]) -> None:
    """Have files read from the disk again."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_model(folder: Path, sizes: dict[str, int]) -> Path:
    """Write a random bf16 Llama, tensor by tensor."""
    import torch
    from transformers import LlamaConfig

    from llmprune_cli.family.skeleton import expected_index
    from llmprune_cli.folder.shards import write_shards
    from llmprune_cli.folder.tensors import TensorEntry

    folder.mkdir()
    config = save_config(folder, LlamaConfig, sizes)
    entries = [TensorEntry(name, shape, "BF16", None) for name, shape in expected_index(config).items()]
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry in entries:
            tensor = torch.ones(entry.shape, dtype=torch.bfloat16)
            yield entry, tensor if len(entry.shape) == 1 else tensor.normal_(0, 0.02, generator=generator)

    write_shards(folder, entries, tensors(), SHARD_BYTES)
    return folder


def save_config(folder: Path, kind: type, sizes: dict[str, int]):  # type: ignore[no-untyped-def]
    """Write the configuration of a Llama with heads of 128 elements and 8 KV groups."""
    heads = {"num_attention_heads": sizes["hidden_size"] // 128, "num_key_value_heads": 8, "head_dim": 128}
    config = kind(**sizes, **heads, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    return config


def seconds_to_copy(limited: list[str], files: list[Path], sink: Path = Path(os.devnull)) -> float:
    """How long `cat` takes to read files and to write them to a file, until that is on disk."""
    empty_cache(files)
    started = time.perf_counter()
    with sink.open("wb") as file:
        subprocess.run([*limited, "cat", *files], stdout=file, check=True)
        if sink.is_file():
            os.fsync(file.fileno())
    return time.perf_counter() - started


def prune(limited: list[str], source: Path, output: Path, repeats: int) -> Measurement:
    """The quickest of some runs: what disturbs them only ever adds to a time, by more than the smallest model takes."""
    runs = []
    for _ in range(repeats):
        empty_cache(shards_of(source))
        runs.append(measure([*limited, *llmprune_command(source, output)]))
    return min(runs, key=lambda run: run.wall_seconds)


def compare_with_cat(work: Path, limited: list[str], fixed_seconds: float) -> tuple[list[Bound], float]:
    """Prune the 8B model; the bounds, and the seconds that a GB of its input takes."""
    say("Writing a random 8B Llama of 16 GB …")
    source, output, copy = make_model(work / "llama-8b", LLAMA_8B), work / "pruned", work / "copy"
    say("Reading it twice with cat …")
    read = seconds_to_copy(limited, [*shards_of(source), *shards_of(source)])
    say("Pruning it at ratio 0.5 …")
    ours = prune(limited, source, output, 1)
    write = seconds_to_copy(limited, shards_of(output), copy)
    back = seconds_to_copy(limited, [copy])
    copy.unlink()
    parameters = loaded_parameters(output)
    streaming = ours.wall_seconds - fixed_seconds
    rows = [
        ["llmprune prune --pruning-ratio 0.5 --importance magnitude", f"{ours.wall_seconds:.1f}"],
        ["  of that, imports and twin proof (tiny model)", f"{fixed_seconds:.1f}"],
        ["cat, read the input twice", f"{read:.1f}"],
        ["cat and fsync, write the output", f"{write:.1f}"],
        ["cat, read the output back", f"{back:.1f}"],
    ]
    print_table("Random Llama of 8B in bf16, 16 GB in 4 shards", ["", "wall s"], rows)
    print(f"Parameters as transformers loads it: {parameters:,} (expected {PARAMETERS_8B:,})")
    gigabytes = sum(path.stat().st_size for path in shards_of(source)) / 1e9
    shutil.rmtree(output)
    others = run_others(limited, source, output)
    shutil.rmtree(source)
    factor = streaming / (read + write + back)
    return [
        *others,
        Bound("parameters, difference", abs(parameters - PARAMETERS_8B), 0),
        Bound("peak anonymous memory, GB", ours.peak_bytes / 1e9, LIMIT_BYTES / 1e9),
        Bound("(llmprune − fixed) / (read twice + write + read back)", factor, MAX_FACTOR),
    ], streaming / gigabytes


def run_others(limited: list[str], source: Path, output: Path) -> list[Bound]:
    """The memory of the other commands that stream; what they write is gone afterwards."""
    bounds = []
    for name, options in (("inspect", ()), ("export", ("--dtype", "float16", "--output", str(output)))):
        say(f"Running {name} …")
        taken = measure([*limited, sys.executable, "-m", "llmprune_cli", name, str(source), *options])
        print(f"{name}: {taken.wall_seconds:.1f} s")
        bounds.append(Bound(f"{name}: peak anonymous memory, GB", taken.peak_bytes / 1e9, LIMIT_BYTES / 1e9))
    shutil.rmtree(output)
    return bounds


def loaded_parameters(folder: Path) -> int:
    """The parameters of the model that transformers loads from a folder, all of whose tensors it must find there."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert count_parameters(folder) == sum(parameter.numel() for parameter in model.parameters())
    return count_parameters(folder)


def compare_sizes(work: Path, limited: list[str], fixed_seconds: float, per_gigabyte_8b: float) -> Bound:
    """How far apart the times per GB are."""
    rates = {"16 GB": per_gigabyte_8b}
    for name, sizes in OTHERS.items():
        say(f"Pruning {name} …")
        source, output = make_model(work / name.replace(" ", ""), sizes), work / "pruned"
        gigabytes = sum(path.stat().st_size for path in shards_of(source)) / 1e9
        taken = prune(limited, source, output, REPEATS)
        rates[name] = (taken.wall_seconds - fixed_seconds) / gigabytes
        shutil.rmtree(source)
        shutil.rmtree(output)
    rows = [[name, f"{rates[name]:.2f}"] for name in (*OTHERS, "16 GB")]
    print_table("Time per GB of input, imports and twin proof aside", ["", "s per GB"], rows)
    return Bound("time per GB, largest over smallest", max(rates.values()) / min(rates.values()), MAX_SPREAD)


def plan_405b(work: Path) -> list[Bound]:
    """What planning from a configuration alone takes."""
    from transformers import LlamaConfig

    folder = work / "405b"
    folder.mkdir()
    save_config(folder, LlamaConfig, LLAMA_405B)
    say("Planning for 405B …")
    command = [sys.executable, "-m", "llmprune_cli", "prune", str(folder), "--pruning-ratio", "0.5", "--dry-run"]
    taken = measure([*command, "--importance", "magnitude", "--refit", "none"])
    return [
        Bound("planning for 405B, s", taken.wall_seconds, MAX_PLANNING_SECONDS),
        Bound("planning for 405B, peak anonymous GB", taken.peak_bytes / 1e9, MAX_PLANNING_BYTES / 1e9),
    ]


def main() -> None:
    """Run everything in one temporary folder, which is gone afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (default: $TMPDIR)")
    parent = parser.parse_args().folder or Path(tempfile.gettempdir())
    needed, free_bytes = 36 * 10**9, shutil.disk_usage(parent).free  # input, an export of its size, and room
    if free_bytes < needed:
        sys.exit(f"{parent} has {free_bytes / 1e9:.1f} GB free of {needed / 1e9:.0f} needed. Give --folder.")
    with (
        tempfile.TemporaryDirectory(prefix="bench-llmprune-", dir=parent) as name,
        memory_limit(LIMIT_BYTES) as limited,
    ):
        work = Path(name)
        said = f"held under {LIMIT_BYTES:,} bytes by a cgroup" if limited else "measured: no cgroup can be made here"
        print(f"Memory of every timed command: {said}.")
        say("Measuring the fixed cost …")
        make_model(work / "tiny", TINY)
        fixed_seconds = prune(limited, work / "tiny", work / "pruned", REPEATS).wall_seconds
        bounds, per_gigabyte = compare_with_cat(work, limited, fixed_seconds)
        bounds.append(compare_sizes(work, limited, fixed_seconds, per_gigabyte))
        bounds += plan_405b(work)
    print_bounds(bounds)
    sys.exit(0 if all(bound.holds for bound in bounds) else 1)


if __name__ == "__main__":
    main()
