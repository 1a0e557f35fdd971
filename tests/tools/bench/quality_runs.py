"""A row of the quality table is run, measured and kept."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[3]
PROGRAMS = {"llmprune": ["-m", "llmprune_cli"], "optipfair": [str(Path(__file__).with_name("optipfair_choice.py"))]}
CODE = (*sorted((ROOT / "llmprune_cli").rglob("*.py")), Path(__file__), Path(PROGRAMS["optipfair"][0]))
MODEL, STAGE, OUTPUT, STATISTICS = "MODEL", "STAGE", "OUTPUT", "STATISTICS"  # stand for folders in a row's commands


@dataclass(frozen=True)
class Row:
    """One way to make a model."""

    name: str
    commands: tuple[tuple[str, ...], ...] = ()  # with MODEL, STAGE and OUTPUT for folders; none: the model as it is
    parameters: int | None = None  # that must come out of it, where that is known
    note: str = ""  # why there is nothing to run


@dataclass(frozen=True)
class Outcome:
    """What came of a row."""

    name: str
    parameters: int = 0
    perplexity: dict[str, float] | None = None  # by corpus; None where nothing was measured
    seconds: float = 0.0  # to prune and to measure
    widths: dict[str, int] | None = None  # that stayed
    layers: tuple[int, ...] = ()  # that stayed, where a target chose them
    importance: str = ""
    refit: str = ""
    note: str = ""
    error: str = ""  # why it failed

    @property
    def applies(self) -> bool:
        """Whether there was something to measure."""
        return self.perplexity is not None or bool(self.error)


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: Path
    work: Path  # keeps finished rows
    texts: dict[str, torch.Tensor]  # token ids by corpus, [windows, T]
    digests: dict[str, str]  # of the model and of each text

    @classmethod
    def over(cls, model: Path, work: Path, texts: dict[str, torch.Tensor]) -> Bench:
        """A bench that recognises its model and its texts."""
        weights = digest(path.read_bytes() for path in sorted(model.glob("*.safetensors")))
        own = {name: digest([windows.numpy().tobytes()]) for name, windows in texts.items()}
        return cls(model.resolve(), work.resolve(), texts, {"model": weights, **own})


def run_row(row: Row, bench: Bench) -> Outcome:
    """The outcome of a row: from the work folder where it is finished, else by running it; failures are not kept."""
    if row.note:
        return Outcome(row.name, note=row.note)
    path = bench.work / f"{''.join(c if c.isalnum() else '-' for c in row.name)}.json"
    packages = {name: _version(name) for name in ("torch", "transformers", "optipfair")}
    code = digest(source.read_bytes() for source in CODE)
    commands = [list(command) for command in row.commands]
    key = {"commands": commands, "parameters": row.parameters, "code": code, **packages, **bench.digests}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return Outcome(**{**stored["outcome"], "layers": tuple(stored["outcome"]["layers"])})
    say(f"{row.name} …")
    scratch = bench.work / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # an interrupted run may have left one
    scratch.mkdir(parents=True)
    try:
        outcome = _make_and_measure(row, bench, scratch)
    except Exception as error:  # a row that fails must not keep the others from running
        outcome = Outcome(row.name, error=str(error) or repr(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if outcome.error:
        say(f"  failed: {outcome.error}")
        return outcome
    say(f"  {outcome.parameters:,} parameters, perplexity {outcome.perplexity}, {outcome.seconds:.0f} s")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"key": key, "outcome": asdict(outcome)}, indent=2), encoding="utf-8")
    unfinished.replace(path)
    return outcome


def _make_and_measure(row: Row, bench: Bench, scratch: Path) -> Outcome:
    started = time.perf_counter()
    folders = {MODEL: bench.model, STAGE: scratch / "stage", OUTPUT: scratch / "output"}
    folders[STATISTICS] = bench.work / "statistics"  # what is measured on the same text is measured once
    printed = [run_command([str(folders.get(part, part)) for part in command]) for command in row.commands]
    parameters, perplexity = measure(folders[OUTPUT if row.commands else MODEL], bench.texts)
    result = json.loads(printed[-1]) if row.commands and row.commands[-1][0] == "llmprune" else {}
    after, candidates = result.get("after", {}), result.get("candidates")
    for expected in (row.parameters, after.get("parameters")):
        if expected not in (None, parameters):
            raise RuntimeError(f"The model has {parameters:,} parameters, not {expected:,}.")
    return Outcome(
        name=row.name,
        parameters=parameters,
        perplexity=perplexity,
        seconds=time.perf_counter() - started,
        widths=after.get("widths"),
        layers=tuple(candidates[0]["layers"]) if candidates else (),
        importance=result.get("importance", ""),
        refit=result.get("refit", ""),
    )


def run_command(command: list[str]) -> str:
    """Run `llmprune` or optipfair's choice with the interpreter that runs this, and return its stdout.

    Raises:
        RuntimeError: it failed; the message is the last line that it printed.
    """
    full = [sys.executable, *PROGRAMS[command[0]], *command[1:]]
    done = subprocess.run(full, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(
            lines[-1].removeprefix("Error: ") if lines else f"{command[0]} ended with status {done.returncode}."
        )
    return done.stdout


def measure(folder: Path, texts: dict[str, torch.Tensor]) -> tuple[int, dict[str, float]]:
    """Parameters and perplexity by corpus of a folder that stock transformers loads in bf16.

    Raises:
        RuntimeError: a key is missing, unexpected or mismatched.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    model, info = loaded
    wrong = {kind: found for kind, found in info.items() if found}
    if wrong:
        raise RuntimeError(f"The result does not load cleanly: {wrong}")
    perplexity = {}
    for name, windows in texts.items():
        losses = []
        for window in windows:
            with torch.inference_mode():
                logits = model(window.unsqueeze(0)).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        perplexity[name] = math.exp(sum(losses) / len(losses))
    return model.num_parameters(), perplexity


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of byte strings one after another."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
