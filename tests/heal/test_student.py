"""Which weights are trained."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune_cli.folder.tensors import split_name
from llmprune_cli.heal.layers import decoder_layers
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.options import LossWeights
from llmprune_cli.heal.student import compute_twice, trained_names
from llmprune_cli.heal.teacher.resident import ResidentTeacher
from support.families import FAMILIES, SIZES, TRIED, model_type
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
    layers = {id(own) for layer in decoder_layers(model) for own in layer.parameters()}
    assert trained_names(model, "layers") == {name for name, own in model.named_parameters() if id(own) in layers}
    assert norms == {name for name in within if "norm" in name or ".ln_" in name} and mixers
    assert mlps == {name for name in within - norms if split_name(name)[0].partition("{}")[2].startswith(MLPS[family])}


@pytest.mark.parametrize(
    "family", examples(dict.fromkeys((*TRIED, "opt")), ("jamba", "opt", "qwen2_moe"))
)  # some have dropout
def test_gradients_are_the_same_where_activations_are_computed_twice(family: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(model_type(family), **SIZES, **FAMILIES[family])
    teacher, model = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    windows, numbers = torch.randint(4, 96, (2, 16)), torch.arange(2)
    goal = ResidentTeacher(teacher, 1.0, torch.bfloat16).goal(windows, numbers)
    student = Student(model, LossWeights(kl=1.0), 1.0, torch.bfloat16).train()
    kept = [0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.numel()
        return tensor

    def gradients() -> tuple[int, dict[str, torch.Tensor]]:
        model.zero_grad()
        kept[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = student(windows, goal)
        loss.backward()
        return kept[0], {name: own.grad for name, own in model.named_parameters() if own.grad is not None}

    many, once = gradients()
    compute_twice(model)
    few, twice = gradients()
    assert few < many / 2
    assert once.keys() == twice.keys()
    for name, own in once.items():
        assert torch.equal(own, twice[name]), name
