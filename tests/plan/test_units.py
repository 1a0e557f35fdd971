"""The best units stay: of each width, in every KV group, in every group of experts."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmprune_cli.coupling.trace import Instance
from llmprune_cli.plan.units import choose
from support.architectures import architecture_of


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_each_instance_is_ranked_on_its_own() -> None:
    architecture = architecture_of("llama", intermediate_size=4)
    after = replace(architecture.widths, intermediate_size=2)
    found = choose(
        {"intermediate_size": {Instance(0): scores(4, 1, 3, 2), Instance(1): scores(1, 2, 3, 4)}}, architecture, after
    )
    assert found == {"intermediate_size": {Instance(0): (0, 2), Instance(1): (2, 3)}}


def test_widths_that_stay_are_not_chosen_from() -> None:
    architecture = architecture_of("llama")
    assert choose({"intermediate_size": {Instance(0): torch.arange(48.0)}}, architecture, architecture.widths) == {}


def test_groups_go_first_and_then_heads_in_every_group_that_stays() -> None:
    architecture = architecture_of("llama")  # 8 query heads for 2 KV heads
    heads = {"num_attention_heads": {Instance(0): scores(5, 6, 7, 8, 1, 2, 4, 3)}}
    both = replace(architecture.widths, num_attention_heads=4)
    groups = {"num_key_value_heads": {Instance(0): scores(1, 2)}}
    assert choose({**heads, **groups}, architecture, both) == {
        "num_attention_heads": {Instance(0): (2, 3, 6, 7)},
        "num_key_value_heads": {Instance(0): (0, 1)},
    }
    one = replace(both, num_attention_heads=2, num_key_value_heads=1)
    assert choose({**heads, **groups}, architecture, one) == {
        "num_attention_heads": {Instance(0): (6, 7)},  # the better group is the one of the worse heads
        "num_key_value_heads": {Instance(0): (1,)},
    }


def test_heads_with_a_kv_head_each_take_it_along() -> None:
    architecture = architecture_of("llama-mha")
    after = replace(architecture.widths, num_attention_heads=3, num_key_value_heads=3)
    found = choose({"num_attention_heads": {Instance(2): scores(3, 9, 1, 2, 8, 0, 7, 4)}}, architecture, after)
    assert found == {"num_attention_heads": {Instance(2): (1, 4, 6)}, "num_key_value_heads": {Instance(2): (1, 4, 6)}}


def test_experts_go_evenly_from_the_groups_of_a_router() -> None:
    best_in_front = {"num_experts": {Instance(1): scores(9, 8, 7, 6, 1, 4, 2, 3)}}
    architecture = architecture_of("deepseek_v3")  # two groups of four
    after = replace(architecture.widths, num_experts=4)
    assert choose(best_in_front, architecture, after) == {"num_experts": {Instance(1): (0, 1, 5, 7)}}
    plain = architecture_of("qwen3_moe", num_experts=8)
    after = replace(plain.widths, num_experts=4)
    assert choose(best_in_front, plain, after) == {"num_experts": {Instance(1): (0, 1, 2, 3)}}
