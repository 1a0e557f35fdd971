"""Layers that take the keys and values of others keep the groups that these keep."""

from __future__ import annotations

import json
from pathlib import Path

from support.cli import BY_CHANCE, run_cli
from tools.families import families
from tools.families.oracle import difference

PLAN = 5


def test_kv_groups_stay_where_layers_take_them_from_others_and_query_heads_go(tmp_path: Path) -> None:
    model, out, plan = (tmp_path / name for name in ("model", "out", "plan.json"))
    assert not families.build("gemma3n_text", model)
    run = run_cli("inspect", model, "--json")
    assert run.code == 0, run.stderr
    prunable = json.loads(run.stdout)["prunable"]
    assert prunable["num_key_value_heads"].startswith("no: layers take the keys and values of others")
    run = run_cli("prune", model, *BY_CHANCE, "--num-key-value-heads", "1", "--output", out)
    assert run.code == PLAN and "keep the same groups" in run.stderr and not out.exists(), run.stderr
    options = ["--num-attention-heads", "4", "--layers", "7"]
    run = run_cli("prune", model, *BY_CHANCE, *options, "--save-plan", plan, "--output", out)
    assert run.code == 0, run.stderr
    assert difference(model, out, plan) < families.TOLERANCE
