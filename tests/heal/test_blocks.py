"""One layer after the other learns to turn the pruned model's stream into the teacher's."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune_cli.commands.recover import blocks
from llmprune_cli.heal.blocks import walk
from llmprune_cli.report.schemas import DOCUMENTS, adapter_of
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.heal_runs import recover, run_recover
from support.refusals import INTERRUPTED, OUTPUT, UNSUPPORTED, USAGE, VERIFICATION, assert_refused, state_of
from support.stock import written_tensors
from support.tiny import save_tiny

BLOCKS = ("--mode", "blocks")


def test_layers_are_healed_one_after_the_other(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    healed = tmp_path / "healed"
    result = recover(pruned, text_file, healed, *BLOCKS, "--report", tmp_path / "curve.svg")
    assert result["mode"] == "blocks" and result["is_better"]
    assert result["after"]["kl"] < 0.8 * result["before"]["kl"]
    assert [own["layer"] for own in result["layers"]] == [0, 1]
    assert all(own["error_after"] < own["error_before"] for own in result["layers"])
    adapter_of(DOCUMENTS["recover"]).validate_json(json.dumps(result), strict=True)
    before, after = written_tensors(pruned), written_tensors(healed)
    assert {name: (own.shape, own.dtype) for name, own in before.items()} == {
        name: (own.shape, own.dtype) for name, own in after.items()
    }
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".layers." in name
    }
    assert result["trained_parameters"] == sum(own.numel() for name, own in before.items() if ".layers." in name)
    _, info = AutoModelForCausalLM.from_pretrained(healed, output_loading_info=True)
    assert not any(info.values())
    assert run_cli("inspect", healed, "--verify").code == 0
    manifest = json.loads((healed / "llmprune.json").read_text())
    assert manifest["source"] == result["teacher"] and manifest["healing"]["mode"] == "blocks"
    assert "Then it was trained on 2,048 tokens" in (healed / "README.md").read_text()
    assert "layer by layer" in (healed / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.svg", "healed"]


@in_full
def test_what_is_said_of_held_out_text_is_what_the_whole_model_does(
    pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    blocks = recover(pruned, text_file, tmp_path / "blocks", *BLOCKS)
    whole = recover(pruned, text_file, tmp_path / "whole", "--teacher-mode", "resident")
    for figure in ("perplexity", "bits_per_byte"):
        assert blocks["before"][figure] == pytest.approx(whole["before"][figure], rel=1e-4)
    assert blocks["before"]["kl"] == pytest.approx(whole["before"]["kl"], rel=0.02)  # of tokens that are kept of it


@in_full
def test_layers_that_went_are_made_up_for(text_file: Path, tmp_path: Path) -> None:
    deep = save_tiny(tmp_path / "deep", initializer_range=0.1, num_hidden_layers=4)
    run = run_cli("prune", deep, *BY_MAGNITUDE, "--drop-layers", "0,2", "--output", tmp_path / "pruned")
    assert run.code == 0, run.stderr
    result = recover(tmp_path / "pruned", text_file, tmp_path / "healed", *BLOCKS, "--train", "mlp")
    assert result["is_better"] and all(own["error_after"] < 0.9 * own["error_before"] for own in result["layers"])
    before, after = written_tensors(tmp_path / "pruned"), written_tensors(tmp_path / "healed")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".mlp." in name
    }


@in_full
def test_a_resumed_run_goes_on_behind_the_last_finished_layer(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    recover(pruned, text_file, tmp_path / "whole", *BLOCKS)
    train, trained = walk.train_layer, []

    def interrupted(*given: object) -> None:
        trained.append(given)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(walk, "train_layer", interrupted)
        cut = run_recover(pruned, text_file, tmp_path / "out", *BLOCKS)
        assert cut.code == INTERRUPTED and "--resume goes on from there" in " ".join(cut.stderr.split())
        recover(pruned, text_file, tmp_path / "out", *BLOCKS, "--resume")
    assert len(trained) == 3  # the second layer twice
    expected, found = written_tensors(tmp_path / "whole"), written_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@in_full
def test_a_layer_that_gains_nothing_stays_as_it_was(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    run = run_recover(pruned, text_file, tmp_path / "out", *BLOCKS, "--learning-rate", "0.5")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["trained_parameters"] == 0 and "no better than" in run.stderr
    before, after = written_tensors(pruned), written_tensors(tmp_path / "out")
    assert all(torch.equal(own, after[name]) for name, own in before.items())


@pytest.mark.parametrize(
    "options",
    [
        ("--lora", "4"),
        ("--loss", "ce"),
        ("--loss-on", "assistant"),
        ("--temperature", "2"),
        ("--hidden-weight", "1"),
        ("--gradient-checkpointing",),
        ("--teacher-mode", "resident"),
        ("--teacher-cache", "cache"),
    ],
)
def test_options_that_are_about_the_whole_model(
    pruned: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run = run_recover(pruned, text_file, tmp_path / "out", *BLOCKS, *options)
    assert_refused(run, USAGE, options[0], "--mode blocks")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--learning-rate", "auto")])
def test_layers_without_weights_of_the_kind_that_is_named_are_refused(
    tiny_of: Callable[[str], Path], text_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    olmo = tiny_of("olmo")
    asked = ("--teacher", olmo, *BLOCKS, "--train", "norms", *options)
    run = run_recover(olmo, text_file, tmp_path / "out", *asked)
    assert_refused(run, UNSUPPORTED, "layers of olmo have no weights that --train norms names")
    assert not list(tmp_path.iterdir())


def test_learning_rates_are_tried_on_a_layer_that_is_trained(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here as if the first one had no weights to train."""
    load, loaded = walk._load_trained, list[int]()

    def noting(own: walk.Walk, number: int) -> Any:
        loaded.append(number)
        return load(own, number)

    monkeypatch.setattr(blocks, "first_trained", lambda *_: 1)
    monkeypatch.setattr(walk, "_load_trained", noting)
    result = recover(pruned, text_file, tmp_path / "out", *BLOCKS, "--learning-rate", "auto", "--tokens", "512")
    tried = len(result["tried_rates"])
    assert loaded == [*[1] * tried, 0, 1] and all(own["loss"] is not None for own in result["tried_rates"])


@in_full
def test_what_cannot_be_healed_by_blocks_is_refused(
    dense: Path, pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = tmp_path / "narrow"
    assert run_cli("prune", dense, *BY_MAGNITUDE, "--hidden-size", "32", "--output", narrow).code == 0
    before = state_of(tmp_path)
    run = run_recover(narrow, text_file, tmp_path / "out", *BLOCKS)
    assert_refused(run, UNSUPPORTED, "32 channels and not 64", "--mode blocks")
    run = run_recover(pruned, text_file, tmp_path / "out", *BLOCKS, "--learning-rate", "1e30")
    assert_refused(run, VERIFICATION, "in step 3 of a layer", "smaller --learning-rate than 1e+30")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 300_000))
    run = run_recover(pruned, text_file, tmp_path / "out", *BLOCKS)
    assert_refused(run, OUTPUT, "300,000 bytes", "hidden states", "--tokens")
    assert state_of(tmp_path) == before
