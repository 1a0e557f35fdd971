"""A dry run on published configurations of every size: legal widths, the right count, and within seconds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from support.cli import run_cli
from support.families import EVERY
from support.full import examples
from support.published_configs import CONFIGS, PARAMETERS
from support.recent_configs import RECENT

SOME = ["DeepSeek-V3", "Gemma-3-27B"]  # run by default
SOME_RECENT = ["Devstral-2-123B"]
PRUNING_RATIOS = (0.1, 0.25, 0.5) if EVERY else (0.25,)
TIME_LIMIT = 10.0  # seconds of CPU time for each dry run, whatever the model's size and whatever else the machine does
# Configuration field → the width that it holds, written out for every family so as not to lean on the tool's own table.
HEADS = {"num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_key_value_heads"}
HIDDEN_AND_HEADS = {"hidden_size": "hidden_size", "head_dim": "head_dim", **HEADS}
DENSE = {**HIDDEN_AND_HEADS, "intermediate_size": "intermediate_size"}
EXPERTS = {"moe_intermediate_size": "moe_intermediate_size"}
FIELDS = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "phi": DENSE,
    "phi3": DENSE,
    "gemma2": DENSE,
    "gemma3_text": DENSE,
    "olmo2": DENSE,
    "smollm3": DENSE,
    "mixtral": DENSE,  # these three call the neurons of an expert intermediate_size
    "olmoe": DENSE,
    "gpt_oss": DENSE,
    "qwen3_moe": {**HIDDEN_AND_HEADS, **EXPERTS},  # no layer of the published model is dense
    "qwen2_moe": {
        **HIDDEN_AND_HEADS,
        **EXPERTS,
        "shared_expert_intermediate_size": "shared_expert_intermediate_size",
    },
    # The shared expert has n_shared_experts · moe_intermediate_size neurons, and a head has several dims of its own.
    "deepseek_v3": {"hidden_size": "hidden_size", **HEADS, "intermediate_size": "intermediate_size", **EXPERTS},
    "gpt2": {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "intermediate_size"},
    "gpt_neox": {
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
    },
    "opt": {
        "hidden_size": "hidden_size",
        "word_embed_proj_dim": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
    },
    "falcon": {
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
    },
}
HIDDEN_IS_HEADS = {"gpt2", "gpt_neox", "opt", "falcon", "olmoe"}  # the hidden size is query heads × head dim


def count_parameters(config: dict[str, Any], folder: Path) -> int:
    """Elements that a stock model of a config.json stores, on the meta device; a tied tensor counts once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    stored = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    return sum(stored.values())


def check_widths(model: str, before: dict[str, int], after: dict[str, int], pruning_ratio: float) -> None:
    """Hold the widths after pruning against the convention: `int(N·(1−r))` stay, in whole KV groups of heads."""
    family = CONFIGS[model]["model_type"]
    assert all(min(1, before[width]) <= after[width] <= before[width] for width in before), (before, after)
    step = 8 if before["num_experts"] else 1  # elements that kernels for experts want rows to be a multiple of
    for field, width in FIELDS[family].items():
        assert before[width] == CONFIGS[model].get(field, before[width]), field

    heads, groups = before["num_attention_heads"], before["num_key_value_heads"]
    kept_heads = int(heads * (1 - pruning_ratio))
    if groups == heads:
        assert after["num_attention_heads"] == after["num_key_value_heads"] == kept_heads
    else:
        assert after["num_key_value_heads"] == groups
        assert after["num_attention_heads"] == max(1, kept_heads // groups) * groups

    asked = int(before["hidden_size"] * (1 - pruning_ratio))
    if (
        family in HIDDEN_IS_HEADS or model == "Phi-4-mini"
    ):  # its configuration holds RoPE factors against hidden / heads
        assert after["hidden_size"] == after["num_attention_heads"] * before["head_dim"]
    elif after["hidden_size"] != asked - asked % step:
        assert after["hidden_size"] % after["num_attention_heads"] == 0
        assert abs(after["hidden_size"] - asked) <= after["num_attention_heads"] / 2

    for width in set(FIELDS[family].values()):
        if width.endswith("intermediate_size"):
            own_step = step if width == "moe_intermediate_size" or not before["moe_intermediate_size"] else 1
            kept = int(before[width] * (1 - pruning_ratio))
            assert after[width] == kept - kept % own_step, width
    assert after["head_dim"] == before["head_dim"]
    assert after["num_hidden_layers"] == before["num_hidden_layers"]


@pytest.mark.parametrize("model", examples(CONFIGS, SOME))
def test_dry_run_counts_what_the_published_model_would_become(tmp_path: Path, model: str) -> None:
    config = CONFIGS[model]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pruning_ratio in PRUNING_RATIOS:
        started = time.process_time()
        run = run_cli("prune", tmp_path, "--pruning-ratio", str(pruning_ratio), "--dry-run", "--json")
        seconds = time.process_time() - started
        assert run.code == 0, run.stderr
        result = json.loads(run.stdout)
        assert result["before"]["parameters"] == PARAMETERS[model]
        after = result["after"]["widths"]
        check_widths(model, result["before"]["widths"], after, pruning_ratio)
        pruned = {**config, **{field: after[width] for field, width in FIELDS[config["model_type"]].items()}}
        assert result["after"]["parameters"] == count_parameters(pruned, tmp_path / f"pruned-{pruning_ratio}")
        assert seconds < TIME_LIMIT, f"{seconds:.1f} s at pruning ratio {pruning_ratio}"


def test_every_published_configuration_has_a_count_by_hand() -> None:
    assert CONFIGS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("model", examples(RECENT, SOME_RECENT))
def test_dry_run_counts_what_transformers_builds_of_a_recent_model(tmp_path: Path, model: str) -> None:
    config = RECENT[model]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = run_cli("prune", tmp_path, "--mlp", "25%", "--dry-run", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    before, after = result["before"], result["after"]
    assert before["parameters"] == count_parameters(config, tmp_path / "whole")
    cut = {width: kept for width, kept in after["widths"].items() if kept != before["widths"][width]}
    assert cut and all(before["widths"][width] == config[width] for width in cut)
    for width, kept in cut.items():  # down to what blocks of weights in 4 bits come in
        assert width.endswith("intermediate_size") and 0.7 * config[width] < kept <= 0.75 * config[width], (width, kept)
        assert kept % (256 if config[width] >= 5632 else 32) == 0, (width, kept)
    assert after["parameters"] == count_parameters({**config, **cut}, tmp_path / "pruned")


@pytest.mark.parametrize("model", examples(filter(re.compile(r"-\d+B").search, RECENT), SOME_RECENT))
def test_a_recent_model_has_as_many_parameters_as_its_name_says(tmp_path: Path, model: str) -> None:
    (said,) = re.findall(r"-(\d+)B", model)
    assert count_parameters(RECENT[model]["config"], tmp_path / "model") / 1e9 == pytest.approx(int(said), rel=0.06)


def test_forty_published_configurations_are_tried_and_half_of_them_are_recent() -> None:
    assert len(CONFIGS) + len(RECENT) >= 40 and len(RECENT) >= 20
    assert all(known["source"] for known in RECENT.values())
