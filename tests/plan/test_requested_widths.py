"""Which widths and layers a request means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune_cli.errors import PlanError
from llmprune_cli.family.widths import NEURONS, read_widths
from llmprune_cli.options import WidthRequest
from llmprune_cli.plan.requested_widths import resolve
from support.architectures import REFUSED, RULES, architecture_of
from support.cli import BY_CHANCE, BY_MAGNITUDE, CALIBRATED, run_cli
from support.refusals import PLAN, assert_refused
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level

EVERY = (0, 1, 2, 3)
HALF = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24}
QUARTER = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 36}
FEWER = {"num_attention_heads": 4, "intermediate_size": 24}
TIED = ("so 4 query heads stay", "hidden_size is 32 instead of 64")
BOTH = {"num_attention_heads": 4, "num_key_value_heads": 4}


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


def test_layers_by_number_leave_the_first_and_the_last(tiny_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_cli(
        "prune", tiny_of("qwen3"), *BY_MAGNITUDE, "--layers", "2", "--save-plan", tmp_path / "plan", "--dry-run"
    )
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "plan").read_text())["layers"] == [0, 3]


# --- on paper ------------------------------------------------------------------------------------------------------

# family, what is asked for, the widths that change, the layers that stay, words of what is said about it
RESOLVED: list[tuple[str, dict[str, Any], dict[str, int], tuple[int, ...], tuple[str, ...]]] = [
    ("llama", {}, {}, EVERY, ()),
    ("llama", {"pruning_ratio": 0.5}, {**HALF, "num_attention_heads": 4}, EVERY, ()),
    ("llama", {"pruning_ratio": 0.5, "intermediate_size": 40}, {**HALF, "intermediate_size": 40}, EVERY, ()),
    ("llama", {"pruning_ratio": 0.5, "hidden_pruning_ratio": 0.0}, FEWER, EVERY, ()),
    (
        "llama",
        {"pruning_ratio": 1 / 3},
        {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 32},
        EVERY,
        ("hidden_size is 40 instead of 42",),
    ),
    (
        "llama",
        {"head_pruning_ratio": 0.25},
        {"num_attention_heads": 6, "hidden_size": 60},
        EVERY,
        ("hidden_size is 60 instead of 64: with 6 query heads",),
    ),
    ("llama", {"head_pruning_ratio": 0.5}, {"num_attention_heads": 4}, EVERY, ()),
    (
        "llama",
        {"head_pruning_ratio": 0.99},
        {"num_attention_heads": 2},
        EVERY,
        ("One of the query heads in a KV group stays",),
    ),
    ("llama", {"num_attention_heads": 2}, {"num_attention_heads": 2}, EVERY, ()),
    ("llama", {"num_key_value_heads": 1}, {"num_attention_heads": 4, "num_key_value_heads": 1}, EVERY, ()),
    ("llama", {"kv_group_pruning_ratio": 0.5}, {"num_attention_heads": 4, "num_key_value_heads": 1}, EVERY, ()),
    (
        "llama",
        {"kv_group_pruning_ratio": 0.9},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        EVERY,
        ("One of the KV groups stays",),
    ),
    ("llama", {"intermediate_pruning_ratio": 0.4}, {"intermediate_size": 28}, EVERY, ()),
    ("llama", {"intermediate_pruning_ratio": 0.4, "round_to": 8}, {"intermediate_size": 24}, EVERY, ()),
    ("llama", {"intermediate_size": 29, "round_to": 8}, {"intermediate_size": 29}, EVERY, ()),
    ("llama", {"hidden_pruning_ratio": 0.25}, {"hidden_size": 48}, EVERY, ()),
    ("llama", {"hidden_pruning_ratio": 0.3}, {"hidden_size": 40}, EVERY, ("hidden_size is 40 instead of 44",)),
    (
        "llama",
        {"hidden_pruning_ratio": 0.1, "round_to": 6},
        {"hidden_size": 48},
        EVERY,
        ("with 8 query heads it must be a multiple of the query heads and of 6 (--round-to)",),
    ),
    ("llama", {"num_hidden_layers": 2}, {"num_hidden_layers": 2}, (0, 3), ()),
    ("llama", {"num_hidden_layers": 1}, {"num_hidden_layers": 1}, (3,), ()),
    ("llama", {"num_hidden_layers": 2, "keep_layers": (2,)}, {"num_hidden_layers": 2}, (2, 3), ()),
    ("llama", {"num_hidden_layers": 2, "keep_layers": (0, 1)}, {"num_hidden_layers": 2}, (0, 1), ()),
    ("llama", {"drop_layers": (1, -1)}, {"num_hidden_layers": 2}, (0, 2), ()),
    ("llama-mha", {"pruning_ratio": 0.25}, {**QUARTER, "num_key_value_heads": 6}, EVERY, ()),
    ("llama-mha", {"num_attention_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 4}, EVERY, ()),
    ("llama-mha", {"num_key_value_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 4}, EVERY, ()),
    ("llama-mha", {"kv_group_pruning_ratio": 0.5, "num_key_value_heads": 4, "num_attention_heads": 4}, BOTH, EVERY, ()),
    ("llama-mha", {"kv_group_pruning_ratio": 0.5, "head_pruning_ratio": 0.45}, BOTH, EVERY, ()),
    ("llama-mha", {"num_attention_heads": 4, "head_pruning_ratio": 0.25}, BOTH, EVERY, ()),
    ("gpt2", {"pruning_ratio": 0.5}, {**HALF, "num_key_value_heads": 4}, EVERY, ()),
    (
        "gpt2",
        {"hidden_size": 32},
        {"hidden_size": 32, **BOTH},
        EVERY,
        TIED,
    ),
    (
        "gpt2",
        {"hidden_pruning_ratio": 0.45},
        {"hidden_size": 32, **BOTH},
        EVERY,
        TIED,
    ),
    ("gpt2", {"num_attention_heads": 4}, {"hidden_size": 32, **BOTH}, EVERY, ("hidden_size is 32 instead of 64",)),
    (
        "qwen3_moe",
        {"intermediate_pruning_ratio": 0.5},
        {"intermediate_size": 24, "moe_intermediate_size": 16},
        EVERY,
        ("moe_intermediate_size is 16 instead of 20: kernels",),
    ),
    ("qwen3_moe", {"hidden_pruning_ratio": 0.45}, {"hidden_size": 32}, EVERY, ("hidden_size is 32 instead of 35",)),
    ("qwen3_moe", {"num_experts": 2}, {"num_experts": 2}, EVERY, ()),
    ("qwen3_moe", {"num_experts": 6}, {}, EVERY, ()),
    (
        "deepseek_v3",
        {"pruning_ratio": 0.5},
        {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16},
        EVERY,
        ("num_attention_heads stays 8: latent", "moe_intermediate_size is 16 instead of 20"),
    ),
    ("deepseek_v3", {"num_experts": 6}, {"num_experts": 6}, EVERY, ()),
    ("mamba", {"hidden_pruning_ratio": 0.5}, {"hidden_size": 32}, EVERY, ()),
    ("jamba", {"num_hidden_layers": 3}, {"num_hidden_layers": 3}, (0, 1, 2), ("The last 1 layers go, so that jamba",)),
    ("jamba", {"drop_layers": (0,)}, {"num_hidden_layers": 3}, (1, 2, 3), ()),
]


@pytest.mark.parametrize(
    ("family", "asked", "changed", "layers", "said"), RESOLVED, ids=[f"{case[0]} {case[1]}" for case in RESOLVED]
)
def test_a_request_comes_to_the_nearest_legal_widths(
    family: str, asked: dict[str, Any], changed: dict[str, int], layers: tuple[int, ...], said: tuple[str, ...]
) -> None:
    architecture = architecture_of(family)
    target = resolve(architecture, REFUSED.get(family, {}), WidthRequest(**asked))
    before = architecture.widths
    assert {width: getattr(target.widths, width) for width in target.widths.changed_from(before)} == changed
    assert target.layers == layers
    assert len(target.deviations) == len(said)
    assert all(word in deviation for word, deviation in zip(said, target.deviations, strict=True)), target.deviations


IMPOSSIBLE: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("llama", {"num_attention_heads": 5}, ("cannot be shared evenly by 2 KV groups", "Legal values: 2, 4, 6, 8")),
    ("llama", {"num_attention_heads": 9}, ("num_attention_heads = 9", "1 to 8")),
    ("llama", {"num_key_value_heads": 3}, ("num_key_value_heads = 3", "1 to 2")),
    ("llama", {"num_key_value_heads": 1, "num_attention_heads": 6}, ("6 query heads", "Legal values: 1, 2, 3, 4")),
    ("llama-mha", {"head_pruning_ratio": 0.5, "kv_group_pruning_ratio": 0.25}, ("4 query heads and 6 KV groups",)),
    ("llama-mha", {"num_key_value_heads": 6, "head_pruning_ratio": 0.75}, ("2 query heads and 6 KV groups", "alone")),
    ("llama-mha", {"num_attention_heads": 6, "kv_group_pruning_ratio": 0.0}, ("6 query heads and 8 KV groups",)),
    ("llama-mha", {"num_attention_heads": 6, "num_key_value_heads": 4}, ("6 query heads and 4 KV groups",)),
    ("llama", {"intermediate_size": 49}, ("1 to 48",)),
    ("llama", {"intermediate_size": 0}, ("1 to 48",)),
    ("llama", {"intermediate_pruning_ratio": 0.99}, ("intermediate_size = 48 at pruning ratio 0.99 leaves 0",)),
    ("llama", {"hidden_pruning_ratio": 0.5, "round_to": 100}, ("no multiple of 100 fits",)),
    ("llama", {"hidden_size": 36}, ("hidden_size = 36", "a multiple of the query heads", "32, 40")),
    ("llama", {"moe_intermediate_size": 8}, ("llama has no moe_intermediate_size",)),
    ("llama", {"num_experts": 2}, ("llama has no routed experts",)),
    ("llama", {"num_hidden_layers": 5}, ("1 to 4",)),
    ("llama", {"drop_layers": (4,)}, ("Layer 4 cannot be dropped", "layers 0 to 3")),
    ("llama", {"drop_layers": (0, 1, 2, 3)}, ("one must stay",)),
    ("llama", {"drop_layers": (1, -1), "keep_layers": (3,)}, ("both name 3.",)),
    ("llama", {"keep_layers": (4,)}, ("Layer 4 cannot be kept", "from the end -1 to -4")),
    ("llama", {"num_hidden_layers": 1, "keep_layers": (0, 1)}, ("Ask for 2 to 4",)),
    ("llama", {"intermediate_size": 24, "keep_layers": (0,)}, ("intermediate_size cannot shrink while layers 0",)),
    ("gpt2", {"hidden_size": 33}, ("multiple of 8 here (query heads × head dim)", "32, 40")),
    ("gpt2", {"hidden_size": 32, "num_attention_heads": 5}, ("contradicts 5 query heads: it must be 40",)),
    ("qwen3_moe", {"num_experts": 1}, ("picks 2 of 6", "Legal values: 2, 3, 4, 5, 6")),
    ("qwen3_moe", {"moe_intermediate_size": 20}, ("multiple of 8", "16, 24")),
    ("qwen3_moe", {"intermediate_pruning_ratio": 0.9}, ("moe_intermediate_size = 4 is not legal", "near it: 8")),
    ("deepseek_v3", {"num_experts": 5}, ("Legal values: 4, 6, 8",)),
    ("mamba", {"num_attention_heads": 2}, ("mamba has no attention heads",)),
    ("mamba", {"kv_group_pruning_ratio": 0.5}, ("mamba has no attention heads",)),
    ("jamba", {"drop_layers": (1,)}, ("jamba refuses these widths", "no expert_layer_period")),
]


@pytest.mark.parametrize(("family", "asked", "words"), IMPOSSIBLE, ids=[f"{case[0]} {case[1]}" for case in IMPOSSIBLE])
def test_what_cannot_be_is_refused_with_what_can(family: str, asked: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(PlanError) as refused:
        resolve(architecture_of(family), REFUSED.get(family, {}), WidthRequest(**asked))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("family", RULES)
def test_asking_for_what_there_is_changes_nothing(family: str) -> None:
    architecture = architecture_of(family)
    before = architecture.widths
    named = ("hidden_size", "num_attention_heads", "num_key_value_heads", *map(str, NEURONS), "num_hidden_layers")
    asked = {width: getattr(before, width) for width in named if getattr(before, width)}
    target = resolve(architecture, {}, WidthRequest(**asked))
    assert (target.widths, target.layers, target.deviations) == (before, EVERY, ())


@pytest.mark.parametrize("family", RULES)
@given(ratio=st.just(0.0) | st.floats(0.01, 0.75), round_to=st.sampled_from([1, 2, 8]))
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_any_ratio_comes_to_widths_that_can_be_asked_for(family: str, ratio: float, round_to: int) -> None:
    """What a ratio resolves to is legal on its own, and never more than there was."""
    architecture = architecture_of(family)
    refused, before = REFUSED.get(family, {}), architecture.widths
    after = resolve(architecture, refused, WidthRequest(pruning_ratio=ratio, round_to=round_to)).widths
    changed = after.changed_from(before)
    assert all(0 < getattr(after, width) < getattr(before, width) for width in changed)
    again = resolve(architecture, refused, WidthRequest(**{width: getattr(after, width) for width in changed}))
    assert again.widths == after


@pytest.mark.parametrize(("asked", "kept"), [({}, 1088), ({"round_to": 1}, 1105), ({"round_to": 100}, 1100)])
def test_neurons_that_a_ratio_of_their_own_keeps_are_a_round_number(asked: dict[str, int], kept: int) -> None:
    architecture = architecture_of("llama", intermediate_size=1536)
    target = resolve(architecture, {}, WidthRequest(intermediate_pruning_ratio=0.28, **asked))
    assert target.widths.intermediate_size == kept
    assert any("1105" in text and "--round-to 1" in text for text in target.deviations) == (not asked)
    together = resolve(architecture, {}, WidthRequest(pruning_ratio=0.28)).widths
    assert together.intermediate_size == 1105


@pytest.mark.parametrize(
    ("family", "asked", "changed"),
    [
        ("llama", {"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
        ("llama", {"intermediate_pruning_ratio": 0.25}, {"intermediate_size": 28}),
        (
            "llama",
            {"pruning_ratio": 0.25, "hidden_pruning_ratio": 0.0},
            {"num_attention_heads": 6, "hidden_size": 60, "intermediate_size": 28},
        ),
        ("llama", {"num_attention_heads": 6}, {"num_attention_heads": 6, "hidden_size": 60}),
        ("qwen3_moe", {"intermediate_size": 24}, {"intermediate_size": 24}),
    ],
)
def test_round_to_leaves_alone_what_no_ratio_asks_for(
    family: str, asked: dict[str, Any], changed: dict[str, int]
) -> None:
    """None of the whole widths is a multiple of 14, as 1,152 channels of a Gemma 3 are none of 256."""
    architecture = architecture_of(family)
    after = resolve(architecture, {}, WidthRequest(**asked, round_to=14)).widths
    assert {width: getattr(after, width) for width in after.changed_from(architecture.widths)} == changed


@pytest.mark.parametrize(
    ("whole", "kept"), [(14336, 10240), (8192, 5888), (5632, 3840), (3072, 2176), (704, 480), (96, 68), (8, 5)]
)
def test_large_mlps_keep_whole_blocks_of_256_neurons(whole: int, kept: int) -> None:
    architecture = architecture_of("llama", intermediate_size=whole)
    assert resolve(architecture, {}, WidthRequest(intermediate_pruning_ratio=0.28)).widths.intermediate_size == kept


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"intermediate_pruning_ratio": 0.8}, ("intermediate_size", 1024)),  # 5120 × (1 − 0.8) is 1023.9999999999998
        ({"intermediate_pruning_ratio": 0.9}, ("intermediate_size", 512)),
        ({"head_pruning_ratio": 0.28}, ("num_attention_heads", 18)),  # 0.28 × 25 is 7.000000000000001
        ({"kv_group_pruning_ratio": 0.28}, ("num_key_value_heads", 18)),
    ],
)
def test_floating_point_takes_no_step_more(asked: dict[str, float], kept: tuple[str, int]) -> None:
    architecture = architecture_of(
        "llama", hidden_size=100, intermediate_size=5120, num_attention_heads=25, num_key_value_heads=25, head_dim=4
    )
    target = resolve(architecture, {}, WidthRequest(**asked))
    assert getattr(target.widths, kept[0]) == kept[1]


def test_a_second_name_of_the_neurons_of_experts_is_no_width_of_its_own() -> None:
    from transformers import AutoConfig

    widths = read_widths(AutoConfig.for_model("deepseek_v4", moe_intermediate_size=256))
    assert widths.moe_intermediate_size == 256 and widths.intermediate_size == 0


STAYS = "All of it is to stay."


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--layers", "2"), STAYS),
        (("--mlp", "0"), STAYS),
        (("--intermediate-size", "48"), STAYS),
        (("--hidden", "1%"), "hidden_size is 64 instead of 63"),
    ],
)
def test_a_request_that_removes_nothing_makes_no_copy(
    tiny_llama: Path, tmp_path: Path, asked: tuple[str, ...], why: str
) -> None:
    for command in (("prune", *BY_MAGNITUDE, "--output", tmp_path / "out"), ("inspect",)):
        said = (why, "intermediate_size (1 to 48)", "num_hidden_layers (1 to 2)", "llmprune export")
        assert_refused(run_cli(command[0], tiny_llama, *asked, *command[1:]), PLAN, *said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", [("--layers", "2", "--intermediate-size", "24"), ("--hidden-size", "64", "--rotate")])
def test_a_width_that_stays_whole_beside_another_change_is_no_mistake(
    tiny_llama: Path, text_file: Path, asked: tuple[str, ...]
) -> None:
    run = run_cli("prune", tiny_llama, *asked, "--calibration", text_file, *CALIBRATED, "--dry-run")
    assert run.code == 0, run.stderr


def test_widths_that_stay_whole_beside_fewer_tokens_are_no_mistake(make_tiny: Callable[..., Path]) -> None:
    model = make_tiny(vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(model)
    for command in (("prune", *BY_CHANCE, "--dry-run"), ("inspect",)):
        run = run_cli(command[0], model, "--layers", "2", "--vocab-size", "320", *command[1:], "--json")
        assert run.code == 0 and json.loads(run.stdout)["vocabulary"]["after"] == 320, run.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--kv-groups", "20%"), "1 of 2 KV groups go, 50% instead of 20%"),
        (("--heads", "10%"), "2 of 8 query heads go, 25% instead of 10%"),
        (("--heads", "25%"), ""),
        (("--kv-groups", "50%"), ""),
    ],
)
def test_a_ratio_that_comes_to_more_is_told(tiny_llama: Path, asked: tuple[str, ...], said: str) -> None:
    run = run_cli("prune", tiny_llama, *asked, *BY_CHANCE, "--dry-run", "--json")
    assert run.code == 0, run.stderr
    told = [text for text in json.loads(run.stdout)["deviations"] if " go, " in text]
    assert len(told) == bool(said) and all(text.startswith(said) for text in told), told
    assert said in run.stderr
