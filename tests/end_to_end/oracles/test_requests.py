"""Random small models and requests: what is legal is done right, what is not is refused with the legal values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.cli import BY_MAGNITUDE, run_cli
from support.families import FAMILIES, SIZES, TRIED_SLOWLY, model_type
from support.stock import load_stock
from support.tiny import save_tiny

PLAN = 5
HIDDEN_IS_HEADS = ("gpt2", "gpt_neox", "opt", "falcon", "stablelm", "olmoe", "biogpt", "helium")
HIDDEN_IS_MULTIPLE = ("llama", "gemma2", "gemma3_text", "vaultgemma")
OPTIONS = {
    "hidden_size": "--hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_key_value_heads": "--num-key-value-heads",
    "intermediate_size": "--intermediate-size",
    "moe_intermediate_size": "--moe-intermediate-size",
    "num_experts": "--experts",
    "num_hidden_layers": "--layers",
}


def is_legal(family: str, width: str, size: int, widths: dict[str, int]) -> bool:
    """The rules in the words of this file."""
    heads, groups = widths["num_attention_heads"], widths["num_key_value_heads"]
    if size > widths[width]:
        return False
    if width == "num_attention_heads":
        return size % groups == 0 or groups == heads
    if width == "num_experts":
        if family == "deepseek_v3":  # two groups of experts, of which one is picked by its two best
            return size >= 4 and size % 2 == 0
        return size >= 2
    experts = bool(widths["num_experts"])
    if width == "hidden_size":
        if family in HIDDEN_IS_HEADS:
            return size % (widths["head_dim"] * (1 if heads == groups else groups)) == 0
        if family in HIDDEN_IS_MULTIPLE:
            return size % heads == 0
        return not experts or size % 8 == 0
    own = "moe_intermediate_size" if widths["moe_intermediate_size"] else "intermediate_size"
    return width != own or not experts or size % 8 == 0 or size == widths[width]


@pytest.mark.parametrize("family", [family for family in TRIED_SLOWLY if family != "phi3-partial"])
@settings(max_examples=2, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_request_is_met_exactly_or_refused_with_the_legal_values(family: str, data: st.DataObject) -> None:
    kind = model_type(family)
    options: dict[str, Any] = {**SIZES, **FAMILIES[family]}
    if not options.get("num_key_value_heads") and kind not in ("gpt2", "opt", "gpt_neox", "falcon", "biogpt"):
        options["num_key_value_heads"] = data.draw(st.sampled_from([1, 2, 4, 8]), "KV heads")
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name, "model"), Path(name, "out")
        save_tiny(folder, kind, **options)
        before = json.loads(run_cli("inspect", folder, "--json").stdout)
        widths, prunable = before["before"]["widths"], before["prunable"]
        free = [w for w in OPTIONS if w in prunable and not prunable[w].startswith("no: ")]
        width = data.draw(st.sampled_from(free), "width")
        size = data.draw(st.integers(1, widths[width] + 1), "size")
        run = run_cli("prune", folder, *BY_MAGNITUDE, OPTIONS[width], str(size), "--output", out, "--json")
        if not is_legal(kind, width, size, widths):
            assert run.code == PLAN and "egal values" in run.stderr and not out.exists(), (width, size, run.stderr)
            return
        if size == widths[width]:
            assert run.code == PLAN and "Nothing would go" in run.stderr and not out.exists(), (width, size, run.stderr)
            return
        assert run.code == 0, (width, size, run.stderr)
        after = json.loads(run.stdout)["after"]
        assert after["widths"][width] == size
        model = load_stock(out)
        stored = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
        assert sum(stored.values()) == after["parameters"]
