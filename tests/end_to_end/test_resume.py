"""Long runs: cut short and gone on with, measured once for several targets, hidden states kept in files."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.errors import OutputError
from llmprune_cli.folder.staging import claimed
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal
from support.cli import BY_MAGNITUDE, Run, run_cli
from support.full import in_full
from support.started import start
from support.stock import written_files, written_tensors
from support.tiny import save_tiny

WORK = ".out.llmprune-work"
MEASURING = "Measuring activity"
Arguments = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers enough for a search to have a choice."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=5, initializer_range=0.15)


@pytest.fixture
def calibrated(text_file: Path) -> Arguments:
    return "--calibration", text_file, "--calibration-tokens", "600", "--calibration-seq-len", "40"


def in_a_line(run: Run) -> str:
    """What went to stderr, without the line breaks that a narrow terminal makes."""
    return " ".join(run.stderr.split())


def tries(run: Run) -> int:
    """How many candidates were tried, however long each took."""
    return sum(line.startswith("Trying") and "%" not in line for line in run.stderr.splitlines())


def prune(*args: str | Path) -> Run:
    run = run_cli("prune", *args)
    assert run.code == 0, run.stderr
    return run


def kill(*args: str | Path, when: Callable[[], bool]) -> None:
    """Start `llmprune prune` in a process of its own and kill it as soon as it has come so far."""
    process = start("prune", *args)
    while not when() and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it came to its end before it could be killed"


def layers_done(work: Path) -> int:
    """How many layers a run has finished."""
    record = work / "layer.json"
    return json.loads(record.read_text())["number"] + 1 if record.exists() else 0


def interrupt_after(patched: pytest.MonkeyPatch, owner: type, method: str, times: int) -> None:
    """Press Ctrl-C as soon as the work folder has kept something so many times."""
    whole, calls = getattr(owner, method), itertools.count(1)

    def save_and_stop(*args: Any) -> None:
        whole(*args)
        if next(calls) == times:
            raise KeyboardInterrupt

    patched.setattr(owner, method, save_and_stop)


def test_a_killed_run_goes_on_to_the_same_bytes(
    calibrated: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, gone on with, stopped by Ctrl-C, gone on with to the end; layers have numbers of one and two digits."""
    source = save_tiny(tmp_path / "model", num_hidden_layers=11, initializer_range=0.15)
    options = (source, "--intermediate-size", "24", "--layers", "10", "--importance", "range", *calibrated)
    options += ("--refit", "residual")
    prune(*options, "--output", tmp_path / "whole")
    command, work = (*options, "--output", tmp_path / "out"), tmp_path / WORK
    kill(*command, when=lambda: layers_done(work) > 0)
    assert not (tmp_path / "out").exists()
    assert layers_done(work) < 11 and len(list(work.glob("streams-*"))) <= 2, "one snapshot, or its successor as well"
    with monkeypatch.context() as patched:
        interrupt_after(patched, Journal, "save_layer", 1)
        stopped = run_cli("prune", *command, "--resume")
        assert stopped.code == 130 and "--resume goes on from there" in in_a_line(stopped)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("model", "whole")] == [WORK]
    run = prune(*command, "--resume")
    assert MEASURING not in run.stderr and "Warning" not in run.stderr
    assert written_files(tmp_path / "out") == written_files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]
    new, old = written_tensors(tmp_path / "out"), written_tensors(source)
    for number, layer in enumerate(json.loads((tmp_path / "out" / "llmprune.json").read_text())["layers"]):
        if layer == 0:
            continue  # nothing is missing yet where its attention enters the stream
        reader = "model.layers.{}.self_attn.o_proj.weight"
        assert not torch.equal(new[reader.format(number)], old[reader.format(layer)]), "not written as refitted"


def test_runs_in_bfloat16_that_make_less_themselves_write_the_same_bytes(
    calibrated: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone on with behind a layer, with the plan of the first one, and with what it measured."""
    source = save_tiny(tmp_path / "model", num_hidden_layers=4, initializer_range=0.15, dtype="bfloat16")
    text = (*calibrated, "--compute-dtype", "bfloat16")
    options = (source, "--intermediate-size", "24", "--importance", "range", *text)
    kept = ("--statistics", tmp_path / "statistics")
    prune(*options, *kept, "--save-plan", tmp_path / "plan.json", "--output", tmp_path / "whole")
    expected = written_tensors(tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_after(patched, Journal, "save_layer", 2)
        assert run_cli("prune", *options, "--output", tmp_path / "resumed").code == 130
    prune(*options, "--output", tmp_path / "resumed", "--resume")
    assert MEASURING not in prune(*options, *kept, "--output", tmp_path / "remembered").stderr
    prune(source, "--plan", tmp_path / "plan.json", *text, "--output", tmp_path / "replayed")
    for name in ("resumed", "remembered", "replayed"):
        found = written_tensors(tmp_path / name)
        assert [*found] == [*expected] and all(torch.equal(found[key], own) for key, own in expected.items()), name


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.parametrize("finished", ["range", "taylor"])
def test_ctrl_c_keeps_what_was_measured(deep_llama: Path, calibrated: Arguments, tmp_path: Path, finished: str) -> None:
    """Of the ranks that are used by default, activity makes the one half and gradients the other."""
    command = (deep_llama, "--intermediate-size", "24", *calibrated, "--output", tmp_path / "out")
    errors, place = tmp_path / "errors", tmp_path / WORK / "statistics"
    process = start("prune", *command, errors=errors)
    while not list(place.glob(f"{finished}-*.safetensors")) and process.is_alive():
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, errors.read_text()
    run = prune(*command, "--resume")
    assert MEASURING not in run.stderr and ("Measuring gradients" in run.stderr) == (finished == "range")
    assert "goes on from there" in errors.read_text() and not place.exists()


def test_a_search_goes_on_without_trying_a_candidate_twice(
    deep_llama: Path, calibrated: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (deep_llama, "--target-params", "75%", *calibrated)
    whole = prune(*options, "--output", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_after(patched, Json, "write", 2)
        assert run_cli("prune", *options, "--output", tmp_path / "out").code == 130
    run = prune(*options, "--output", tmp_path / "out", "--resume")
    assert MEASURING not in run.stderr
    assert tries(run) + 2 == tries(whole) > 2
    assert written_files(tmp_path / "out") == written_files(tmp_path / "whole")


@pytest.fixture
def stopped(
    make_tiny: Callable[..., Path], calibrated: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Arguments:
    """A command that was stopped when its first layer was finished; the output is its last argument."""
    source = make_tiny(shard="10MB")
    command = (source, "--intermediate-size", "24", "--refit", "local", *calibrated, "--output", tmp_path / "out")
    with monkeypatch.context() as patched:
        interrupt_after(patched, Journal, "save_layer", 1)
        assert run_cli("prune", *command).code == 130
    return command


def test_another_run_is_not_gone_on_with(stopped: Arguments, tmp_path: Path) -> None:
    refused = run_cli("prune", *stopped, "--refit", "residual", "--seed", "5", "--resume")
    assert refused.code == 5 and "Traceback" not in refused.stderr
    for word in ("refit was local and is residual", "seed was 0 and is 5", "calibration text differs"):
        assert word in in_a_line(refused)
    assert layers_done(tmp_path / WORK) == 1, "a refusal leaves the work alone"
    assert "Replacing the work of an earlier run" in in_a_line(prune(*stopped))
    assert not (tmp_path / WORK).exists()


def test_other_weights_of_the_same_shapes_are_not_gone_on_with(stopped: Arguments) -> None:
    from safetensors.torch import load_file, save_file

    shard = Path(stopped[0], "model.safetensors")
    before, tensors = shard.stat(), load_file(shard)
    tensors["model.norm.weight"] += 1
    save_file(tensors, shard, {"format": "pt"})
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused = run_cli("prune", *stopped, "--resume")
    assert refused.code == 5 and "weights differs" in in_a_line(refused) and "model differs" not in in_a_line(refused)


def test_an_error_before_any_work_leaves_nothing(deep_llama: Path, calibrated: Arguments, tmp_path: Path) -> None:
    run = run_cli("prune", deep_llama, "--target-params", "2%", *calibrated, "--output", tmp_path / "out")
    assert run.code == 5 and not list(tmp_path.iterdir())


def test_resume_without_work_starts_at_the_beginning(tiny_llama: Path, calibrated: Arguments, tmp_path: Path) -> None:
    command = (tiny_llama, "--intermediate-size", "24", "--refit", "local", *calibrated, "--output", tmp_path / "out")
    assert "starting at the beginning" in in_a_line(prune(*command, "--resume"))


def test_two_runs_do_not_share_an_output(tiny_llama: Path, calibrated: Arguments, tmp_path: Path) -> None:
    command = (tiny_llama, "--intermediate-size", "24", "--refit", "local", *calibrated, "--output", tmp_path / "out")
    with claimed(tmp_path / "out", overwrite=False):
        run = run_cli("prune", *command)
        assert run.code == OutputError.exit_code and "Another run" in run.stderr
        assert (tmp_path / WORK).exists()
    prune(*command)


@pytest.mark.parametrize(
    "options",
    [
        [*BY_MAGNITUDE, "--intermediate-size", "24", "--output", "out", "--resume"],
        [*BY_MAGNITUDE, "--intermediate-size", "24", "--output", "out", "--offload-dir", "."],
        [*BY_MAGNITUDE, "--intermediate-size", "24", "--output", "out", "--statistics", "."],
        ["--target-params", "80%", "--dry-run", "--resume"],
    ],
)
def test_options_that_would_do_nothing_are_refused(tiny_llama: Path, options: list[str]) -> None:
    assert run_cli("prune", tiny_llama, *options).code == 2


@in_full
def test_statistics_are_measured_once_for_several_targets(
    deep_llama: Path, calibrated: Arguments, tmp_path: Path
) -> None:
    kept = ("--statistics", tmp_path / "statistics")
    first = prune(deep_llama, "--target-params", "85%", *calibrated, *kept, "--dry-run", "--json")
    assert MEASURING in first.stderr
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()}
    assert sorted(path.name.partition("-")[0] for path in files) == ["range", "taylor"]
    for target in (("--layers", "4", "--intermediate-size", "24"), ("--target-params", "60%")):
        options = (deep_llama, *target, "--importance", "range", *calibrated)
        with_store = prune(*options, *kept, "--save-plan", tmp_path / "a.json")
        without = prune(*options, "--save-plan", tmp_path / "b.json")
        assert MEASURING not in with_store.stderr and MEASURING in without.stderr
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()} == files


def test_other_text_or_importance_is_measured_anew(tiny_llama: Path, calibrated: Arguments, tmp_path: Path) -> None:
    folder = tmp_path / "statistics"
    options = (tiny_llama, "--intermediate-size", "24", "--save-plan", tmp_path / "plan.json", "--statistics", folder)
    for number, more in enumerate((("range",), ("activation",), ("range", "--seed", "3")), 1):
        assert MEASURING in prune(*options, *calibrated, "--importance", *more).stderr
        assert len(list(folder.iterdir())) == number


def test_damaged_statistics_are_measured_anew(tiny_llama: Path, calibrated: Arguments, tmp_path: Path) -> None:
    options = (tiny_llama, "--intermediate-size", "24", "--importance", "range", *calibrated)
    options += ("--statistics", tmp_path / "statistics", "--save-plan")
    prune(*options, tmp_path / "a.json")
    file = next((tmp_path / "statistics").iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    run = prune(*options, tmp_path / "b.json")
    assert "is damaged" in in_a_line(run) and MEASURING in run.stderr
    assert file.read_bytes() == whole and (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_folder_that_cannot_be_one_is_refused(
    tiny_llama: Path, calibrated: Arguments, text_file: Path, tmp_path: Path
) -> None:
    for option in ("--statistics", "--offload-dir"):
        target = ("--target-params", "80%", "--output", tmp_path / "out")
        run = run_cli("prune", tiny_llama, *target, *calibrated, option, text_file)
        assert run.code == 6 and option in run.stderr and not list(tmp_path.iterdir())


def test_hidden_states_in_files_give_the_same_bytes(
    tiny_llama: Path, calibrated: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: mapped.append(k["size"]) or from_file(*a, **k))
    options = (tiny_llama, "--intermediate-size", "24", "--importance", "range", "--refit", "residual", *calibrated)
    prune(*options, "--output", tmp_path / "a")
    assert not mapped
    prune(*options, "--output", tmp_path / "b", "--offload-dir", tmp_path / "states")
    # the stream and its copy when measuring; dense and pruned when refitting; and in each of two layers a goal, what
    # attention and MLP make, and what the readers of both are given
    states, heads, neurons = 15 * 40 * 64, 15 * 40 * 64, 15 * 40 * 48
    assert mapped[:4] == [states] * 4 and sorted(mapped[4:]) == sorted(2 * [states, states, states, heads, neurons])
    assert written_files(tmp_path / "a") == written_files(tmp_path / "b")
    assert not list((tmp_path / "states").iterdir())
