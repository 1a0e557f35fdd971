"""Which weights are trained."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune_cli.folder.tensors import split_name
from llmprune_cli.heal.student import trained_names
from support.families import FAMILIES, SIZES, model_type
from support.full import examples
from support.tiny import tiny_config

# What the names of the MLP's weights begin with in a layer: where classes are called after convolutions or mixers.
MLPS = {
    "gpt2": ".mlp.",
    "jamba": ".feed_forward.",
    "lfm2": ".feed_forward.",
    "llama": ".mlp.",
    "mamba": ".mlp.",
    "opt": ".fc",
    "qwen2_moe": ".mlp.",
}


@pytest.mark.parametrize("family", examples(MLPS, ("gpt2", "jamba")))
def test_weights_of_a_layer_are_of_its_norms_its_mixer_or_its_mlp(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type(family), **SIZES, **FAMILIES[family]))
    within = {name for name, _ in model.named_parameters() if split_name(name)[1]}
    norms, mixers, mlps = (trained_names(model, part) & within for part in ("norms", "attention", "mlp"))
    assert sorted(within) == sorted([*norms, *mixers, *mlps])
    assert norms == {name for name in within if "norm" in name or ".ln_" in name} and mixers
    assert mlps == {name for name in within - norms if split_name(name)[0].partition("{}")[2].startswith(MLPS[family])}
