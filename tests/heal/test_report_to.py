"""Every loss of a training is told to TensorBoard or trackio, where that is asked for and there."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from llmprune_cli.heal import options
from llmprune_cli.heal.training import reporters
from support.cli import Run
from support.heal_runs import QUICK, interrupt_at, recover, run_recover
from support.refusals import INTERRUPTED, OUTPUT, UNSUPPORTED, USAGE, assert_refused

needs_trackio = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboardX") is None, reason="tensorboardX is not installed")


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of what was told; a record is its length in 8 bytes, 4 of a checksum, itself, and 4 more."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.*")
    left = path.read_bytes()
    while left:
        (length,) = struct.unpack("<Q", left[:8])
        event, left = Event.FromString(left[12 : 12 + length]), left[16 + length :]
        yield from ((own.tag, event.step, own.simple_value) for own in event.summary.value if own.simple_value)


@needs_tensorboard
def test_tensorboard_is_told_every_loss(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    result = recover(pruned, text_file, tmp_path / "out", "--report-to", "tensorboard")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-runs"]
    told = list(scalars(tmp_path / "out-runs"))
    losses = {step: value for name, step, value in told if name == "train/loss"}
    assert [*losses] == [*range(1, result["steps"] + 1)] and losses[result["steps"]] < losses[1]
    judged = {name: value for name, _, value in told if name.startswith("eval/")}
    assert judged["eval/kl"] == pytest.approx(result["curve"][-1]["held_out"]["kl"], rel=1e-6)
    assert {"eval/perplexity", "eval/bits_per_byte"} <= judged.keys()


def kept_by_trackio(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What it was told of each run."""
    found: dict[str, list[dict[str, float]]] = {}
    with closing(sqlite3.connect(folder / "llmprune.db")) as database:
        for run, metrics in database.execute("SELECT run_name, metrics FROM metrics ORDER BY id"):
            found.setdefault(run, []).append(json.loads(metrics))
    return found


@needs_trackio
def test_trackio_is_told_every_loss_of_one_run_until_its_end(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    """In processes of their own, since it takes its folder from when it is loaded."""
    kept = tmp_path / "kept"
    command = (sys.executable, "-m", "llmprune_cli", "recover", pruned, "--text", text_file, *QUICK, "--report-to")
    words = [*map(str, command), "trackio", "--output", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "TRACKIO_DIR": str(kept)}

    def healed(*options: str) -> dict[str, Any]:
        run = subprocess.run([*words, *options], capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0 and "trackio show --project" in run.stderr, run.stderr
        result: dict[str, Any] = json.loads(run.stdout)  # it writes to stdout itself
        return result

    result = healed()
    ((name, told),) = kept_by_trackio(kept).items()
    assert re.fullmatch(r"out \d{4}-\d\d-\d\d \d\d:\d\d [0-9a-f]{4}", name)
    losses = [own["train/loss"] for own in told if "train/loss" in own]
    assert len(losses) == result["steps"] and losses[-1] < losses[0]
    judged = [own["eval/kl"] for own in told if "eval/kl" in own]
    assert judged == pytest.approx([own["held_out"]["kl"] for own in result["curve"]])
    healed("--overwrite")
    assert [len(own) for own in kept_by_trackio(kept).values()] == 2 * [len(told)]
    environment |= {"TRACKIO_SPACE_ID": "someone/somewhere", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*words, "--overwrite"], capture_output=True, text=True, env=environment, timeout=300)
    assert_refused(
        Run(run.returncode, run.stdout, run.stderr), OUTPUT, "trackio cannot begin a run", "TRACKIO_SPACE_ID"
    )


@needs_trackio
def test_a_run_of_trackio_ends_with_the_training_and_is_copied_nowhere(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio

    told, kept = list[str](), list[Any]()

    class Noting(reporters._Trackio):
        def setup(self, args: Any, *others: Any, **named: Any) -> None:
            kept.append((args.trackio_static_space_id, args.hub_private_repo))
            self._initialized = True

        def on_log(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(trackio, "finish", lambda: told.append("finished"))
    monkeypatch.setattr(reporters, "_Trackio", Noting)
    cut = run_recover(pruned, text_file, tmp_path / "out", "--report-to", "trackio")
    assert cut.code == INTERRUPTED and told == ["finished"] and kept == [(False, True)]


def test_a_run_that_goes_on_is_told_by_the_name_that_it_began_with(
    pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    names = list[str]()

    class Noting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            names.append(args.run_name)

    asked = ("--report-to", "tensorboard", "--tokens", "4096")  # of two judgements
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(options, "find_spec", lambda name: True)
        patched.setattr(reporters.Reports, "begin", lambda _: Noting())
        with pytest.MonkeyPatch.context() as cut:
            interrupt_at(cut, 16, True)
            assert run_recover(pruned, text_file, tmp_path / "out", *asked).code == INTERRUPTED
        recover(pruned, text_file, tmp_path / "out", *asked, "--resume")
    assert len(names) == 2 and names[0] == names[1]


def test_what_cannot_be_told_is_refused(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--report-to", "tensorboard")
    blocks = run_recover(pruned, text_file, tmp_path / "out", *asked, "--mode", "blocks")
    assert_refused(blocks, USAGE, "--report-to", "--mode blocks")
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    missing = run_recover(pruned, text_file, tmp_path / "out", *asked)
    assert_refused(missing, UNSUPPORTED, "--report-to tensorboard", "pip install tensorboard")
    missing = run_recover(pruned, text_file, tmp_path / "out", "--report-to", "trackio")
    assert_refused(missing, UNSUPPORTED, "--report-to trackio", "pip install trackio")
    assert not [*tmp_path.iterdir()]
