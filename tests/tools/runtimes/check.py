"""Hold pruned shapes of many families, as other runtimes compute them, against transformers and against what is said.

`make check-runtimes` builds an environment for each runtime and prints a table of each: `=` where all log-probabilities
agree, `differs` or `fails` where they do not, and beside it what `inspect` predicts. A check of all shapes writes what
was seen into the docs. Exit status 1: a cell where numbers differ, or that fails, without the prediction saying so, or
a prediction that is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from support.cli import BY_MAGNITUDE, run_cli  # noqa: E402
from support.stock import load_stock  # noqa: E402
from support.tiny import save_tiny  # noqa: E402

TOKENS = [3 + 7 * step % 90 for step in range(24)]
# As `inspect` calls them, by the names of their environments and of the scripts that print log-probabilities
RUNTIMES = {
    "ctranslate2": "CTranslate2",
    "vllm": "vLLM",
    "mlx": "mlx-lm",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "mistralrs": "mistral.rs",
}
UNKNOWN = "has no such family"
NO_SUCH_FAMILY = (
    *("No conversion is registered", "Unrecognized configuration class"),
    *("to be supported natively", "not supported.", "Unsupported Hugging Face Transformers"),
)
TOLERANCE = 2e-3  # of a log-probability
SECONDS = 600
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
}
ALL_HEADS = {**WIDE, "num_key_value_heads": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Weights so large that what is near and what is far makes a difference.
SHARP = {**WIDE, "initializer_range": 0.1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "topk_method": "noaux_tc",  # as published, where it says that the router has a bias
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,  # with it the 576 numbers that attention in vLLM wants
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
WITHOUT_WINDOWS = {"max_window_layers": 3, "use_sliding_window": False}  # as published, where it is said of no layer
ALL_ROWS = {"vocab_size": 96}  # as many as the tokenizer has tokens, which CTranslate2 wants of some families
NEW_FALCON = {
    "ffn_hidden_size": 192,
    "intermediate_size": 192,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
}
LFM2 = {
    **WIDE,
    "layer_types": ["conv", "full_attention", "conv"],
    **dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), 256),  # as published, for others to read
    "block_ff_dim": 192,
    "block_auto_adjust_ff_dim": False,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-5,
    "conv_L_cache": 3,
    "num_heads": 8,
}
SIZES = {"num_hidden_layers": 3, "vocab_size": 128}  # more rows than the tokenizer has tokens
WHOLE: tuple[str, ...] = ()  # as `export` writes it
HEADS, NEURONS, FEWER = ("--num-attention-heads", "4"), ("--intermediate-size", "101"), ("--experts", "6")

# family, settings, shapes by name: the options that prune it so; with none it is exported whole
Shapes = dict[str, tuple[str, ...]]
MODELS: list[tuple[str, dict[str, Any], Shapes]] = [
    (
        "llama",
        WIDE,
        {"whole": WHOLE, "4 of 8 heads": HEADS, "101 neurons": NEURONS, "2 of 3 layers": ("--layers", "2")},
    ),
    ("llama", ALL_HEADS, {"4 of 8 heads, each with keys of its own": HEADS}),
    ("mistral", WIDE, {"4 of 8 heads": HEADS, "101 neurons": NEURONS}),
    ("mistral", {**SHARP, "sliding_window": 16}, {"windows of 16": WHOLE}),
    ("qwen3", {**SHARP, **WINDOWED, "use_sliding_window": True}, {"windows of 16 in 2 of 3 layers": WHOLE}),
    ("qwen3", {**SHARP, "rope_parameters": YARN}, {"YaRN": WHOLE}),
    ("gemma", {**SHARP, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"RoPE of base 5e5": WHOLE}),
    ("gemma", SHARP, {"whole": WHOLE}),
    ("qwen2", WIDE, {"whole": WHOLE, "4 of 8 heads": HEADS, "101 neurons": NEURONS}),
    ("qwen3", WIDE, {"4 of 8 heads": HEADS, "101 neurons": NEURONS, "hidden 224": ("--hidden-size", "224")}),
    ("qwen3", {**WIDE, "head_dim": 40}, {"head dim 40": NEURONS}),
    ("phi3", WIDE, {"101 neurons": NEURONS}),
    ("gemma2", WIDE, {"whole": WHOLE, "101 neurons": NEURONS}),
    ("olmo2", WIDE, {"101 neurons": NEURONS}),
    ("starcoder2", WIDE, {"4 of 8 heads": HEADS}),
    ("mixtral", {**WIDE, "num_local_experts": 8, "num_experts_per_tok": 2}, {"6 of 8 experts": FEWER}),
    ("mixtral", {**WIDE, "num_local_experts": 8}, {"hidden 144": ("--hidden-size", "144")}),
    (
        "qwen3_moe",
        {**WIDE, **EXPERTS, **WITHOUT_WINDOWS, "num_experts": 8},
        {"6 of 8 experts": FEWER, "4 of 8 heads": HEADS},
    ),
    (
        "qwen2_moe",
        {**WIDE, **EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 192},
        {"6 of 8 experts": FEWER},
    ),
    ("olmoe", {**WIDE, "num_experts": 8, "num_experts_per_tok": 2}, {"6 of 8 experts": FEWER}),
    ("granitemoe", {**WIDE, "num_local_experts": 8, "num_experts_per_tok": 2}, {"6 of 8 experts": FEWER}),
    ("gpt_oss", {**WIDE, **WINDOWED, "num_local_experts": 8, "num_experts_per_tok": 2}, {"6 of 8 experts": FEWER}),
    ("gpt_oss", {**WIDE, **WINDOWED, "num_local_experts": 8}, {"88 neurons": ("--intermediate-size", "88")}),
    ("deepseek_v3", {**WIDE, **LATENT}, {"6 of 8 experts": FEWER, "hidden 224": ("--hidden-size", "224")}),
    ("gemma3_text", {**WIDE, **WINDOWED}, {"whole": WHOLE, "101 neurons": NEURONS, "4 of 8 heads": HEADS}),
    ("granite", WIDE, {"101 neurons": NEURONS, "4 of 8 heads": HEADS}),
    ("smollm3", WIDE, {"101 neurons": NEURONS, "4 of 8 heads": HEADS}),
    ("glm4", WIDE, {"101 neurons": NEURONS}),
    ("cohere", {**WIDE, "pad_token_id": 0}, {"101 neurons": NEURONS}),
    ("stablelm", WIDE, {"101 neurons": NEURONS}),
    ("phi", WIDE, {"101 neurons": NEURONS}),
    ("gpt2", {**WIDE, **ALL_ROWS, "n_inner": 192}, {"101 neurons": NEURONS, "hidden 128, 4 of 8 heads": HEADS}),
    ("gpt_neox", WIDE, {"101 neurons": NEURONS}),
    ("opt", {**WIDE, **ALL_ROWS, "ffn_dim": 192, "word_embed_proj_dim": 256}, {"101 neurons": NEURONS}),
    ("falcon", NEW_FALCON, {"101 neurons": NEURONS}),
    ("lfm2", LFM2, {"101 neurons": NEURONS, "hidden 224": ("--hidden-size", "224")}),
]


@dataclass(frozen=True)
class Cell:
    """What a runtime makes of a shape."""

    family: str
    shape: str
    seen: str  # "=", "differs" or "fails", with a figure or the error's last line
    said: str  # what `inspect` says of it; empty where it expects no trouble

    @property
    def is_told(self) -> bool:
        """Whether the prediction is what was seen."""
        return self.seen == UNKNOWN or (self.seen == "=") == (not self.said)


def scored(folder: Path) -> torch.Tensor:
    """Log-probabilities of the text in transformers."""
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        scores = load_stock(folder).float()(ids).logits.log_softmax(-1)[0, :-1]
    return scores.gather(1, ids[0, 1:, None])[:, 0]


def compared(folder: Path, expected: torch.Tensor, runtime: str, environments: str) -> str:
    """See `Cell.seen`."""
    python = Path(f"{environments}-{runtime}/bin/python").absolute()
    command = [python, Path(__file__).absolute().with_name(f"in_{runtime}.py"), folder, json.dumps(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    lines = done.stdout.strip().splitlines()
    if any(words in done.stderr for words in NO_SUCH_FAMILY):
        return UNKNOWN
    if done.returncode or not lines or not lines[-1].startswith("["):
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*Error\b", line)]
        return f"fails: {(errors or ['no word'])[-1].strip()[-160:]}"
    gap = float((torch.tensor(json.loads(lines[-1])) - expected).abs().max())
    return "=" if gap < TOLERANCE else f"differs by {gap:.3f}"


def trouble(fit: dict[str, Any]) -> str:
    """What `inspect` says of a runtime, where that is about a text of this length; see `Cell.said`."""
    window = re.search(r"window of (\d+) tokens only", fit["note"])
    is_beyond = window is not None and int(window[1]) < len(TOKENS)
    return fit["note"] if is_beyond or not fit["loads"] else ""


def write_into_docs(cells: dict[str, list[Cell]]) -> None:
    """Replace the docs' table of what was seen in these runtimes."""
    begin, end = "<!-- runtimes: made by `make check-runtimes` -->\n", "<!-- end of runtimes -->"
    heads = ["family", "shape", *(RUNTIMES[name] for name in cells)]
    rows = [heads, ["---"] * len(heads)]
    for column in zip(*cells.values(), strict=True):
        seen = [re.sub(r"^(fails|differs).*", r"\1", cell.seen).replace(UNKNOWN, "") for cell in column]
        rows.append([column[0].family, column[0].shape, *seen])
    page = ROOT / "docs" / "exports.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    page.write_text(before + begin + lines + end + rest.partition(end)[2], encoding="utf-8")


def main() -> int:
    """Print a table of each runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environments", help="what the folders of all environments begin with, as in .venv-vllm")
    parser.add_argument("runtime", nargs="+", choices=RUNTIMES)
    parser.add_argument("--family", action="append", help="try these alone")
    arguments = parser.parse_args()
    cells: dict[str, list[Cell]] = {name: [] for name in arguments.runtime}
    for family, settings, shapes in MODELS:
        if arguments.family and family not in arguments.family:
            continue
        for shape, options in shapes.items():
            with tempfile.TemporaryDirectory() as scratch:
                source, folder = (
                    save_tiny(Path(scratch, "model"), family, **{**SIZES, **settings}),
                    Path(scratch, "pruned"),
                )
                command = ("prune", source, *BY_MAGNITUDE, *options) if options else ("export", source)
                run = run_cli(*command, "--output", folder)
                if run.code:
                    raise SystemExit(f"{family}, {shape}: {run.stderr}")
                expected = scored(folder)
                fits = json.loads(run_cli("inspect", folder, "--json").stdout)["runtimes"]
                said = {fit["runtime"]: trouble(fit) for fit in fits}
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    asked = [pool.submit(compared, folder, expected, name, arguments.environments) for name in cells]
                for (name, column), seen in zip(cells.items(), asked, strict=True):
                    column.append(Cell(family, shape, seen.result(), said.get(RUNTIMES[name], "")))
                    print(name, column[-1], file=sys.stderr, flush=True)
    for name, column in cells.items():
        table = Table("family", "shape", "seen", "said", "", title=RUNTIMES[name])
        for cell in column:
            table.add_row(cell.family, cell.shape, cell.seen, cell.said, "" if cell.is_told else "NOT TOLD")
        Console(width=160).print(table)
    if not arguments.family:
        write_into_docs(cells)
    return int(not all(cell.is_told for column in cells.values() for cell in column))


if __name__ == "__main__":
    sys.exit(main())
