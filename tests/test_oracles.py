"""Identity, Zero, Counting and Reload on files written by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import run_cli
from test_peer import written_tensors

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-mha": {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "granite": {},
    "smollm3": {},
    "starcoder2": {},
    "cohere": {},
    "glm4": {"head_dim": 8},
    "olmo2": {},
    "stablelm": {},
    "cohere2": {},
    "mixtral": {"num_local_experts": 3},
    "gpt_neox": {"num_key_value_heads": 8},
    "phi": {},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
}
# Families whose hidden size is query heads × head dim.
HIDDEN_FOLLOWS_HEADS = ("gpt_neox", "phi", "gpt2", "opt", "falcon", "stablelm")
CUTS: dict[str, list[str]] = {
    "hidden": ["--hidden-size", "48"],
    "heads": ["--num-attention-heads", "4"],
    "groups": ["--num-key-value-heads", "1"],
    "neurons": ["--intermediate-size", "31"],
    "all": ["--pruning-ratio", "0.5"],
}


def load_stock(folder: Path) -> Any:
    """Reload strictly: no missing, unexpected or mismatched key."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_of_every_family_reloads_and_counts_as_planned(
    make_tiny: Callable[..., Path], tmp_path: Path, family: str, cut: str
) -> None:
    options = CUTS[cut]
    if cut == "hidden" and family in HIDDEN_FOLLOWS_HEADS:
        options = ["--hidden-size", "32"]
    if cut == "neurons" and family == "mixtral":
        options = ["--intermediate-size", "32"]  # torch's grouped matrix product wants rows of whole 16 bytes
    folder = make_tiny(family.removesuffix("-mha"), **FAMILIES[family])
    plan = json.loads(run_cli("inspect", folder, *options, "--json").stdout)
    run = run_cli("prune", folder, *options, "--output", tmp_path / "out", "--max-shard-size", "20KB", "--json")
    assert run.code == 0, run.stderr
    model = load_stock(tmp_path / "out")
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == plan["after"]["parameters"] == json.loads(run.stdout)["after"]["parameters"]
    tokens = torch.randint(3, 90, (1, 6))
    generated = model.generate(
        tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        logits = model(generated.sequences, use_cache=False).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(generated.logits, 1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_the_identity_plan_writes_the_same_bytes(make_tiny: Callable[..., Path], tmp_path: Path, family: str) -> None:
    folder = make_tiny(family, dtype="bfloat16", tie_word_embeddings=family == "llama")
    run = run_cli("prune", folder, "--pruning-ratio", "0", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    before, after = written_tensors(folder), written_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)
    stock, original = load_stock(tmp_path / "out"), load_stock(folder)
    tokens = torch.randint(3, 90, (1, 12))
    assert torch.equal(stock(tokens).logits, original(tokens).logits)


def test_units_that_nothing_reads_go_without_a_trace(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The Zero oracle through magnitude: silent units have the lowest scores, and logits stay."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny("qwen2", shard="1GB")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    width = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        for layer in model.model.layers:
            for neuron in (3, 17, 40):
                layer.mlp.down_proj.weight[:, neuron] = 0
                layer.mlp.gate_proj.weight[neuron] *= 1e-3
                layer.mlp.up_proj.weight[neuron] *= 1e-3
            for head in (2, 5):  # one of each KV group
                rows = slice(head * width, (head + 1) * width)
                layer.self_attn.o_proj.weight[:, rows] = 0
                layer.self_attn.q_proj.weight[rows] *= 1e-3
    model.save_pretrained(folder)
    sizes = ["--num-attention-heads", "6", "--intermediate-size", "45"]
    run = run_cli("prune", folder, *sizes, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    tokens = torch.randint(3, 90, (2, 20))
    torch.testing.assert_close(load_stock(tmp_path / "out")(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_replaying_a_plan_writes_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    first = run_cli(
        "prune", tiny_llama, "--pruning-ratio", "0.5", "--importance", "random", "--seed", "3",
        "--save-plan", plan, "--output", tmp_path / "a",
    )  # fmt: skip
    second = run_cli("prune", tiny_llama, "--plan", plan, "--output", tmp_path / "b")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        if name != "llmprune.json":
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_random_importance_follows_its_seed(tiny_llama: Path, tmp_path: Path) -> None:
    def kept(seed: int) -> Any:
        path = tmp_path / f"plan-{seed}.json"
        run = run_cli(
            "prune", tiny_llama, "--pruning-ratio", "0.5", "--importance", "random", "--seed", str(seed),
            "--dry-run", "--save-plan", path,
        )  # fmt: skip
        assert run.code == 0, run.stderr
        return json.loads(path.read_text())["keep"]

    assert kept(1) == kept(1) != kept(2)
