"""Texts that are missing, too short or unreadable, and models without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import run_cli
from support.refusals import CHECKPOINT, assert_prune_refused, assert_refused


def test_an_unknown_dataset(model: Path, tmp_path: Path) -> None:
    assert_refused(run_cli("eval", model, "--dataset", "no/such-dataset"), CHECKPOINT, "no/such-dataset")
    options = ("--pruning-ratio", "0.5", "--eval", "--dataset", "no/such-dataset")
    assert_prune_refused(model, tmp_path, CHECKPOINT, "no/such-dataset", options=options)


def test_a_text_shorter_than_one_window(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert_refused(run_cli("eval", model, "--dataset", text), CHECKPOINT, "9 tokens", "--max-seq-len")
    options = ("--pruning-ratio", "0.5", "--eval", "--dataset", str(text))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "9 tokens", options=options)


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"\xff\xfe\xff"), ("a.parquet", b"no"), ("a.docx", b"PK")])
def test_a_text_that_cannot_be_read(model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(run_cli("eval", model, "--dataset", tmp_path / name), CHECKPOINT, name)


def test_a_model_without_tokenizer(model: Path, text_file: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()
    assert_refused(run_cli("eval", model, "--dataset", text_file), CHECKPOINT, "tokenizer")
