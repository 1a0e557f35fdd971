"""The Peer oracle: where torch-pruning is right, the same units go, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.stock import written_tensors

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pruning_ratio", examples([0.5, 0.25], [0.5]))
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
