"""Two processes heal as one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.full import in_full
from support.heal_runs import recover, recover_in_two


@in_full
@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_two_processes_come_to_the_same(pruned: Path, text_file: Path, tmp_path: Path, mode: str) -> None:
    options = ("--teacher-mode", mode)
    one = recover(pruned, text_file, tmp_path / "one", *options)
    two = recover_in_two(pruned, text_file, tmp_path / "two", *options)
    assert two["steps"] == one["steps"]
    assert two["after"]["kl"] == pytest.approx(one["after"]["kl"], rel=0.005)
