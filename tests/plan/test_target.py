"""Which widths and layers a request means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.cli import BY_MAGNITUDE, run_cli


def test_a_model_without_attention_has_no_heads_to_prune(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli("prune", tiny_of("mamba"), *BY_MAGNITUDE, "--num-attention-heads", "2", "--output", tmp_path / "out")
    assert run.code == 5 and "has no attention heads" in run.stderr


def test_a_width_that_cannot_change_alone_is_refused_with_the_rule(
    tiny_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_cli("prune", tiny_of("mamba2"), *BY_MAGNITUDE, "--hidden-size", "32", "--output", tmp_path / "out")
    assert run.code == 5 and "hidden_size * expand" in run.stderr
    run = run_cli(
        "prune", tiny_of("granitemoehybrid"), *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--output", tmp_path / "out"
    )
    assert run.code == 0 and "hidden_size stays 64" in run.stderr


def test_layers_by_number_leave_the_first_and_the_last(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli(
        "prune", tiny_of("qwen3"), *BY_MAGNITUDE, "--layers", "2", "--save-plan", tmp_path / "plan", "--dry-run"
    )
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "plan").read_text())["layers"] == [0, 3]
