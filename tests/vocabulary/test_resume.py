"""A run that lets tokens go is gone on with like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal
from support.cli import Run, run_cli
from support.full import in_full
from support.gguf_exports import tiny
from support.refusals import PLAN, assert_refused
from support.stock import written_files

RANKING = "Ranking tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "model", "llama", num_hidden_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def options(model: Path, text: Path, tmp_path: Path) -> tuple[str | Path, ...]:
    sizes = ("--calibration-seq-len", "40", "--calibration-tokens", "400", "--vocab-text", tmp_path / "used.txt")
    (tmp_path / "used.txt").write_text("tokens that are used here\n" * 40)
    return (model, "--mlp", "50%", "--refit", "local", "--vocab", "320", "--calibration", text, *sizes)


def stop_after(patched: pytest.MonkeyPatch, owner: type, method: str, counts: Callable[..., bool]) -> None:
    """Press Ctrl-C when something has been kept."""
    whole = getattr(owner, method)

    def keep_and_stop(*args: Any) -> None:
        whole(*args)
        if counts(*args):
            raise KeyboardInterrupt

    patched.setattr(owner, method, keep_and_stop)


def prune(*args: str | Path) -> Run:
    run = run_cli("prune", *args)
    assert run.code == 0, run.stderr
    return run


def test_a_run_that_was_cut_short_keeps_the_same_tokens(
    options: tuple[str | Path, ...], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone on with, it ranks none anew; with other tokens in mind, it is another run."""
    with monkeypatch.context() as patched:
        stop_after(patched, Journal, "save_layer", lambda *_: True)
        assert run_cli("prune", *options, "--output", tmp_path / "out").code == 130
    command = (*options, "--output", tmp_path / "out", "--resume")
    keep = tmp_path / "keep.txt"
    keep.write_text("375\n")
    refused = run_cli("prune", *command, "--vocab-text", text, "--keep-tokens", keep)
    assert_refused(refused, PLAN, "vocabulary text differs", "tokens that must stay differs")
    run = prune(*command)
    assert RANKING not in run.stderr and "starting at the beginning" not in run.stderr
    prune(*options, "--output", tmp_path / "whole")
    assert written_files(tmp_path / "out") == written_files(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 320


@in_full
def test_a_search_for_tokens_goes_on_where_it_was(
    model: Path, options: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*options[:1], "--target", "88%", "--vocab", "auto", *options[7:])
    with monkeypatch.context() as patched:
        stop_after(patched, Json, "write", lambda _, path, value: path.name.startswith("judged-384"))
        assert run_cli("prune", *options, "--output", tmp_path / "out").code == 130
    run = prune(*options, "--output", tmp_path / "out", "--resume")
    assert RANKING not in run.stderr and "Trying 384 tokens" not in run.stderr and "Trying 320 tokens" in run.stderr
    prune(*options, "--output", tmp_path / "whole")
    assert written_files(tmp_path / "out") == written_files(tmp_path / "whole")
