"""A plan that was saved can be replayed, and one that is not whole says what is wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.coupling.trace import Instance
from llmprune_cli.errors import CheckpointError
from llmprune_cli.family.widths import Width, Widths
from llmprune_cli.plan.document import Plan
from support.checkpoints import rewrite
from support.cli import BY_CHANCE, BY_MAGNITUDE, run_cli
from support.refusals import edit_json

Change = Callable[[dict[str, Any]], object]
WHOLE = Widths(8, 4, 2, 2, 6, 2, num_experts=3)
PLAN = Plan(
    fingerprint="0" * 64,
    before=WHOLE,
    after=replace(WHOLE, hidden_size=4, intermediate_size=3),
    importance="random",
    seed=3,
    deviations=("hidden_size is 4 instead of 5",),
    layers=(0, 1),
    protected=(),
    keep={
        Width.HIDDEN: {Instance(): (0, 1, 4, 7)},
        Width.NEURONS: {Instance(0): (0, 2, 4), Instance(1, (2,)): (1, 2, 3), Instance(1, component=1): (3, 4, 5)},
    },
)


def test_a_plan_is_what_it_was_when_read_again(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert PLAN.to_json()["keep"] == {
        "hidden_size": {"": [0, 1, 4, 7]},
        "intermediate_size": {"0": [0, 2, 4], "1.2": [1, 2, 3], "1#1": [3, 4, 5]},
    }


def neurons(units: dict[str, Any]) -> Change:
    return lambda plan: plan["keep"]["intermediate_size"].update(units)


def heads(kept: list[int], groups: list[int]) -> Change:
    def change(plan: dict[str, Any]) -> None:
        plan["after"].update(num_attention_heads=len(kept), num_key_value_heads=len(groups))
        plan["keep"].update(num_attention_heads={"0": kept}, num_key_value_heads={"0": groups})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.pop("keep"), "is not a plan (keep: Field required)."),
        (lambda plan: plan.pop("plan_version"), "is not a plan of version 3."),
        (lambda plan: plan.update(plan_version=99), "is not a plan of version 3."),
        (lambda plan: plan.update(surprise=1), "is not a plan (surprise: Unexpected"),
        (lambda plan: plan.update(seed=True), "is not a plan (seed: Input should be a valid integer)."),
        (lambda plan: plan.update(weights=7), "is not a plan (weights: Input should be a valid string)."),
        (lambda plan: plan.update(importance=7), "is not a plan (importance: Input should be a valid string)."),
        (lambda plan: plan.update(layers=[0, "last"]), "is not a plan (layers[1]: Input should be a valid integer)."),
        (lambda plan: plan["after"].update(hidden_size="4"), "is not a plan (after.hidden_size: Input should be"),
        (lambda plan: plan["before"].update(num_expert=4), "is not a plan (before.num_expert: Unexpected"),
        (lambda plan: plan["before"].pop("head_dim"), "is not a plan (before.head_dim: Field required)."),
        (neurons({"0": [0.0, 1, 2]}), 'is not a plan (keep.intermediate_size["0"][0]: Input should be'),
        (neurons({"0": ["a"] * 10**5}), 'is not a plan (keep.intermediate_size["0"][0]: Input should be'),
        (neurons({"00": [0, 1, 2]}), "is not a plan (keep.intermediate_size[\"00\"]: '00' names no place"),
        (lambda plan: plan["keep"].update(to_json={}), "contradicts itself: keep.to_json is not a width."),
        (
            lambda plan: plan["keep"]["hidden_size"].update({"": [1]}),
            'keep.hidden_size[""] lists 1 of 8, but after.hidd',
        ),
        (
            lambda plan: plan["before"].update(hidden_size=7),
            'keep.hidden_size[""] must be different numbers from 0',
        ),
        (
            neurons({"0": [0, 4, 2]}),
            '["0"] must be different numbers from 0 to 5 in their order.',
        ),
        (neurons({"0": [-1, 2, 4]}), 'keep.intermediate_size["0"] must be different numbers from 0 to 5'),
        (neurons({"0": [2, 2, 4]}), 'keep.intermediate_size["0"] must be different numbers from 0 to 5'),
        (
            lambda plan: plan.update(layers=[1]),
            "contradicts itself: layers lists 1 of 2, but after.num_hidden_layers is 2",
        ),
        (
            lambda plan: plan.update(protected=[7]),
            "protected has layer 7, which is not in layers.",
        ),
        (
            lambda plan: (plan["after"].update(hidden_size=0), plan["keep"]["hidden_size"].update({"": []})),
            "after.hidden_size is 0, and one must stay.",
        ),
        (heads([0, 2], [0]), 'keep.num_attention_heads["0"] must name 2 query heads of each KV group that stays'),
        (heads([2, 3], [0]), 'keep.num_attention_heads["0"] must name 2 query heads of each KV group that stays'),
        (lambda plan: plan.update(protected=[0]), "are protected, but hidden_size, intermediate_size shrink in all"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(change: Change, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    edit_json(path, change)
    with pytest.raises(CheckpointError) as refused:
        Plan.load(path)
    message = str(refused.value)
    assert message.startswith(f"{path} ") and words in message and message.endswith("with --save-plan.")
    assert len(message) < 400


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


def test_a_plan_of_other_weights_is_replayed_with_a_warning(tiny_llama: Path, tmp_path: Path) -> None:
    """Of a copy in files of other sizes and dates it is replayed without, and so is a plan that does not say."""
    plan = tmp_path / "plan.json"
    copy = rewrite(tiny_llama, tmp_path / "copy", lambda tensors: tensors)
    trained = rewrite(tiny_llama, tmp_path / "trained", lambda tensors: {n: t + 0.01 for n, t in tensors.items()})
    described = tmp_path / "described"
    described.mkdir()
    shutil.copy(tiny_llama / "config.json", described)
    saved = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--pruning-ratio", "0.5", "--save-plan", plan)
    assert saved.code == 0, saved.stderr

    def warned(model: Path) -> bool:
        again = tmp_path / "again.json"
        run = run_cli("prune", model, *BY_MAGNITUDE, "--plan", plan, "--dry-run")
        assert run.code == 0, run.stderr
        run_cli("prune", model, *BY_MAGNITUDE, "--plan", plan, "--save-plan", again)
        assert model == described or again.read_bytes() == plan.read_bytes()  # it says whose it was
        return "was made for other weights" in run.stderr

    assert [warned(model) for model in (tiny_llama, copy, trained, described)] == [False, False, True, False]
    edit_json(plan, lambda own: own.pop("weights"))
    Plan.load(plan).save(plan)
    assert not warned(trained)
