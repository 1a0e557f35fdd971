"""Where a healing that `prune --recover` begins does not come to its end, what was pruned is kept."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.commands.recover import finalists
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.heal.figures import FinalistResult
from llmprune_cli.heal.training import trainer
from llmprune_cli.report.json_results import CandidateResult
from support.cli import BY_MAGNITUDE, Run, run_cli
from support.refusals import CHECKPOINT, INTERRUPTED, assert_refused
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny

SHORT = "Too little text to learn from, but enough to look at, it seems."


def prune_and_recover(dense: Path, text: Path, output: Path) -> Run:
    return run_cli(
        *("prune", dense, *BY_MAGNITUDE, "--intermediate-pruning-ratio", "0.5", "--output", output),
        *("--recover", "2048", "--calibration", text, "--calibration-seq-len", "32"),
    )


def test_an_interrupted_healing_leaves_the_pruned_model_and_says_how_to_go_on(
    dense: Path, pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "mark_whole", interrupted)
        run = prune_and_recover(dense, text_file, tmp_path / "out")
    assert run.code == INTERRUPTED and "--resume" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out-pruned"]
    kept, expected = (written_tensors(folder) for folder in (tmp_path / "out-pruned", pruned))
    assert kept.keys() == expected.keys() and all(own.equal(expected[name]) for name, own in kept.items())
    assert run_cli("inspect", tmp_path / "out-pruned", "--verify").code == 0
    said = " ".join(run.stderr.replace("\n", " ").split())
    words = shlex.split(said.partition("goes on from there: llmprune ")[2].partition(" Interrupted")[0])
    assert words[:4] == ["recover", str(tmp_path / "out-pruned"), "--tokens", "2048"]
    assert {"--text", str(text_file), "--seq-len", "32"} <= {*words} and "--overwrite" not in words
    assert run_cli(*words).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-pruned"]


def test_of_finalists_the_best_one_so_far_is_left(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", initializer_range=0.1, num_hidden_layers=4)
    whole = finalists._heal_for_a_while
    healed: list[FinalistResult] = []

    def interrupted(request: PruneRequest, candidate: CandidateResult, *others: Any) -> FinalistResult | None:
        if len(healed) == finished:
            raise KeyboardInterrupt
        found = whole(request, candidate, *others)
        assert found is not None
        healed.append(replace(found, kl_after=1.0 / (1 + len(healed))))  # each is better than the one before
        return healed[-1]

    words = ("prune", dense, "--target", "85%", "--vocab", "keep", "--recover", "1024", "--finalists", "3")
    text = ("--calibration", text_file, "--calibration-seq-len", "32", "--calibration-tokens", "512")
    for finished in (0, 2):
        healed.clear()
        output = tmp_path / f"out-{finished}"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(finalists, "_heal_for_a_while", interrupted)
            run = run_cli(*words, *text, "--output", output)
        assert run.code == INTERRUPTED and "goes on from there: llmprune recover" in run.stderr.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out-0-pruned", "out-2-pruned"]
    kept = [load_stock(tmp_path / f"out-{number}-pruned").num_parameters() for number in (0, 2)]
    assert kept == [own.parameters for own in healed] and kept[0] != kept[1]


def test_what_is_there_already_stays_and_the_error_is_the_same(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(SHORT)
    run = prune_and_recover(dense, text, tmp_path / "out")
    assert_refused(run, CHECKPOINT, "tokens to train on", "is kept in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-pruned", "short.txt"]
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "out-pruned").iterdir())
    again = prune_and_recover(dense, text, tmp_path / "out")
    assert_refused(again, CHECKPOINT, "tokens to train on")
    assert "is kept in" not in again.stderr and "could not be kept" in again.stderr and "out-pruned" in again.stderr
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "out-pruned").iterdir()) == before
