"""Units by the size of their weights, and by chance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.cli import BY_CHANCE, BY_MAGNITUDE, run_cli
from support.stock import written_tensors


def test_removed_experts_leave_the_best_by_magnitude(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_of("mixtral")
    run = run_cli(
        "prune", folder, *BY_MAGNITUDE, "--experts", "3", "--save-plan", tmp_path / "plan", "--output", tmp_path / "out"
    )
    assert run.code == 0, run.stderr
    chosen = json.loads((tmp_path / "plan").read_text())["keep"]["num_experts"]
    dense, pruned = written_tensors(folder), written_tensors(tmp_path / "out")
    for layer in range(4):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        norms = [
            sum(dense[f"{prefix}.experts.{e}.{name}.weight"].square().sum() for name in ("w1", "w2", "w3"))
            + dense[f"{prefix}.gate.weight"][e].square().sum()
            for e in range(6)
        ]
        assert chosen[str(layer)] == sorted(torch.stack(norms).argsort()[3:].tolist())
        assert torch.equal(pruned[f"{prefix}.gate.weight"], dense[f"{prefix}.gate.weight"][chosen[str(layer)]])
        for new, old in enumerate(chosen[str(layer)]):
            assert torch.equal(pruned[f"{prefix}.experts.{new}.w2.weight"], dense[f"{prefix}.experts.{old}.w2.weight"])


def test_random_importance_follows_its_seed(tiny_llama: Path, tmp_path: Path) -> None:
    def kept(seed: int) -> Any:
        path = tmp_path / f"plan-{seed}.json"
        run = run_cli(
            "prune", tiny_llama, "--pruning-ratio", "0.5", *BY_CHANCE, "--seed", str(seed),
            "--dry-run", "--save-plan", path,
        )  # fmt: skip
        assert run.code == 0, run.stderr
        return json.loads(path.read_text())["keep"]

    assert kept(1) == kept(1) != kept(2)


def test_squares_that_float16_cannot_hold_are_scored_in_float32(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Weights that are times 2,048, whose squares are beyond 65,504, rank as they did."""
    folder, plans = make_tiny(dtype="float32", shard="10MB"), []
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    for number, factor, dtype in ((0, 1, torch.float32), (1, 2048, torch.float16)):
        saved = {name: (factor * tensor).to(dtype) for name, tensor in tensors.items()}
        save_file(saved, folder / "model.safetensors", {"format": "pt"})
        plan, request = tmp_path / f"{number}.json", ("--pruning-ratio", "0.5")
        assert run_cli("prune", folder, *BY_MAGNITUDE, *request, "--dry-run", "--save-plan", plan).code == 0
        plans.append(json.loads(plan.read_text())["keep"])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (9, 3), (14, 2), (28, 4)])
@pytest.mark.parametrize("pruning_ratio", [1 / 3, 0.5])
def test_grouped_query_heads_go_evenly_by_the_formula_on_their_own_rows(
    make_tiny: Callable[..., Path], tmp_path: Path, heads: int, groups: int, pruning_ratio: float
) -> None:
    head_dim, per_group = 8, heads // groups
    folder = make_tiny(
        "qwen2", num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim, hidden_size=heads * head_dim
    )
    run = run_cli(
        "prune", folder, *BY_MAGNITUDE, "--head-pruning-ratio", str(pruning_ratio), "--output", tmp_path / "out"
    )
    assert run.code == 0, run.stderr
    dense, pruned = written_tensors(folder), written_tensors(tmp_path / "out")
    removed = math.ceil(math.ceil(pruning_ratio * heads) / groups)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        rows = dense[prefix + "q_proj.weight"].view(heads, -1).square().sum(1)
        columns = dense[prefix + "o_proj.weight"].T.reshape(heads, -1).square().sum(1)
        by_group = (rows + columns).view(groups, per_group)
        kept = [
            group * per_group + head
            for group in range(groups)
            for head in sorted(by_group[group].argsort()[removed:].tolist())
        ]
        query = dense[prefix + "q_proj.weight"].view(heads, head_dim, -1)[kept].flatten(0, 1)
        output = dense[prefix + "o_proj.weight"].view(-1, heads, head_dim)[:, kept].flatten(1)
        assert torch.equal(pruned[prefix + "q_proj.weight"], query)
        assert torch.equal(pruned[prefix + "o_proj.weight"], output)
        assert torch.equal(pruned[prefix + "k_proj.weight"], dense[prefix + "k_proj.weight"])
