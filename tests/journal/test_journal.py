"""The journal: what was made once is not made again, and what is damaged is not believed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmprune_cli.errors import CheckpointError
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal


@dataclass(frozen=True)
class Pair:
    """Something to remember."""

    numbers: tuple[int, ...]
    names: dict[str, float]


def never() -> Pair:
    raise AssertionError("it is known already")


def test_what_was_made_once_is_remembered(tmp_path: Path) -> None:
    journal, pair = Journal(folder=tmp_path), Pair((3, 1), {"loss": math.inf})
    assert journal.recall("pair", Json(Pair), lambda: pair) is pair
    assert Journal(folder=tmp_path).recall("pair", Json(Pair), never) == pair
    assert Journal(folder=tmp_path).recall("other", Json(Pair), lambda: Pair((), {})) == Pair((), {})


def test_nothing_is_kept_without_a_folder() -> None:
    made = []
    for _ in range(2):
        Journal().recall("pair", Json(int), lambda: made.append(1) or 5)  # type: ignore[func-returns-value]
    assert len(made) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"numbers": ["3"], "names": {}}', '{"numbers": [3], "names": {}'])
def test_a_damaged_record_of_a_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "pair.json").write_text(content)
    with pytest.raises(CheckpointError, match="Leave out --resume"):
        Journal(folder=tmp_path).recall("pair", Json(Pair), never)


def test_a_damaged_measurement_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, key = Journal(statistics=tmp_path), {"kind": "range", "text": "abc"}
    journal.recall_measured(key, Json(int), lambda: 5)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("range-")
    file.write_text("5, or so")
    assert journal.recall_measured(key, Json(int), lambda: 6) == 6 and "is damaged" in caplog.text
    assert journal.recall_measured({**key, "text": "abd"}, Json(int), lambda: 7) == 7
    assert len(list(tmp_path.iterdir())) == 2


def test_what_fails_while_it_is_made_is_no_damaged_record(tmp_path: Path) -> None:
    def fail() -> int:
        raise ValueError("not of the record")

    with pytest.raises(ValueError, match="not of the record"):
        Journal(folder=tmp_path).recall("rows", Json(int), fail)
