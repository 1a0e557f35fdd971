"""Widths that cannot be and options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli import run_cli
from support.refusals import PLAN, USAGE, assert_prune_refused, assert_refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-attention-heads", "5"), ("Legal values: 2, 4, 6, 8",)),
        (("--num-attention-heads", "10"), ("1 to 8",)),
        (("--num-key-value-heads", "3"), ("1 to 2",)),
        (("--hidden-size", "65"), ("1 to 64",)),
        (("--intermediate-size", "1000"), ("1 to 48",)),
        (("--intermediate-pruning-ratio", "0.99"), ("intermediate_size",)),
        (("--pruning-ratio", "0.5", "--round-to", "100"), ("100",)),
    ],
)
def test_infeasible_widths_name_the_legal_ones(
    model: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_prune_refused(model, tmp_path, PLAN, *words, options=options)


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5", "nan", "inf", "half"])
@pytest.mark.parametrize("option", ["--pruning-ratio", "--head-pruning-ratio"])
def test_a_ratio_that_is_no_fraction(model: Path, tmp_path: Path, option: str, ratio: str) -> None:
    assert_prune_refused(model, tmp_path, USAGE, option, options=(option, ratio))


@pytest.mark.parametrize("option", ["--hidden-size", "--intermediate-size", "--num-attention-heads", "--round-to"])
def test_a_size_below_one(model: Path, tmp_path: Path, option: str) -> None:
    assert_prune_refused(model, tmp_path, USAGE, option, options=(option, "0"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["prune", "MODEL"],
        ["prune", "MODEL", "--pruning-ratio", "0.5"],
        ["prune", "MODEL", "--output", "out"],
        ["prune", "MODEL", "--pruning-ratio", "0.5", "--dry-run", "--eval"],
        ["prune", "MODEL", "--pruning-ratio", "0.5", "--plan", "plan.json", "--output", "out"],
        ["prune", "MODEL", "--plan", "plan.json", "--round-to", "8", "--output", "out"],
        ["prune", "MODEL", "--pruning-ratio", "0.5", "--output", "out", "--importance", "vibes"],
        ["eval", "MODEL", "--device", "tpu"],
        ["eval", "MODEL", "--max-seq-len", "1"],
        ["eval", "MODEL", "--dtype", "int8"],
        ["export", "MODEL"],
        ["export", "MODEL", "--output", "out", "--format", "papyrus"],
        ["frobnicate"],
    ],
)
def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run_cli(*arguments), USAGE)
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_no_size(model: Path, tmp_path: Path) -> None:
    """Malformed sizes are wrong usage, whichever option has them."""
    for option in ("--max-shard-size", "--target-size"):
        asked = ("--pruning-ratio", "0.5") if option == "--max-shard-size" else ()
        assert_prune_refused(model, tmp_path, USAGE, "5QB", options=(*asked, option, "5QB"))
