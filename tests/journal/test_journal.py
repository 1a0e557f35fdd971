"""The journal: what was made once is not made again, and what is damaged is not believed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.documents import replace_file
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import WORK_PER_RECORD, Journal


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


def test_hidden_states_are_recorded_where_that_takes_little_beside_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record takes two seconds: the next one is worth it when WORK_PER_RECORD times as many have gone."""
    now, streams = [1000.0], (torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slowly(path: Path, parts: Iterable[Any]) -> None:
        now[0] += 1
        replace_file(path, parts)

    monkeypatch.setattr("llmprune_cli.journal.journal.replace_file", slowly)
    journal, found = Journal(folder=tmp_path), []
    for number, seconds in enumerate((0, 2 * WORK_PER_RECORD - 1, 1, 1)):
        now[0] += seconds
        journal.save_layer(number, [{"layer": number}], streams)
        found.append(journal.last_layer(streams))
    recorded = [number for number, _ in filter(None, found)]
    assert recorded == [0, 0, 2, 2] and found[-1] == (2, [{"layer": 2}])
    assert len([*tmp_path.glob("streams-*")]) == 1
    journal.save_layer(4, [], streams, is_last=True)
    assert journal.last_layer(streams) == (4, [])
