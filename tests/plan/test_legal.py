"""Which sizes are legal, in words and in numbers, with no model built."""

from __future__ import annotations

from typing import Any

import pytest

from llmprune_cli.coupling.trace import Trace
from llmprune_cli.errors import PlanError
from llmprune_cli.plan.legal import legal_experts, legal_values, listed, near, stepped, within
from support.architectures import architecture_of


def refusing(**refused: str) -> Trace:
    """A trace that says nothing but what cannot be pruned."""
    return Trace((), (), (), frozenset(), frozenset(), frozenset(), refused)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            {
                "hidden_size": "1 to 64, multiples of the query heads",
                "num_attention_heads": "2, 4, 6, 8",
                "num_key_value_heads": "1 to 2, each with its query heads",
                "head_dim": "",
                "intermediate_size": "1 to 48",
                "num_hidden_layers": "1 to 4",
            },
        ),
        (
            "gpt2",
            {
                "hidden_size": "query heads × 8",
                "num_attention_heads": "1 to 8, query and KV heads together",
                "num_key_value_heads": "1 to 8, query and KV heads together",
                "head_dim": "",
                "intermediate_size": "1 to 48",
                "num_hidden_layers": "1 to 4",
            },
        ),
        (
            "qwen3_moe",
            {
                "hidden_size": "8 to 64, multiples of 8",
                "num_attention_heads": "2, 4, 6, 8",
                "num_key_value_heads": "1 to 2, each with its query heads",
                "head_dim": "",
                "intermediate_size": "1 to 48",
                "moe_intermediate_size": "8 to 40, multiples of 8",
                "num_experts": "2, 3, 4, 5, 6",
                "num_hidden_layers": "1 to 4",
            },
        ),
        ("mamba", {"hidden_size": "1 to 64", "intermediate_size": "1 to 48", "num_hidden_layers": "1 to 4"}),
    ],
)
def test_every_width_says_what_it_can_be(family: str, expected: dict[str, str]) -> None:
    assert legal_values(architecture_of(family), refusing()) == expected


def test_a_refused_width_says_why() -> None:
    said = legal_values(architecture_of("llama"), refusing(hidden_size="the reason"))
    assert said["hidden_size"] == "no: the reason" and said["intermediate_size"] == "1 to 48"


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen3_moe", {}, [2, 3, 4, 5, 6]),
        ("qwen3_moe", {"num_experts_per_tok": 5}, [5, 6]),
        ("jamba", {}, [2, 3, 4, 5, 6]),
        ("deepseek_v3", {}, [4, 6, 8]),  # two groups, ranked by their two best
        ("deepseek_v3", {"num_experts_per_tok": 3}, [6, 8]),  # three from one group
        ("deepseek_v3", {"num_experts_per_tok": 3, "topk_group": 2}, [4, 6, 8]),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, [2, 3, 4, 5, 6, 7, 8]),
        ("deepseek_v3", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 1}, [8]),
    ],
)
def test_a_router_keeps_enough_to_pick_from(family: str, changes: dict[str, Any], expected: list[int]) -> None:
    assert list(legal_experts(architecture_of(family, **changes))) == expected


@pytest.mark.parametrize(
    ("size", "step", "whole", "expected"),
    [
        (42, 4, 64, [40, 44]),
        (40, 4, 64, [40, 44]),
        (63, 8, 64, [56, 64]),
        (64, 6, 64, [60]),
        (3, 8, 64, [8]),
        (3, 8, 6, []),
        (1, 1, 1, [1]),
    ],
)
def test_the_nearest_multiples_lie_on_both_sides(size: int, step: int, whole: int, expected: list[int]) -> None:
    assert near(size, step, whole) == expected


@pytest.mark.parametrize(
    ("width", "size", "exact", "expected"),
    [
        ("moe_intermediate_size", 20, False, 16),
        ("moe_intermediate_size", 24, True, 24),
        ("moe_intermediate_size", 40, True, 40),
        ("hidden_size", 63, False, 56),
        ("intermediate_size", 23, True, 23),  # of a dense layer, which no grouped product runs
    ],
)
def test_experts_want_whole_steps(width: str, size: int, exact: bool, expected: int) -> None:
    said: list[str] = []
    assert stepped(architecture_of("qwen3_moe"), width, size, exact, said) == expected
    assert bool(said) == (size != expected) and all(f"{width} is {expected} instead of {size}" in s for s in said)


@pytest.mark.parametrize(("size", "exact", "legal"), [(20, True, "16, 24"), (7, False, "8"), (1, True, "8")])
def test_a_size_between_the_steps_is_refused_with_its_neighbours(size: int, exact: bool, legal: str) -> None:
    with pytest.raises(PlanError, match=f"Legal values near it: {legal}\\."):
        stepped(architecture_of("qwen3_moe"), "moe_intermediate_size", size, exact, [])


def test_sizes_lie_between_one_and_all() -> None:
    assert [within("hidden_size", size, 4) for size in (1, 4)] == [1, 4]
    for size in (0, 5, -1):
        with pytest.raises(PlanError, match=f"hidden_size = {size} is not possible.* 1 to 4"):
            within("hidden_size", size, 4)


def test_few_values_are_listed_and_many_by_their_ends() -> None:
    assert listed(range(2, 2)) == "none"
    assert listed(range(2, 8, 2)) == "2, 4, 6"
    assert listed(range(8, 129, 8)) == "8, 16, … 128"
