"""Outputs that overlap the input, hold something or cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import OUTPUT, assert_prune_refused, assert_refused, state_of


@pytest.mark.parametrize(
    "command", [["prune", *BY_MAGNITUDE, "--pruning-ratio", "0.5"], ["export"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_an_output_that_overlaps_the_input(model: Path, tmp_path: Path, command: list[str], place: str) -> None:
    before = state_of(tmp_path)
    run = run_cli(command[0], model, *command[1:], "--output", model / place, "--overwrite")
    assert_refused(run, OUTPUT, "overlap")
    assert state_of(tmp_path) == before


def test_an_output_that_holds_something(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert_prune_refused(model, tmp_path, OUTPUT, "not empty")
    assert_prune_refused(
        model, tmp_path, OUTPUT, "not a model folder", options=("--pruning-ratio", "0.5", "--overwrite")
    )


def test_an_output_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert_prune_refused(model, tmp_path, OUTPUT, "is not a folder")


def test_overwrite_replaces_a_model_folder(model: Path, tmp_path: Path) -> None:
    options = ["--intermediate-size", "24", "--output", tmp_path / "out"]
    assert run_cli("prune", model, *BY_MAGNITUDE, *options).code == 0
    first = state_of(tmp_path / "out")
    assert_refused(run_cli("prune", model, *BY_MAGNITUDE, *options), OUTPUT, "--overwrite")
    assert run_cli("prune", model, *BY_MAGNITUDE, *options, "--overwrite").code == 0
    assert state_of(tmp_path / "out") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_output_on_a_read_only_folder(model: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        if not Path("/proc/self").exists():
            pytest.skip("root can write everywhere on this system")
        target = Path("/proc/llmprune-out")
    else:
        target = tmp_path / "closed" / "out"
        target.parent.mkdir(mode=0o500)
    for command in (["prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5"], ["export", model]):
        assert_refused(run_cli(*command, "--output", target), OUTPUT, "Cannot write")
