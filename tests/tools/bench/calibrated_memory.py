"""Peak memory and time of a calibrated prune: an 8B Llama's layers, and how both grow with depth.

`make bench-memory` runs it. Exit status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.tiny import save_tokenizer
from tools.bench.prune_1b import Bound, Measurement, measure, print_bounds, print_table, say

# Two layers of Llama-3.1-8B, and a smaller shape for depths.
SLICE_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SHALLOW = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
DEPTHS = (2, 4, 8)
TOKENS = 16384
WINDOW = 512
VOCABULARY = 96  # of the tokenizer: the embedding is read as it is and says nothing about the layers

MAX_ANONYMOUS_BYTES = 6 * 10**9
MAX_MEMORY_GROWTH = 1.1  # peak of the deepest over that of the shallowest
MAX_TIME_GROWTH = 1.5  # time per layer added by the second step in depth over that added by the first


def make_model(folder: Path, sizes: dict[str, int], layers: int, vocabulary: int = VOCABULARY) -> Path:
    """Write a random bf16 Llama with a tokenizer of single characters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=8192)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    save_tokenizer(folder)
    return folder


def prune(source: Path, text: Path, output: Path) -> Measurement:
    """A quarter of the neurons by activity, with the residual refit, on `TOKENS` tokens."""
    options = ["--intermediate-pruning-ratio", "0.25"]
    calibration = [
        "--calibration",
        str(text),
        "--calibration-tokens",
        str(TOKENS),
        "--calibration-seq-len",
        str(WINDOW),
    ]
    command = [sys.executable, "-m", "llmprune_cli", "prune", str(source), "--output", str(output), "--overwrite"]
    taken = measure([*command, *options, *calibration])
    shutil.rmtree(output)
    return taken


def row(name: str, taken: Measurement) -> list[str]:
    """One line of the table."""
    return [name, f"{taken.wall_seconds:.1f}", f"{taken.cpu_seconds:.1f}", f"{taken.peak_bytes / 1e6:,.0f}"]


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths-only", action="store_true", help="leave the 8B slice out")
    only_depths = parser.parse_args().depths_only
    bounds, rows = [], []
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        text = work / "text.txt"
        # single characters are tokens: room for the fitted windows and the held-out ones
        text.write_text("".join(f"{number} times {number + 7} is {number * (number + 7)}.\n" for number in range(2000)))
        if not only_depths:
            say("Pruning two layers of an 8B Llama …")
            taken = prune(make_model(work / "slice", SLICE_8B, 2), text, work / "out")
            shutil.rmtree(work / "slice")
            rows.append(row("two layers of 8B (hidden 4096, MLP 14336, 32/8 heads)", taken))
            bounds.append(
                Bound("peak anonymous memory of the 8B slice, GB", taken.peak_bytes / 1e9, MAX_ANONYMOUS_BYTES / 1e9)
            )
        runs = []
        for layers in DEPTHS:
            say(f"Pruning {layers} layers of hidden 512 …")
            runs.append(prune(make_model(work / f"deep-{layers}", SHALLOW, layers), text, work / "out"))
            rows.append(row(f"{layers} layers of hidden 512", runs[-1]))
    print_table(f"Calibrated prune on {TOKENS:,} tokens", ["", "wall s", "CPU s", "peak anonymous MB"], rows)
    first, second = ((runs[i].wall_seconds - runs[i - 1].wall_seconds) / (DEPTHS[i] - DEPTHS[i - 1]) for i in (1, 2))
    bounds.append(Bound("peak memory, 8 layers over 2", runs[-1].peak_bytes / runs[0].peak_bytes, MAX_MEMORY_GROWTH))
    bounds.append(Bound("time per further layer, 4 to 8 over 2 to 4", second / first, MAX_TIME_GROWTH))
    print_bounds(bounds)
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
