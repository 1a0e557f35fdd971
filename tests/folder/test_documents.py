"""Small files are written whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprune_cli.errors import OutputError
from llmprune_cli.folder.documents import UNFINISHED, replace_file


def broken() -> Iterator[bytes]:
    yield b"half"
    raise OSError(28, "No space left on device")


def test_a_file_that_cannot_be_finished_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("old")
    with pytest.raises(OutputError, match="No space left on device"):
        replace_file(tmp_path / "plan.json", broken(), "Choose another.")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


def test_folders_that_were_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        replace_file(tmp_path / "deep" / "deeper" / "plan.json", broken())
    assert not list(tmp_path.iterdir())
    replace_file(tmp_path / "deep" / "deeper" / "plan.json", [b"whole"])
    assert (tmp_path / "deep" / "deeper" / "plan.json").read_bytes() == b"whole"


def test_what_dead_runs_left_goes_and_what_others_are_writing_stays(tmp_path: Path) -> None:
    dead, alive, strange = (UNFINISHED.format(name, "0123") for name in ("a[1].json", "a[1].json", "a1.json"))
    dead += "dead"
    for name in (dead, alive, strange):
        (tmp_path / name).touch()
    for name in (dead, strange):
        os.utime(tmp_path / name, (time.time() - 10**6,) * 2)
    replace_file(tmp_path / "a[1].json", [b"{}"])
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", alive, strange}
