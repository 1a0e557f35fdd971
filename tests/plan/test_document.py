"""A plan that was saved can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.cli import BY_CHANCE, BY_MAGNITUDE, run_cli


def test_replaying_a_plan_writes_the_same_bytes(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    plan, model = tmp_path / "plan.json", tiny_of("qwen2_moe")
    first = run_cli(
        "prune", model, "--pruning-ratio", "0.5", "--experts", "3", "--layers", "3", *BY_CHANCE,
        "--seed", "3", "--save-plan", plan, "--output", tmp_path / "a",
    )  # fmt: skip
    second = run_cli("prune", model, *BY_MAGNITUDE, "--plan", plan, "--output", tmp_path / "b")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        if name != "llmprune.json":
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
