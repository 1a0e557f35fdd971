"""What a prune is said to take before it starts, and what it then takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.commands.prune import estimate
from llmprune_cli.commands.prune.estimate import room
from llmprune_cli.commands.prune.estimate.room import peak_memory
from support.cli import BY_MAGNITUDE, CALIBRATED, Run, run_cli
from support.full import examples, in_full
from support.gguf_exports import tiny
from support.tiny import save_tiny

QUARTER = ("--intermediate-size", "32")
REQUESTS = {
    "default": QUARTER,
    "magnitude": (*QUARTER, *BY_MAGNITUDE),
    "magnitude, refitted": (*QUARTER, "--importance", "magnitude"),
    "range": (*QUARTER, "--importance", "range"),
    "taylor, not refitted": (*QUARTER, "--importance", "taylor", "--refit", "none"),
    "layers by loss": ("--layers", "3", "--layer-importance", "loss"),
    "layers by influence": ("--layers", "3"),
    "dropped layers": ("--drop-layers", "1"),
    "target": ("--target", "80%"),
    "protected": ("--target", "80%", "--keep-layers", "0"),
}
OWN = """
import resource, sys
from llmprune_cli.commands.prune import estimate
from llmprune_cli.commands.prune.estimate import room
estimate.LEAST_WORK = 0
from llmprune_cli.__main__ import main
try:
    main(sys.argv[1:])
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    kib = {name: int(status[name].split()[0]) for name in ("VmHWM", "RssFile")}
    print(1024 * (kib["VmHWM"] - kib["RssFile"]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)


@pytest.fixture
def every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs are worth an estimate, too."""
    monkeypatch.setattr(estimate, "LEAST_WORK", 0)


def expected(*words: str | Path) -> dict[str, Any]:
    """The estimate in a document."""
    run = run_cli(*words, "--json")
    assert run.code == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)["estimate"]
    return found


@pytest.mark.parametrize("request_", [("default"), ("magnitude")])
def test_a_dry_run_says_time_memory_and_disk_in_80_columns(deep: Path, request_: str) -> None:
    run = run_cli("prune", deep, *REQUESTS[request_], "--dry-run")
    assert run.code == 0 and not run.stderr, run.stderr
    said = re.search(r"expect about \d+ (?:s|min|h)[^,]*, [\d.]+ \wiB of memory,\n[\d.]+ \wiB of disk", run.stdout)
    assert said, run.stdout
    assert max(map(len, run.stdout.split("To go on")[0].splitlines())) <= 80
    assert ("of temporary files." in run.stdout) == (request_ == "default")


def test_where_there_are_no_weights_no_time_is_said(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((deep / "config.json").read_text())
    said = expected("prune", tmp_path, *QUARTER, "--dry-run")
    assert said["seconds"] is None and said["stages"] == [] and said["memory_bytes"] > 0 and said["disk_bytes"] > 0
    assert "a time that was not measured" in run_cli("prune", tmp_path, *QUARTER, "--dry-run").stdout


@pytest.mark.parametrize("name", examples(REQUESTS, ["range"]))
@pytest.mark.usefixtures("every_run")
def test_the_stages_that_are_expected_are_those_that_come(
    deep: Path, name: str, text_file: Path, tmp_path: Path
) -> None:
    asked = ("prune", deep, *REQUESTS[name], *CALIBRATED, "--calibration", text_file)
    run = run_cli(*asked, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    said = json.loads(run.stdout)["estimate"]
    if name == "magnitude":
        assert said is None  # over sooner than that could be said
        said = expected(*asked, "--dry-run")
    shown = {re.sub(r"^Trying .*", "Candidates", line) for line in run.stderr.splitlines()}
    came = {line for line in shown if not re.search(r"^Warning|^Expect|of disk|: \d+ of |: \d+%", line)}
    assert {stage["name"] for stage in said["stages"]} == came
    assert said["seconds"] >= sum(stage["seconds"] for stage in said["stages"]) > 0
    tried = len(json.loads(run.stdout)["candidates"])
    assert tried <= said["candidates"] == (1 if name == "protected" else 6 if name == "target" else 0)
    if tried:
        assert f"Trying {tried} of at most {said['candidates']}: " in run.stderr
        assert f"and at most {said['candidates']} candidates, " in run.stderr
        dry = expected(*asked, "--dry-run")
        assert dry["candidates"] == 0 and not any(stage["chooses"] for stage in dry["stages"])
    assert ("Expect about" in run.stderr) == (name != "magnitude")


@pytest.mark.parametrize("width", examples([(), QUARTER], [()]))
@pytest.mark.usefixtures("every_run")
def test_ranking_tokens_is_a_stage_that_is_expected(width: tuple[str, ...], text_file: Path, tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", "llama", num_hidden_layers=2)
    asked = ("prune", source, "--vocab", "320", *width, *CALIBRATED, "--calibration", text_file)
    run = run_cli(*asked, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    said = json.loads(run.stdout)["estimate"]
    came = {line for line in run.stderr.splitlines() if not re.search(r"^Warning|^ |^Expect|of disk|: \d", line)}
    assert {stage["name"] for stage in said["stages"]} == came >= {"Ranking tokens", "Judging on held-out text"}
    assert said["seconds"] >= sum(stage["seconds"] for stage in said["stages"]) > 0
    assert bool(said["temporary_bytes"]) == bool(width)
    rows = 2 * 64 * 64 * 4  # of which the folder is smaller
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert not width or said["disk_bytes"] < whole - rows + 100_000


@in_full
@pytest.mark.usefixtures("every_run")
def test_a_run_of_which_time_was_told_writes_the_same_bytes(
    deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("prune", deep, *QUARTER, *CALIBRATED, "--calibration", text_file)
    assert run_cli(*asked, "--output", tmp_path / "told").code == 0
    monkeypatch.setattr(estimate, "LEAST_WORK", 2**60)
    run = run_cli(*asked, "--output", tmp_path / "untold")
    assert "Expect" not in run.stderr
    for path in (tmp_path / "told").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "untold" / path.name).read_bytes()


def test_only_what_a_model_or_a_machine_may_come_to_leaves_the_time_untold(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Run:
        def raise_it(job: object) -> None:
            raise error

        monkeypatch.setattr(estimate, "rehearse", raise_it)
        return run_cli("prune", deep, *QUARTER, *BY_MAGNITUDE, "--dry-run")

    run = fail(RuntimeError("no room"))
    assert run.code == 0 and "The time cannot be told beforehand: no room" in run.stderr
    with pytest.raises(AttributeError, match="a fault of ours"):
        fail(AttributeError("a fault of ours"))


def test_the_disk_that_is_expected_is_what_is_written(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", shard="2MB", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    asked = ("prune", source, "--intermediate-size", "256", *BY_MAGNITUDE)
    said = expected(*asked, "--dry-run")
    assert run_cli(*asked, "--output", tmp_path / "out").code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert said["disk_bytes"] == pytest.approx(written, rel=0.02)


def test_files_of_hidden_states_that_are_memory_count_as_memory(
    deep: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("prune", deep, *REQUESTS["range"], *CALIBRATED, "--calibration", text_file, "--dry-run")
    on_disk = expected(*asked)
    monkeypatch.setattr("llmprune_cli.commands.prune.estimate.job.lies_in_memory", lambda folder: True)
    in_memory = expected(*asked)
    kept = 4 * 600 * 64 * (2 * 4 + 1)  # bytes of float32, tokens, channels, places
    assert on_disk["temporary_bytes"] - in_memory["temporary_bytes"] == kept
    assert in_memory["memory_bytes"] > on_disk["memory_bytes"]


LAYER = 2 * 64 * 64 + 2 * 16 * 64 + 3 * 48 * 64 + 2 * 64  # parameters of a layer of `deep`
MADE = 3 * 48 + 3 * 64 + 6 * 64  # numbers that it makes of a token


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("magnitude", 0),
        ("range", 2 * 4 * LAYER + 4 * MADE * 600),  # both models' layers, when the result is judged
        ("taylor, not refitted", 4 * LAYER + 12 * LAYER + 3 * 4 * MADE * 600),
    ],
)
def test_where_a_gpu_computes_its_memory_is_told_apart(
    deep: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, taken: int
) -> None:
    refit = () if "--refit" in REQUESTS[name] else ("--refit", "none")
    asked = ("prune", deep, *REQUESTS[name], *refit, *CALIBRATED, "--calibration", text_file, "--dry-run")
    assert expected(*asked)["device_bytes"] == 0
    monkeypatch.setattr(estimate, "peak_memory", lambda job, on_gpu: peak_memory(job, True))
    monkeypatch.setattr(room, "BATCH_TOKENS", 600)
    assert expected(*asked)["device_bytes"] == taken
    shown = run_cli(*asked).stdout
    words = f"of memory, {taken / 2**20:.2f} MiB of GPU memory,\n"
    assert words in shown if taken else "GPU" not in shown, shown
    assert max(map(len, shown.split("To go on")[0].splitlines())) <= 80


@in_full
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process takes")
def test_the_memory_that_is_expected_is_about_what_is_taken(deep: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("prune", deep, *QUARTER, *CALIBRATED, "--calibration", text_file, "--output", tmp_path / "out", "--json")
    command = [sys.executable, "-c", OWN, *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, said = int(done.stderr.split()[-1]), json.loads(done.stdout)["estimate"]["memory_bytes"]
    assert 0.5 * taken <= said <= 3 * taken
