"""Identity, Zero, Counting and Reload on files written by the command line, for every family in every width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import BY_CHANCE, BY_MAGNITUDE, run_cli
from support.families import EVERY, TRIED, model_type
from support.refusals import edit_json
from support.stock import assert_generates, load_stock, written_tensors

CUTS: dict[str, list[str]] = {
    "hidden_size": ["--hidden-size", "32"],
    "num_attention_heads": ["--num-attention-heads", "4"],
    "num_key_value_heads": ["--num-key-value-heads", "1"],
    "intermediate_size": ["--intermediate-size", "24"],
    "moe_intermediate_size": ["--moe-intermediate-size", "24"],
    "shared_expert_intermediate_size": ["--shared-expert-intermediate-size", "31"],
    "num_experts": ["--experts", "4"],
    "num_hidden_layers": ["--drop-layers", "0,2"],
    "together": ["--pruning-ratio", "0.5", "--layers", "3"],
}
# Which module reads the heads and the neurons of a layer, known without asking llmprune.
READERS: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", ".fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "biogpt": ("self_attn.out_proj", ".fc2"),
    "lfm2": ("self_attn.out_proj", "feed_forward.w2"),
    "lfm2_moe": ("self_attn.out_proj", "feed_forward.w2"),
    "mamba": ("", ("mixer.out_proj", "mixer.x_proj")),
    "bamba": ("self_attn.o_proj", "feed_forward.down_proj"),
    "falcon_h1": ("self_attn.o_proj", "feed_forward.down_proj"),
}
READS = ("self_attn.o_proj", "mlp.down_proj")
ALONE = ("llama", "mixtral")  # families whose widths `make test` prunes one by one, too


def prunable(folder: Path) -> dict[str, str]:
    """The widths of a model and their legal values, or "no: reason"."""
    run = run_cli("inspect", folder, "--json")
    assert run.code == 0, run.stderr
    return json.loads(run.stdout)["prunable"]


@pytest.mark.parametrize("family", TRIED)
def test_every_width_reloads_counts_as_planned_and_generates(
    tiny_of: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_of(family)
    legal = prunable(folder)
    for width, options in CUTS.items():
        if width != "together" and not EVERY and family not in ALONE:
            continue
        if width != "together" and (width not in legal or legal[width].startswith("no: ") or legal[width] == "1 to 1"):
            continue
        if width == "num_key_value_heads" and legal[width].startswith("1 to 1,"):
            continue
        out = tmp_path / width
        run = run_cli("prune", folder, *BY_MAGNITUDE, *options, "--output", out, "--max-shard-size", "20KB", "--json")
        assert run.code == 0, f"{width}: {run.stderr}"
        result = json.loads(run.stdout)
        assert width == "together" or result["after"]["widths"][width] < result["before"]["widths"][width]
        model = load_stock(out)
        counted = sum(tensor.numel() for tensor in written_tensors(out).values())
        assert counted == result["after"]["parameters"], width
        if width == "together":
            plan = json.loads(run_cli("inspect", folder, *options, "--json").stdout)
            assert counted == plan["after"]["parameters"]
        assert sum(parameter.numel() for parameter in model.parameters()) <= counted
        assert_generates(model)


@pytest.mark.parametrize("family", TRIED)
def test_what_nothing_reads_goes_without_a_trace(tiny_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """The Zero oracle for heads, neurons and layers, by readers that this file knows."""
    folder = tiny_of(family)
    legal = prunable(folder)
    heads, neurons = READERS.get(model_type(family), READS)
    free_heads = not legal.get("num_attention_heads", "no: ").startswith("no: ")
    free_heads &= not legal["hidden_size"].startswith("query")
    free_heads &= family not in ("olmo2", "olmo3")  # a norm over all heads feels a head that nothing reads
    cuts = {"num_hidden_layers": ["--drop-layers", "0,1" if family == "jamba" else "1"]}
    if free_heads:
        cuts["num_attention_heads"] = ["--num-attention-heads", "4"]
    shared_width = "num_experts" in legal and "moe_intermediate_size" not in legal  # see the test of experts below
    if not shared_width and not legal["intermediate_size"].startswith("no: "):
        cuts["intermediate_size"] = ["--intermediate-size", "24"]
    for width, options in cuts.items():
        plan, out = tmp_path / f"{width}.json", tmp_path / width
        run = run_cli("prune", folder, *options, "--save-plan", plan, "--output", out, *BY_CHANCE)
        assert run.code == 0, run.stderr
        keep = json.loads(plan.read_text())
        dense = load_stock(folder)
        silence(dense, width, neurons if width == "intermediate_size" else heads, keep)
        tokens = torch.randint(3, 90, (2, 20))
        with torch.no_grad():
            expected, found = dense(tokens, use_cache=False).logits, load_stock(out)(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{width}: {text}")  # noqa: B023


@torch.no_grad()
def silence(model: Any, width: str, reader: str | tuple[str, ...], plan: dict[str, Any]) -> None:
    """Zero the input columns of removed units in the module that reads them, or all of a removed layer."""
    head_dim = plan["before"]["head_dim"]
    for name, module in model.named_modules():
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        if width == "num_hidden_layers" and layer is not None and int(layer) not in plan["layers"]:
            for parameter in module.parameters():
                parameter.zero_()
        elif width != "num_hidden_layers" and name.endswith(reader):
            kept = torch.tensor(plan["keep"][width][layer])
            if width == "num_attention_heads":
                kept = (kept[:, None] * head_dim + torch.arange(head_dim)).flatten()
            weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
            removed = torch.ones(weight.shape[0], dtype=torch.bool)
            removed[kept] = False
            weight[removed] = 0


# What reads the neurons of routed experts, and along which axis of [E, …], and of experts that every token passes.
ROUTED = {"gpt_oss": ("experts.down_proj", 1)}
SHARED = ("shared_experts.down_proj.weight", "shared_expert.down_proj.weight", "shared_mlp.output_linear.weight")
ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")


@pytest.mark.parametrize("family", [family for family, options in TRIED.items() if "num_experts_per_tok" in options])
def test_experts_and_their_neurons_go_without_a_trace(
    tiny_of: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """The Zero oracle for experts: zero columns read no neuron, and a router's very negative row is never picked."""
    folder = tmp_path / "model"
    model = load_stock(tiny_of(family))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(3.0)  # then channels sum to more than zero, and equal weights see that
    model.save_pretrained(folder)
    legal = prunable(folder)
    own = "moe_intermediate_size" if "moe_intermediate_size" in legal else "intermediate_size"
    shared = ["shared_expert_intermediate_size"] if "shared_expert_intermediate_size" in legal else []
    for width in (own, *shared, "num_experts"):
        plan, out = tmp_path / f"{width}.json", tmp_path / width
        run = run_cli(
            "prune",
            folder,
            *CUTS[width],
            "--save-plan",
            plan,
            "--output",
            out,
            *BY_CHANCE,
        )
        assert run.code == 0, f"{width}: {run.stderr}"
        document = json.loads(plan.read_text())
        dense = load_stock(folder)
        silence_experts(dense, family, document["keep"][width], width, document["before"][width])
        tokens = torch.randint(3, 90, (2, 20))
        with torch.no_grad():
            expected, found = dense(tokens, use_cache=False).logits, load_stock(out)(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{width}: {text}")  # noqa: B023


@torch.no_grad()
def silence_experts(model: Any, family: str, keep: dict[str, list[int]], width: str, count: int) -> None:
    """Zero what reads the removed neurons of experts, or keep the routers from picking removed experts."""
    routed, axis = ROUTED.get(family, ("experts.down_proj", 2))
    shares_width = (*SHARED, "feed_forward.down_proj.weight") if family == "jamba" else SHARED

    def removed(key: str, size: int) -> torch.Tensor:
        gone = set(range(count)) - set(keep[key])
        return torch.tensor([index for index in range(size) if index % count in gone])

    touched = 0
    for name, weight in model.named_parameters():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        others = [key for key in keep if key.split("#")[0] == layer]
        if width == "num_experts" and name.endswith(ROUTERS):
            weight[removed(layer, count)] = -1e4
        elif width in ("intermediate_size", "moe_intermediate_size") and name.endswith(routed) and weight.ndim == 3:
            for expert, matrix in enumerate(weight):
                key = f"{layer}.{expert}" if f"{layer}.{expert}" in keep else layer
                matrix.index_fill_(axis - 1, removed(key, matrix.shape[axis - 1]), 0)
        elif width != "num_experts" and name.endswith(shares_width) and others and weight.shape[1] % count == 0:
            weight.index_fill_(1, removed(others[0], weight.shape[1]), 0)
        else:
            continue
        touched += 1
    assert touched >= len({key.split("#")[0].split(".")[0] for key in keep})


@pytest.mark.parametrize("family", TRIED)
def test_the_identity_plan_writes_the_same_bytes(tiny_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    folder = tiny_of(family)
    plan = tmp_path / "plan.json"
    asked = ("--layers", "3") if family == "mamba2" else ("--pruning-ratio", "0.5")  # which can lose layers alone
    run = run_cli("prune", folder, *BY_MAGNITUDE, *asked, "--dry-run", "--save-plan", plan)
    assert run.code == 0, run.stderr
    whole = [*range(json.loads(plan.read_text())["before"]["num_hidden_layers"])]
    edit_json(plan, lambda own: own.update(after=own["before"], keep={}, deviations=[], layers=whole))
    run = run_cli("prune", folder, "--plan", plan, "--refit", "none", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    before, after = written_tensors(folder), written_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    tokens = torch.randint(3, 90, (1, 12))
    with torch.no_grad():
        assert torch.equal(load_stock(tmp_path / "out")(tokens).logits, load_stock(folder)(tokens).logits)
