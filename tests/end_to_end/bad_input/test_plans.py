"""Plans of other models, plans that contradict themselves, and plans that cannot be saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import CHECKPOINT, OUTPUT, PLAN, assert_prune_refused, edit_json, state_of


def test_a_plan_made_for_another_model(model: Path, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert (
        run_cli("prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--save-plan", tmp_path / "plan.json").code
        == 0
    )
    other = make_tiny("llama", intermediate_size=56)
    assert_prune_refused(
        other, tmp_path, PLAN, "made for another model", options=("--plan", str(tmp_path / "plan.json"))
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("keep"),
        lambda plan: plan.update(plan_version=99),
        lambda plan: plan["keep"]["hidden_size"].update({"": [0, 1]}),
        lambda plan: plan["keep"]["hidden_size"].update({"": list(range(40, 72))}),
        lambda plan: plan["keep"].pop("intermediate_size"),
        lambda plan: plan["keep"]["intermediate_size"].pop("1"),
        lambda plan: plan["after"].update(hidden_size="wide"),
        lambda plan: plan.update(surprise=1),
    ],
)
def test_a_plan_that_contradicts_itself(
    model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "plan.json"
    assert run_cli("prune", model, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--save-plan", path).code == 0
    edit_json(path, change)
    before = state_of(tmp_path)
    run = run_cli("prune", model, *BY_MAGNITUDE, "--plan", path, "--output", tmp_path / "out")
    assert run.code in (CHECKPOINT, PLAN), run.stderr
    assert "Error: " in run.stderr and state_of(tmp_path) == before


@pytest.mark.parametrize(
    ("family", "option", "width", "kept"),
    [
        ("llama", "--num-key-value-heads", "num_attention_heads", [0, 1, 4, 5]),  # half of them of a group that goes
        ("deepseek_v3", "--experts", "num_experts", [0, 1, 2, 4]),  # three of one group of the router
    ],
)
def test_a_plan_whose_units_lie_in_other_groups(
    tiny_of: Callable[[str], Path], tmp_path: Path, family: str, option: str, width: str, kept: list[int]
) -> None:
    """By numbers alone nothing is wrong, and it would be another model."""
    path, count = tmp_path / "plan.json", "1" if family == "llama" else "4"
    planned = run_cli("prune", tiny_of(family), *BY_MAGNITUDE, option, count, "--save-plan", path, "--dry-run")
    assert planned.code == 0, planned.stderr
    edit_json(path, lambda plan: plan["keep"][width].update(dict.fromkeys(plan["keep"][width], kept)))
    before = state_of(tmp_path)
    run = run_cli("prune", tiny_of(family), *BY_MAGNITUDE, "--plan", path, "--output", tmp_path / "out")
    assert run.code in (CHECKPOINT, PLAN) and "contradicts itself: keep." in run.stderr
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("option", ["--save-plan", "--save-config"])
def test_a_plan_that_would_lie_in_the_output(model: Path, tmp_path: Path, option: str) -> None:
    """Which has to be empty in the end, hours later."""
    words = ("--pruning-ratio", "0.5", option, str(tmp_path / "out" / "own.json"))
    assert_prune_refused(model, tmp_path, OUTPUT, option, "beside it", options=words)


def test_a_plan_that_cannot_be_saved(model: Path, tmp_path: Path) -> None:
    path = str(model / "config.json" / "plan.json")
    assert_prune_refused(
        model, tmp_path, OUTPUT, "--save-plan", options=("--pruning-ratio", "0.5", "--save-plan", path)
    )
