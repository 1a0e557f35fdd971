"""The sum of ranks of two measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from llmprune_cli.choose.consensus import agree
from llmprune_cli.choose.measuring import Activity
from llmprune_cli.coupling.trace import Instance
from support.cli import run_cli


def activity(**scores: dict[Instance, torch.Tensor]) -> Activity:
    return Activity(scores, (0.5, 0.25))


def test_units_go_by_the_sum_of_their_ranks_and_ties_by_the_first() -> None:
    generator = numpy.random.default_rng(3)
    one, other = generator.permutation(50).astype(float), generator.permutation(50).astype(float)
    found = agree(
        activity(intermediate_size={Instance(0): torch.tensor(one)}),
        activity(intermediate_size={Instance(0): torch.tensor(other).exp()}),  # another scale and tail, the same ranks
    )
    order = found.scores["intermediate_size"][Instance(0)].argsort().tolist()
    assert order == sorted(range(50), key=lambda unit: (2 * one[unit] + other[unit], one[unit]))
    assert found.influence == (0.5, 0.25)


def test_what_only_one_has_measured_goes_by_that_one() -> None:
    found = agree(
        activity(
            num_experts={Instance(0): torch.tensor([3.0, 1.0, 2.0])},
            num_attention_heads={Instance(1): torch.tensor([2.0, 1.0])},
        ),
        activity(
            hidden_size={Instance(): torch.tensor([5.0, 9.0, 7.0])},
            num_attention_heads={Instance(0): torch.tensor([1.0, 2.0])},
        ),
    )
    orders = {f"{w} {n}": own.argsort().tolist() for w, by in found.scores.items() for n, own in by.items()}
    assert orders == {
        "num_experts 0": [1, 2, 0],
        "hidden_size ": [0, 2, 1],
        "num_attention_heads 1": [1, 0],
        "num_attention_heads 0": [0, 1],
    }


@pytest.mark.parametrize("importance", ["range", "taylor"])
def test_consensus_remembers_both_measurements(
    importance: str, tiny_llama: Path, tmp_path: Path, text_file: Path
) -> None:
    text = ("--calibration", text_file, "--calibration-tokens", "600", "--calibration-seq-len", "40")
    options = (tiny_llama, "--intermediate-size", "24", "--statistics", tmp_path / "kept", *text)
    run = run_cli("prune", *options, "--save-plan", tmp_path / "plan", "--output", tmp_path / "out")
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / "plan").read_text())["importance"] == "consensus"
    known = sorted((tmp_path / "kept").iterdir())
    assert [path.name.partition("-")[0] for path in known] == ["range", "taylor"]
    again = run_cli("prune", *options, "--importance", importance, "--output", tmp_path / "again")
    assert again.code == 0 and sorted((tmp_path / "kept").iterdir()) == known
