"""A learning rate that a few short trials find."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llmprune_cli.errors import VerificationError
from llmprune_cli.heal.options import usual_learning_rate
from llmprune_cli.heal.training import learning_rate
from llmprune_cli.heal.training.learning_rate import best_rate, search_rates
from llmprune_cli.heal.training_text import Schedule, TrainingText
from llmprune_cli.text.corpus import Corpus
from support.full import in_full
from support.heal_runs import recover, run_recover
from support.refusals import INTERRUPTED

SIZE, STEPS = 10**6, 64
USUAL = usual_learning_rate(SIZE, 16)
AUTO = ("--learning-rate", "auto")


@pytest.mark.parametrize(
    ("best", "largest", "tried", "chosen"),
    [
        (1, 99, (1, 2, 0.5), 1),
        (4, 99, (1, 2, 4, 8), 4),
        (0.25, 99, (1, 2, 0.5, 0.25, 0.125), 0.25),
        (1, 0.5, (1, 2, 0.5, 0.25), 0.5),
    ],
)
def test_rates_are_doubled_or_halved_as_long_as_that_helps(
    best: float, largest: float, tried: tuple[float, ...], chosen: float
) -> None:
    text = TrainingText(
        Corpus("", "", ""),
        torch.zeros(8, 4),
        torch.arange(2 * STEPS),
        torch.zeros(1, 4),
        1,
        Schedule(2, 1, STEPS, STEPS),
    )

    def judge(rate: float, own: TrainingText) -> float:
        assert len(own.order) == 32 and own.schedule.steps == 16
        if rate > largest * USUAL:
            raise VerificationError("The loss became NaN.")
        return 1 + math.log(rate / USUAL / best) ** 2

    trials = search_rates(SIZE, text, judge)
    assert [own.learning_rate / USUAL for own in trials] == pytest.approx(tried)
    assert best_rate(trials, SIZE, STEPS) == pytest.approx(chosen * usual_learning_rate(SIZE, STEPS))


@pytest.mark.parametrize("mode", [pytest.param("end-to-end", marks=in_full), "blocks"])
def test_what_was_found_is_trained_with_and_found_once(
    pruned: Path, text_file: Path, tmp_path: Path, mode: str
) -> None:
    place = {
        "end-to-end": "llmprune_cli.heal.training.trainer.mark_whole",
        "blocks": "llmprune_cli.heal.blocks.walk._store",
    }

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(place[mode], interrupted)
        cut = run_recover(pruned, text_file, tmp_path / "out", *AUTO, "--mode", mode)
    assert cut.code == INTERRUPTED
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(learning_rate, "MOST_TRIALS", 0)  # another search would find something else
        result = recover(pruned, text_file, tmp_path / "out", *AUTO, "--mode", mode, "--resume")
    trials = result["tried_rates"]
    assert len(trials) >= 3 and all(own["steps"] == 16 for own in trials)
    best = min(trials, key=lambda own: own["loss"])
    assert result["learning_rate"] == pytest.approx(best["learning_rate"]) and result["is_better"]  # all 16 steps
    assert not list(tmp_path.glob("**/start.safetensors"))
