"""Two processes against one: the same figures, plans and weights, one voice, and one end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import TESTS
from support.cli import BY_MAGNITUDE, Run, run_cli
from support.families import EVERY
from support.full import examples, in_full
from support.sharing import made_once
from support.stock import written_tensors
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DRIVER = TESTS / "support" / "several_commands.py"
WINDOWS = ("--max-seq-len", "32", "--dataset", "corpus.txt")
CALIBRATED = (
    "--calibration",
    "long.txt",
    "--calibration-tokens",
    "9000",
    "--calibration-seq-len",
    "40",
)  # three batches
CUT = ("--intermediate-size", "24", *CALIBRATED)
FEWER = ("--vocab-size", "320", *CALIBRATED)
COMMANDS: dict[str, tuple[str, ...]] = {  # OUT is the folder of the processes that run them
    "eval": ("eval", "llama", "--compare", "mixtral", *WINDOWS, "--batch-size", "4", "--json"),
    "one window": ("eval", "llama", *WINDOWS, "--limit", "1", "--json"),
    "default": ("prune", "llama", *CUT, "--output", "OUT/default", "--save-plan", "OUT/default.json", "--json"),
    "experts": ("prune", "mixtral", "--experts", "2", "--importance", "activation", *CUT, "--output", "OUT/experts"),
    "rotate": ("prune", "llama", "--rotate", "--hidden-size", "32", *CALIBRATED, "--output", "OUT/rotate"),
    "search": (
        *("prune", "llama", "--target-params", "75%", "--layer-importance", "loss", *CALIBRATED, "--dry-run"),
        *("--save-plan", "OUT/search.json", "--statistics", "OUT/statistics", "--offload-dir", "OUT/states"),
    ),
    "magnitude": ("prune", "llama", *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", "OUT/magnitude"),
    "sweep": (
        *("sweep", "llama", "--mlp", "50%", "--importance", "range", *CALIBRATED),
        *("--output", "OUT/sweep", "--keep-models"),
    ),
    "inspect": ("inspect", "llama", "--json"),
}
IN_FULL: dict[str, tuple[str, ...]] = {
    "tokens": ("prune", "bytes", *BY_MAGNITUDE, "--mlp", "50%", *FEWER, "--output", "OUT/tokens"),
    "spent": (
        *("prune", "bytes", "--target", "80%", "--vocab", "auto", *CALIBRATED),
        *("--save-plan", "OUT/spent.json", "--output", "OUT/spent", "--json"),
    ),
}
COMMANDS |= IN_FULL if EVERY else {}
if not EVERY:
    del COMMANDS["rotate"], COMMANDS["sweep"]
FULL_FOR_TWO = ("prune", "llama", *CUT, "--output", "two/resumed")
FULL_FOR_ONE = ("prune", "llama", *CUT, "--output", "one/resumed")


def at_work(name: str, folder: str) -> list[str]:
    return [part.replace("OUT", folder) for part in COMMANDS[name]]


def launch(*command: str, cwd: Path) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=200, cwd=cwd, env=os.environ
    )
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with two models and a text, in which every command runs."""

    def make(folder: Path) -> None:
        save_tiny(folder / "llama", initializer_range=0.15)
        save_tiny(folder / "bytes", vocab_size=BYTE_LEVEL_VOCABULARY, initializer_range=0.15)
        save_byte_level(folder / "bytes")
        save_tiny(folder / "mixtral", "mixtral", num_local_experts=3, initializer_range=0.15)
        (folder / "corpus.txt").write_text(text_file.read_text())
        rows = (f"{number} times {number + 7} is {number * (number + 7)}.\n" for number in range(600))
        (folder / "long.txt").write_text("".join(rows))
        for side in ("one", "two"):
            (folder / side).mkdir()

    return made_once(tmp_path_factory, "processes", make)


@pytest.fixture(scope="module")
def both(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """How every command ended in the first and in the second process of two."""
    listed: dict[str, dict[str, Any]] = {name: {"arguments": at_work(name, "two")} for name in COMMANDS}
    listed["one fails"] = {"arguments": at_work("eval", "two"), "second": ["eval", "nowhere", *WINDOWS]}
    listed["full"] = {"arguments": FULL_FOR_TWO, "layers_until_full": 1}
    listed["resumed"] = {"arguments": [*FULL_FOR_TWO, "--resume"]}
    listed["full for one"] = {"arguments": FULL_FOR_ONE, "layers_until_full": 1}
    listed["usage"] = {"arguments": ["prune", "llama"]}

    def make(results: Path) -> None:
        results.mkdir()
        (results / "commands.json").write_text(json.dumps(list(listed.values())))
        run = launch(*TORCHRUN, str(DRIVER), str(results / "commands.json"), str(results), cwd=place)
        assert run.code == 0, run.stderr

    results = made_once(tmp_path_factory, "processes-ended", make)
    ended = [json.loads((results / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [Run(*first), Run(*second)] for name, first, second in zip(listed, *ended, strict=True)}


@pytest.fixture
def alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, to run commands in by one process."""
    monkeypatch.chdir(place)
    return place


def errors_of(folder: Path) -> list[float]:
    """What the manifest says of every refitted layer; nothing where no text was read."""
    layers = json.loads((folder / "llmprune.json").read_text()).get("calibration", {}).get("layers", [])
    found = [row[name] for row in layers for name in ("removal_error", "refit_error", "stream_error")]
    return [error for error in found if error is not None]


def largest_difference(one: Path, two: Path) -> float:
    """Of all tensors, relative to their norms."""
    a, b = written_tensors(one), written_tensors(two)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).norm() / a[name].double().norm()) for name in a)


@in_full
def test_accelerate_launch_evaluates_as_one_process_does(alone: Path) -> None:
    run = launch(*ACCELERATE, "-m", "llmprune_cli", *at_work("eval", "two"), cwd=alone)
    assert run.code == 0, run.stderr
    found, expected = (json.loads(r.stdout)["results"] for r in (run, run_cli(*at_work("eval", "one"))))
    assert run.stderr.count("Evaluating llama") == run.stderr.count("Evaluating mixtral") == 1
    for two, one in zip(found, expected, strict=True):
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-12)
        assert two["windows"] == one["windows"] and two["tokens"] == one["tokens"] == 32 * one["windows"]


def test_a_process_may_have_no_window(alone: Path, both: dict[str, list[Run]]) -> None:
    found = json.loads(both["one window"][0].stdout)["results"][0]
    expected = json.loads(run_cli(*at_work("one window", "one")).stdout)["results"][0]
    assert found["perplexity"] == expected["perplexity"] and found["windows"] == 1


@pytest.mark.parametrize("name", examples(["default", "experts", "rotate", "magnitude"], [*COMMANDS]))
def test_two_processes_write_what_one_writes(alone: Path, both: dict[str, list[Run]], name: str) -> None:
    assert both[name][0].code == 0, both[name][0].stderr
    assert run_cli(*at_work(name, "one")).code == 0
    assert largest_difference(alone / "one" / name, alone / "two" / name) < 1e-5
    one, two = (errors_of(alone / side / name) for side in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-9) and (name == "magnitude" or one)
    plans = [alone / side / f"{name}.json" for side in ("one", "two")]
    assert [plan.exists() for plan in plans] == [name == "default"] * 2
    assert name != "default" or plans[0].read_bytes() == plans[1].read_bytes()


@in_full
def test_two_processes_sweep_as_one_does(alone: Path, both: dict[str, list[Run]]) -> None:
    assert both["sweep"][0].code == 0, both["sweep"][0].stderr
    assert run_cli(*at_work("sweep", "one")).code == 0
    assert largest_difference(alone / "one" / "sweep" / "mlp-50%", alone / "two" / "sweep" / "mlp-50%") < 1e-5


@in_full
def test_two_processes_choose_the_tokens_that_one_chooses(alone: Path, both: dict[str, list[Run]]) -> None:
    for name in IN_FULL:
        assert both[name][0].code == 0, both[name][0].stderr
        run = run_cli(*at_work(name, "one"))
        assert run.code == 0, run.stderr
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (alone / "one" / "tokens" / file).read_bytes() == (alone / "two" / "tokens" / file).read_bytes()
    assert largest_difference(alone / "one" / "spent", alone / "two" / "spent") < 1e-5
    one, two = ((alone / side / "spent.json").read_bytes() for side in ("one", "two"))
    tried = [json.loads(text)["vocabularies"] for text in (run.stdout, both["spent"][0].stdout)]
    assert one == two and len(tried[0]) == 2
    for first, second in zip(*tried, strict=True):
        assert first == {**second, "bits_per_byte": pytest.approx(second["bits_per_byte"], rel=1e-5)}


def test_two_processes_find_what_one_finds(alone: Path, both: dict[str, list[Run]]) -> None:
    assert both["search"][0].code == 0, both["search"][0].stderr
    assert run_cli(*at_work("search", "one")).code == 0
    one, two = ((alone / side / "search.json").read_bytes() for side in ("one", "two"))
    assert one == two and len(list((alone / "two" / "statistics").iterdir())) == 2
    assert not list((alone / "two" / "states").iterdir())


def test_work_goes_on_in_as_many_processes_or_others(alone: Path, both: dict[str, list[Run]]) -> None:
    assert all(both[name][0].code == 6 and "is kept in" in both[name][0].stderr for name in ("full", "full for one"))
    assert both["resumed"][0].code == 0 and "Measuring" not in both["resumed"][0].stderr
    run = run_cli(*FULL_FOR_ONE, "--resume")
    assert run.code == 0 and "Measuring" not in run.stderr
    for side in ("one", "two"):
        assert largest_difference(alone / "two" / "default", alone / side / "resumed") < 1e-6
        assert not list((alone / side).glob(".resumed*"))


def test_only_the_first_process_speaks(both: dict[str, list[Run]]) -> None:
    assert all(run[1].stdout == run[1].stderr == "" for run in both.values())
    assert (
        json.loads(both["inspect"][0].stdout)["schema_version"]
        == json.loads(both["default"][0].stdout)["schema_version"]
    )


def test_an_error_in_one_process_ends_all(both: dict[str, list[Run]]) -> None:
    codes = {name: [run.code for run in runs] for name, runs in both.items()}
    errors = {"one fails": 3, "full": 6, "full for one": 6, "usage": 2}
    assert codes == {name: [errors.get(name, 0)] * 2 for name in both}
    first = both["one fails"][0]
    assert first.stderr.count("Error: nowhere is neither") == 1 and not first.stdout and "Traceback" not in first.stderr
