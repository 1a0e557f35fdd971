"""The Peer oracle: where torch-pruning is right, the same units go, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import BY_MAGNITUDE, run_cli

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")  # RMSNorm: pruned as it should be
DTYPES = ("float32", "bfloat16", "float16")


def prune_as_the_example_does(folder: Path, pruning_ratio: float, dtype: str) -> dict[str, torch.Tensor]:
    """The reference example's set-up of torch-pruning's own pruner, without rounding and with the cache off."""
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    num_heads: dict[Any, int] = {}
    fused: dict[Any, int] = {}
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            if hasattr(module, "q_proj"):
                num_heads[module.q_proj] = model.config.num_attention_heads
                num_heads[module.k_proj] = model.config.num_key_value_heads
                num_heads[module.v_proj] = model.config.num_key_value_heads
            else:
                num_heads[module.qkv_proj] = model.config.num_attention_heads
        if hasattr(module, "gate_up_proj"):
            fused[module.gate_up_proj] = 2
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.randint(0, model.config.vocab_size, (1, 16)),
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=pruning_ratio,
        ignored_layers=[model.lm_head],
        num_heads=num_heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=pruning_ratio,
        out_channel_groups=fused,
        output_transform=lambda output: output.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def written_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors.update(load_file(shard))
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pruning_ratio", [0.5, 0.25])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("phi3", False)], ids=["llama", "llama-tied", "phi3"]
)
def test_prune_writes_what_torch_pruning_leaves(
    make_tiny: Callable[..., Path], tmp_path: Path, family: str, tied: bool, pruning_ratio: float, dtype: str
) -> None:
    folder = make_tiny(
        family, dtype=dtype, num_key_value_heads=8, hidden_size=96, intermediate_size=160, tie_word_embeddings=tied
    )
    expected = prune_as_the_example_does(folder, pruning_ratio, dtype)
    run = run_cli("prune", folder, *BY_MAGNITUDE, "--pruning-ratio", str(pruning_ratio), "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    written = written_tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


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
