"""Identity, Zero, Counting and Reload on files written by the command line, for every family in every width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BY_CHANCE, BY_MAGNITUDE, run_cli, save_tiny
from families import FAMILIES, SIZES, model_type
from test_peer import written_tensors

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


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sharded checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[family] = save_tiny(folder, model_type(family), **{**SIZES, **FAMILIES[family]})
        return made[family]

    return make


def prunable(folder: Path) -> dict[str, str]:
    """The widths of a model and their legal values, or "no: reason"."""
    run = run_cli("inspect", folder, "--json")
    assert run.code == 0, run.stderr
    return json.loads(run.stdout)["prunable"]


def load_stock(folder: Path, **options: Any) -> Any:
    """Reload strictly: no missing, unexpected or mismatched key."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def assert_generates(model: Any) -> None:
    """Generation with the cache gives the logits of a forward pass without it."""
    tokens = torch.randint(3, 90, (1, 10))
    generated = model.generate(
        tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        logits = model(generated.sequences, use_cache=False).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(generated.logits, 1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_reloads_counts_as_planned_and_generates(
    tiny_of: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_of(family)
    legal = prunable(folder)
    for width, options in CUTS.items():
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


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", [family for family, options in FAMILIES.items() if "num_experts_per_tok" in options])
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_plan_writes_the_same_bytes(tiny_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    folder = tiny_of(family)
    run = run_cli("prune", folder, *BY_MAGNITUDE, "--pruning-ratio", "0", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    before, after = written_tensors(folder), written_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    tokens = torch.randint(3, 90, (1, 12))
    with torch.no_grad():
        assert torch.equal(load_stock(tmp_path / "out")(tokens).logits, load_stock(folder)(tokens).logits)


def test_a_pruned_gemma_makes_up_for_its_embedding_scale(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_of("gemma")
    run = run_cli(
        *("prune", folder, *BY_MAGNITUDE, "--hidden-size", "16"),
        *("--save-plan", tmp_path / "plan", "--output", tmp_path / "out"),
    )
    assert run.code == 0, run.stderr
    kept = json.loads((tmp_path / "plan").read_text())["keep"]["hidden_size"][""]
    dense, pruned = written_tensors(folder), written_tensors(tmp_path / "out")
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(pruned[name], dense[name][:, kept] * 2)  # √(64/16)
    name = "model.norm.weight"
    torch.testing.assert_close(1 + pruned[name], (1 + dense[name][kept]) / 2)


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


def test_dropped_layers_take_their_settings_with_them(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    def config_of(family: str, dropped: str) -> dict[str, Any]:
        out = tmp_path / f"{family}-{dropped}"
        run = run_cli("prune", tiny_of(family), *BY_MAGNITUDE, "--drop-layers", dropped, "--output", out)
        assert run.code == 0, run.stderr
        config: dict[str, Any] = json.loads((out / "config.json").read_text())
        return config

    assert config_of("gemma3_text", "0")["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert config_of("qwen3_moe", "0")["mlp_only_layers"] == [0]
    assert config_of("qwen3_moe", "1")["mlp_only_layers"] == []
    assert config_of("deepseek_v3", "2")["first_k_dense_replace"] == 1
    assert config_of("deepseek_v3", "0")["first_k_dense_replace"] == 0
    assert config_of("smollm3", "1,-1")["no_rope_layers"] == [1, 1]
    jamba = config_of("jamba", "0")
    assert (jamba["attn_layer_period"], jamba["attn_layer_offset"]) == (2, 0)
    assert (jamba["expert_layer_period"], jamba["expert_layer_offset"]) == (2, 1)
    jamba = config_of("jamba", "0,2")  # attention alone is left, and no experts
    assert (jamba["attn_layer_period"], jamba["attn_layer_offset"]) == (1, 0)
    assert jamba["expert_layer_offset"] >= 2


def test_layers_that_no_rhythm_describes_are_refused(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli("prune", tiny_of("jamba"), *BY_MAGNITUDE, "--drop-layers", "1", "--output", tmp_path / "out")
    assert run.code == 5 and "no expert_layer_period describes the layers that would stay" in run.stderr
    run = run_cli(
        "prune", tiny_of("jamba"), *BY_MAGNITUDE, "--layers", "3", "--dry-run", "--save-plan", tmp_path / "plan"
    )
    assert run.code == 0 and "keeps its rhythm" in run.stderr
    assert json.loads((tmp_path / "plan").read_text())["layers"] == [0, 1, 2]


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


def test_a_rhythm_of_sparse_layers_survives_the_loss_of_one(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    options = {**FAMILIES["qwen3_moe"], "mlp_only_layers": [], "decoder_sparse_step": 2, "num_hidden_layers": 5}
    folder = make_tiny("qwen3_moe", **options)  # layers 1 and 3 are sparse
    run = run_cli("prune", folder, *BY_MAGNITUDE, "--drop-layers", "0", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [1, 3])
    load_stock(tmp_path / "out")


def test_layers_by_number_leave_the_first_and_the_last(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli(
        "prune", tiny_of("qwen3"), *BY_MAGNITUDE, "--layers", "2", "--save-plan", tmp_path / "plan", "--dry-run"
    )
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "plan").read_text())["layers"] == [0, 3]


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
