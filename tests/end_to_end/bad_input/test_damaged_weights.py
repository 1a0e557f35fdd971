"""Weights that are no numbers, or lead to some: found where they do harm, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import BY_MAGNITUDE, run_cli
from support.refusals import CHECKPOINT, VERIFICATION, assert_prune_refused, assert_refused

TOKENS = ("--calibration-tokens", "240", "--calibration-seq-len", "40")
NEURONS = ("--intermediate-size", "24")
CALIBRATED = (*TOKENS, *NEURONS)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.embed_tokens.weight", 3e37, "The embedding turns text into NaN"),
        ("model.layers.1.self_attn.v_proj.weight", float("inf"), "Layer 1"),
        ("model.layers.1.mlp.down_proj.weight", float("nan"), "Layer 1"),
        ("model.layers.1.mlp.down_proj.weight", 3e37, "Layer 1"),
        ("model.norm.weight", float("inf"), "The final norm or the output projection"),
        ("lm_head.weight", float("nan"), "The final norm or the output projection"),
    ],
)
def test_weights_that_are_no_numbers(
    model: Path, text_file: Path, tmp_path: Path, name: str, value: float, said: str
) -> None:
    damage(model, name, value)
    run = run_cli("prune", model, *CALIBRATED, "--calibration", text_file, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, said, "damaged")
    assert not (tmp_path / "out").exists()


def with_a_neuron_beyond_float32(model: Path) -> None:
    """Weights that are numbers, as is what their layer makes of text; but in between the squares are too large."""
    damage(model, "model.layers.1.mlp.up_proj.weight", 1e23, last_axis=False)
    damage(model, "model.layers.1.mlp.down_proj.weight", 1e-24)


@pytest.mark.parametrize("importance", ["range", "activation", "consensus"])
def test_no_importance_swallows_infinity(model: Path, text_file: Path, tmp_path: Path, importance: str) -> None:
    with_a_neuron_beyond_float32(model)
    ways = ("--importance", importance, "--refit", "none", "--calibration", text_file)
    run = run_cli("prune", model, *CALIBRATED, *ways, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "The scores by", "damaged")


@pytest.mark.parametrize("refit", ["local", "residual"])
def test_no_refit_swallows_infinity(model: Path, text_file: Path, tmp_path: Path, refit: str) -> None:
    with_a_neuron_beyond_float32(model)
    ways = ("--importance", "random", "--refit", refit, "--calibration", text_file)
    run = run_cli("prune", model, *CALIBRATED, *ways, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "model.layers.1.mlp.down_proj.weight reads is too large for float32")


@pytest.mark.parametrize("refit", ["local", "residual"])
def test_solved_weights_that_their_dtype_cannot_hold(
    make_tiny: Callable[..., Path], text_file: Path, tmp_path: Path, refit: str
) -> None:
    """Neurons twice, so that one of each pair has to do the work of both, with weights beyond 65,504."""
    from safetensors.torch import load_file, save_file

    model = make_tiny(dtype="float16", shard="10MB")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "up_proj" in name or "gate_proj" in name:
            tensor[24:] = tensor[:24]
        elif "down_proj" in name:
            tensor.copy_(tensor.sign() * 6e4)[:, 24:] = tensor[:, :24].sign() * 6e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ways = ("--importance", "range", "--refit", refit, "--calibration", text_file)
    run = run_cli("prune", model, *CALIBRATED, *ways, "--output", tmp_path / "out")
    assert_refused(run, VERIFICATION, "model.layers.0.mlp.down_proj.weight would be written", "as float16")


@pytest.mark.parametrize(
    "ways",
    [
        ("--importance", "range", *NEURONS),
        ("--importance", "taylor", *NEURONS),
        ("--importance", "random", "--refit", "local", *NEURONS),
        ("--importance", "random", "--refit", "none", "--layers", "1", "--layer-importance", "loss"),
        ("--rotate", "--hidden-size", "32", "--refit", "none"),
    ],
    ids=["activity", "gradients", "refit", "leaving out layers", "rotation"],
)
def test_every_sweep_over_layers_stops_at_the_damaged_one(
    model: Path, text_file: Path, tmp_path: Path, ways: tuple[str, ...]
) -> None:
    damage(model, "model.layers.1.mlp.down_proj.weight", float("nan"))
    run = run_cli("prune", model, *TOKENS, *ways, "--calibration", text_file, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "Layer 1 turns text into NaN", "damaged")


def test_a_search_stops_at_a_damaged_output_projection(model: Path, text_file: Path, tmp_path: Path) -> None:
    damage(model, "lm_head.weight", float("nan"))
    ways = ("--target-params", "80%", "--importance", "range", "--calibration", text_file)
    run = run_cli("prune", model, *TOKENS, *ways, "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "The final norm or the output projection", "damaged")


def test_weights_that_are_all_zero_are_no_damage(model: Path, tmp_path: Path) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        damage(model, f"model.layers.1.mlp.{projection}.weight", 0.0, everywhere=True)
    run = run_cli("prune", model, *BY_MAGNITUDE, *NEURONS, "--output", tmp_path / "out")
    assert run.code == 0, run.stderr


def test_scores_that_are_no_numbers_choose_nothing(model: Path, tmp_path: Path) -> None:
    damage(model, "model.layers.1.mlp.gate_proj.weight", float("nan"))
    assert_prune_refused(model, tmp_path, CHECKPOINT, "The scores by hidden_size are NaN", "damaged")
    cut = ("--intermediate-size", "24")
    assert_prune_refused(model, tmp_path, CHECKPOINT, "intermediate_size of layer 1", "damaged", options=cut)


def damage(model: Path, name: str, value: float, last_axis: bool = True, everywhere: bool = False) -> None:
    """Put a value into one element of a vector, into one column or row of a matrix, or everywhere."""
    from safetensors.torch import load_file, save_file

    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][... if everywhere else (..., 0) if last_axis else 0] = value
            save_file(tensors, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)
