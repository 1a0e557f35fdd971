"""Every type of causal language model that transformers has, by width: proven, or refused with the reason.

`make families` builds a small model of each configuration in `configurations.json`, asks `llmprune inspect` what can be
pruned, prunes half of it and more with `llmprune prune`, and holds the result against `oracle.py`. Where all widths
together differ, each is tried alone. It fails where anything crashes, takes long, differs, or is offered and refused.
`CALIBRATED=1` prunes one width by what units do on text instead, evaluates the result, and compares the model, run
layer by layer, with the stock one: refusals are shown, and what crashes or differs is a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune_cli.coupling.subject import understand
from llmprune_cli.options import ModelReference
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from support.cli import BY_CHANCE, run_cli
from support.tiny import save_tokenizer
from tools.families.oracle import difference

CONFIGURATIONS = Path(__file__).with_name("configurations.json")
MOST_SECONDS = 20  # of a processor that a command may take
MOST_PARAMETERS = 5_000_000  # of a model that is small
TOLERANCE = 1e-4  # rotary embeddings, softmax and norms run in float32 inside a float64 model
NEURONS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
HEADS = ("num_attention_heads", "num_key_value_heads")
COLUMNS = ("MLP", "layers", "heads", "hidden", "experts")  # what the totals count


@dataclass
class Row:
    """What came of one type."""

    name: str
    state: str = ""  # why nothing was tried; empty where something was
    widths: dict[str, str] = field(default_factory=dict)  # width → proven, or what stands against it
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of a processor, for the slowest command

    def has(self, column: str) -> bool:
        """Whether widths of this kind are proven."""
        names = {"MLP": NEURONS, "heads": HEADS[:1], "hidden": ("hidden_size",), "experts": ("num_experts",)}
        return any(self.widths.get(width) == "proven" for width in names.get(column, ("num_hidden_layers",)))


def main() -> int:
    """Try the types that are named, or a slice of all; exit status 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="types of models; all where none is named")
    parser.add_argument("--slice", default="1/1", metavar="I/N", help="the I-th of N parts of them")
    parser.add_argument("--rows", type=Path, help="file that rows are added to, one JSON object on each line")
    parser.add_argument("--calibrated", action="store_true", help="prune one width by text, and evaluate")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    part, parts = map(int, given.slice.split("/"))
    rows = []
    for name in (given.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))[part - 1 :: parts]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(name, Path(folder), given.calibrated))
        show(rows[-1])
        if given.rows:
            with given.rows.open("a") as file:
                file.write(json.dumps(vars(rows[-1])) + "\n")
    counts = ", ".join(f"{sum(row.has(column) for row in rows)} with {column}" for column in COLUMNS)
    both = sum(row.has("MLP") and row.has("layers") for row in rows)
    print(f"{len(rows)} types: {counts}, {both} with MLP and layers; {sum(bool(row.faults) for row in rows)} faults.")
    return int(any(row.faults for row in rows))


def show(row: Row) -> None:
    """One line for each type, and one for each width that is refused."""
    proven = [width for width, said in row.widths.items() if said == "proven"]
    print(f"{row.name}: {row.state or ', '.join(proven) or 'nothing'} ({row.seconds:.1f} s)", flush=True)
    for width, said in row.widths.items():
        if said != "proven":
            print(f"    {width}: {said}")
    for fault in row.faults:
        print(f"    FAULT {fault}", flush=True)


def tried(name: str, work: Path, by_text: bool) -> Row:
    """Inspect and prune one type."""
    row = Row(name)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    model = work / "model"
    row.state = build(name, model)
    if row.state:
        return row
    said = told(row, "inspect", model, "--json")
    if said is None:
        return row
    prunable, before = said["prunable"], said["before"]["widths"]
    for width, legal in prunable.items():
        one = legal == "1" or legal.split(",")[0] == "1 to 1"
        row.widths[width] = legal if legal.startswith("no: ") else "only one" if one else "proven"
    options = dict(requested(row.widths, prunable, before))
    if by_text:
        width, own = next(iter(options.items()), ("", []))
        row.widths = {f"{width}, calibrated": calibrated(row, model, work, own)} if width else row.widths
        return row
    together = [option for own in options.values() for option in own]
    fault = judge(row, model, work / "all", together) if together else None
    if fault is not None:
        for width, own in options.items():
            alone = judge(row, model, work / width, own)
            if alone is not None:
                row.widths[width] = f"FAULT: {alone}"
                row.faults.append(f"{width}: {alone}")
        if not row.faults:
            row.faults.append(f"all widths together, but none alone: {fault}")
    return row


def build(name: str, folder: Path) -> str:
    """Save a small random model; the answer says why there is none."""
    settings = json.loads(CONFIGURATIONS.read_text()).get(name)
    if settings is None:
        return "not buildable: no small configuration"
    try:
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=torch.float32)
    except Exception as error:  # whatever a class refuses
        return f"not buildable: {str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)}"
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        return "not buildable: too large"
    state = model.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            if not tensor.is_floating_point():
                continue
            noise = different(tensor)
            is_plain = tensor.ndim < 2 or not tensor.any()
            tensor.copy_(tensor + 0.2 * noise if is_plain else noise / max(1, tensor.shape[-1]) ** 0.5)
    model.save_pretrained(folder)
    return ""


def calibrated(row: Row, model: Path, work: Path, options: list[str]) -> str:
    """What came of pruning by text, and of evaluating that."""
    save_tokenizer(model)
    text, pruned = work / "text.txt", work / "pruned"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it does so again. " * 20)
    sizes = ("--calibration", text, "--calibration-seq-len", "24", "--calibration-tokens", "192")
    for command in (
        ("prune", model, *options, *sizes, "--output", pruned),
        ("eval", model, pruned, "--dataset", text, "--max-seq-len", "24", "--limit", "2"),
    ):
        answer = Row(row.name)
        told(answer, *command, "--json")
        row.seconds = max(row.seconds, answer.seconds)
        row.faults += answer.faults
        if answer.state:
            return answer.state
    found = layers_apart(model)
    if not found <= TOLERANCE:
        row.faults.append(f"run layer by layer, logits differ by {found:.1e} of their size")
    return "proven"


def layers_apart(model: Path) -> float:
    """How far logits of a batch are from the stock model's where its layers run one at a time, relative."""
    tokens = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(ModelReference(str(model)), need_weights=True) as checkpoint:
        layered = LayeredModel(understand(checkpoint), "cpu")
        with torch.inference_mode():
            *_, (states, items) = layered.walk(tokens)
            logits = layered.load_ends().logits(states, items)
            expected = load_model(checkpoint, "cpu", "float32")(tokens, use_cache=False).logits
    return float((logits - expected).norm() / expected.norm())


def different(like: torch.Tensor) -> torch.Tensor:
    """Normally distributed values, no two of them alike."""
    count = like.numel()
    values = torch.erfinv(torch.linspace(-1, 1, count + 2, dtype=torch.float64)[1:-1]) * 2**0.5
    return values[torch.randperm(count)].reshape(like.shape).to(like.dtype)


def told(row: Row, *options: str | Path) -> dict[str, Any] | None:
    """What a command answers; None where it refuses, which the row then says."""
    started = time.process_time()
    try:
        run = run_cli(*options)
    except BaseException as error:  # a traceback is what this looks for
        row.faults.append(f"{options[0]} crashes: {type(error).__name__}: {str(error)[:200]}")
        row.state = row.state or "crashed"
        return None
    seconds = time.process_time() - started
    row.seconds = max(row.seconds, round(seconds, 1))
    if seconds > MOST_SECONDS:
        row.faults.append(f"{options[0]} takes {seconds:.0f} s")
    if run.code == 0:
        found: dict[str, Any] = json.loads(run.stdout)
        return found
    reason = re.sub(r"\S*/model", "MODEL", ([*run.stderr.strip().splitlines()] or ["no reason"])[-1])
    row.state = f"refused, exit {run.code}: {reason}"
    return None


def requested(
    widths: dict[str, str], prunable: dict[str, str], before: dict[str, int]
) -> Iterator[tuple[str, list[str]]]:
    """The options that prune about half of each width that is offered."""
    for width in NEURONS:
        if widths.get(width) == "proven":
            yield width, [f"--{width.replace('_', '-')}", str(max(8, before[width] // 2 // 8 * 8))]
    if widths.get("num_key_value_heads") == "proven":
        yield "num_key_value_heads", ["--kv-group-pruning-ratio", "0.5"]
    elif widths.get("num_attention_heads") == "proven":
        yield "num_attention_heads", ["--head-pruning-ratio", "0.5"]
    if widths.get("hidden_size") == "proven" and not prunable["hidden_size"].startswith("query heads"):
        yield "hidden_size", ["--hidden-pruning-ratio", "0.5"]
    if widths.get("num_experts") == "proven":
        legal = prunable["num_experts"].replace("…", "").replace(",", " ").split()
        yield "num_experts", ["--experts", legal[len(legal) // 2]]
    if widths.get("num_hidden_layers") == "proven":
        yield "num_hidden_layers", ["--layers", str(before["num_hidden_layers"] - 1)]


def judge(row: Row, model: Path, folder: Path, options: list[str]) -> str | None:
    """Prune, and compare; the answer says what is wrong."""
    plan = folder.with_suffix(".plan")
    answer = Row(row.name)
    told(answer, "prune", model, *BY_CHANCE, *options, "--output", folder, "--save-plan", plan, "--json")
    row.seconds = max(row.seconds, answer.seconds)
    row.faults += [fault for fault in answer.faults if "takes" in fault]
    if answer.state:
        if "--layers" in options and re.search("the last (ones|layers)", answer.state):
            place = options.index("--layers")
            return judge(row, model, folder, [*options[:place], "--drop-layers", "-1", *options[place + 2 :]])
        return f"{answer.state} {' '.join(answer.faults)}".strip()
    try:
        found = difference(model, folder, plan)
    except Exception as error:
        return f"the oracle cannot tell: {type(error).__name__}: {str(error)[:200]}"
    return None if found <= TOLERANCE else f"logits differ by {found:.1e} of their size"


if __name__ == "__main__":
    sys.exit(main())
