"""Every loss of a training is told to TensorBoard, where that is asked for and there."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmprune_cli.heal import options
from support.heal_runs import recover, run_recover
from support.refusals import UNSUPPORTED, USAGE, assert_refused

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


def test_what_cannot_be_told_is_refused(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--report-to", "tensorboard")
    blocks = run_recover(pruned, text_file, tmp_path / "out", *asked, "--mode", "blocks")
    assert_refused(blocks, USAGE, "--report-to", "--mode blocks")
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    missing = run_recover(pruned, text_file, tmp_path / "out", *asked)
    assert_refused(missing, UNSUPPORTED, "--report-to tensorboard", "pip install tensorboard")
    assert not [*tmp_path.iterdir()]
