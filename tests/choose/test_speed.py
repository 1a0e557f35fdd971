"""A target in time: widths are searched whose model is so much faster here, by what is measured."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmprune_cli import prune
from llmprune_cli.choose.targets.limits import whole_target
from llmprune_cli.choose.targets.speed import Race, SpeedLimit, work_of
from llmprune_cli.cli.prune import print_prune
from llmprune_cli.commands.requests import PruneRequest
from llmprune_cli.coupling.subject import understand
from llmprune_cli.errors import PlanError
from llmprune_cli.options import Choice, Delivery, ModelReference, WidthRequest
from llmprune_cli.plan.requested_widths import resolve
from llmprune_cli.progress import QUIET
from llmprune_cli.run.speed import clock
from llmprune_cli.run.speed.figures import Pace, SpeedResult
from llmprune_cli.run.speed.timed_model import PassTime, RunTime, Work
from llmprune_cli.source.opening import open_checkpoint
from support import families
from support.cli import run_cli
from support.full import in_full
from support.gguf_exports import tiny
from support.refusals import PLAN, assert_refused
from support.stock import load_stock
from support.tiny import save_tiny

FAMILIES = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "deepseek_v3", "mamba2", "jamba", "lfm2"]


@pytest.fixture(autouse=True)
def only_this_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CPU seconds instead of the time that passes while others work."""
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=time.process_time))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers enough to be faster without some of them, however small they are."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4, initializer_range=0.15)


def test_the_time_of_a_model_is_that_of_its_parts() -> None:
    run = RunTime(PassTime(3.0, {0: 1.0, 1: 2.0}), PassTime(0.3, {0: 0.1, 1: 0.2}))
    assert run.of((0, 1, 1), Work(1, 100, new_tokens=10)) == pytest.approx(3 + 5 + 10 * (0.3 + 0.5))
    assert run.of((0,), Work(1, 100, new_tokens=10)) == pytest.approx(3 + 1 + 10 * (0.3 + 0.1))


@in_full
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_of_any_kind_take_less_time(family: str, tmp_path: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    source = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    with open_checkpoint(ModelReference(str(source)), need_weights=False) as checkpoint:
        subject = understand(checkpoint)
    race = Race(subject, work_of(subject, 2, 8), "cpu", QUIET)
    half = resolve(subject.architecture, {}, WidthRequest(num_hidden_layers=2))
    assert race.ratio(half) < 0.9
    figures = race.finish(half)
    assert 1 < figures.speedup < 20 and (figures.batch, figures.prompt_tokens, figures.rounds) == (2, 8, 7)
    assert figures.after.decode_tokens_per_second > figures.before.decode_tokens_per_second > 0


def test_the_figures_of_a_race_are_of_one_round(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine slows down on the way, the paces still say what the speed-up says."""

    def timed(seconds: float) -> RunTime:
        return RunTime(PassTime(0.0, {0: seconds / 4}), PassTime(0.0, {0: seconds / 4}))

    turns = ((1, 3), (1, 2), (1, 1.5), (9, 1), (9, 1), (9, 1), (9, 2))  # seconds, and how many times as fast
    slowing = [(timed(seconds), timed(seconds / faster)) for seconds, faster in turns]
    monkeypatch.setattr(Race, "_time", lambda self, widths, rounds: slowing)
    with open_checkpoint(ModelReference(str(model)), need_weights=False) as checkpoint:
        subject = understand(checkpoint)
    race = Race(subject, work_of(subject, 1, 8), "cpu", QUIET)
    figures = race.finish(resolve(subject.architecture, {}, WidthRequest()))
    assert figures.speedup == pytest.approx(1.5)
    assert figures.after.decode_tokens_per_second == pytest.approx(1.5 * figures.before.decode_tokens_per_second)
    assert figures.after.prefill_tokens_per_second == pytest.approx(1.5 * figures.before.prefill_tokens_per_second)


def test_a_model_that_is_so_much_faster_is_found_and_timed(model: Path, text_file: Path) -> None:
    text = ("--calibration", text_file, "--calibration-tokens", "80", "--calibration-seq-len", "40")
    words = ("--importance", "range", "--refit", "none", "--context", "16", "--target-batch", "3", "--round-to", "48")
    run = run_cli("prune", model, "--target-speedup", "1.3", *text, *words, "--dry-run", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["target"] == "1.3 times as fast" and len(result["dropped_layers"]) >= 1
    speed = result["speed"]
    assert (speed["batch"], speed["prompt_tokens"], speed["new_tokens"]) == (3, 16, 128)
    assert speed["speedup"] > 1.1 and speed["device"] == "cpu" and speed["dtype"] == "float32"
    assert speed["after"]["decode_tokens_per_second"] > speed["before"]["decode_tokens_per_second"]


def test_neurons_of_a_target_in_time_are_multiples_that_kernels_like(text_file: Path, tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "model", num_hidden_layers=1, intermediate_size=16448, initializer_range=0.15)
    text = ("--calibration", text_file, "--calibration-tokens", "80", "--calibration-seq-len", "40")
    asked = ("--importance", "range", "--refit", "none", "--context", "16", "--dry-run", "--json")
    run = run_cli("prune", wide, "--target-speedup", "1.1", *text, *asked)
    assert run.code == 0, run.stderr
    neurons = {candidate["widths"]["intermediate_size"] for candidate in json.loads(run.stdout)["candidates"]}
    assert min(neurons) < 16384 and not any(number % 64 for number in neurons), neurons


def test_a_time_that_was_missed_in_the_end_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pace = Pace(100.0, 10.0)
    figures = SpeedResult(1.23, 7, 1, 512, 128, "cpu", "bfloat16", 2, pace, pace)
    result = replace(prune(model, mlp="50%", importance="magnitude", refit="none", dry_run=True), speed=figures)
    for asked, is_missed in ((1.2, False), (1.3, True)):
        request = PruneRequest(
            ModelReference(str(model)), Choice(target_speedup=asked), delivery=Delivery(dry_run=True)
        )
        print_prune(result, request)
        shown = capsys.readouterr().out
        assert "1.23 times as fast" in shown and ("less than the 1.3 times" in shown) == is_missed, shown


def test_fewer_tokens_take_less_time(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", vocab_size=32768, num_hidden_layers=1)
    with open_checkpoint(ModelReference(str(source)), need_weights=False) as checkpoint:
        subject = understand(checkpoint)
    race = Race(subject, work_of(subject, 1, 8), "cpu", QUIET, tokens=1024)
    assert race.ratio(whole_target(subject)) < 0.8


@in_full
def test_a_number_of_tokens_is_a_part_of_what_is_timed_and_written(text_file: Path, tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    text = ("--calibration", text_file, "--calibration-tokens", "80", "--calibration-seq-len", "40")
    words = ("--importance", "range", "--refit", "none", "--context", "16", "--round-to", "48", "--vocab", "320")
    run = run_cli("prune", source, "--target-speedup", "1.3", *text, *words, "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["vocabulary"]["after"] == 320 and result["speed"]["speedup"] > 1.1
    best = result["candidates"][0]
    assert best["parameters"] == result["after"]["parameters"] == load_stock(tmp_path / "out").num_parameters()


def test_a_time_out_of_reach_is_told_before_anything_is_measured_on_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPRUNE_WIKITEXT2", str(tmp_path))  # no text, so that measuring would fail
    run = run_cli("prune", model, "--target-speedup", "90", "--context", "8", "--output", tmp_path / "out")
    assert_refused(run, PLAN, "the model 90 times as fast here", "times as fast (batch 1, 8 tokens read and 128")
    run = run_cli("prune", model, "--target-speedup", "2", "--context", "64", "--output", tmp_path / "out")
    assert_refused(run, PLAN, "attends to 64 tokens", "at most --context 55")


def test_a_limit_says_what_it_is(model: Path) -> None:
    with open_checkpoint(ModelReference(str(model)), need_weights=False) as checkpoint:
        subject = understand(checkpoint)
    work = work_of(subject, None, None)
    assert work == Work(1, 32), "half of what it attends to, which is less than is usual"
    limit = SpeedLimit(2.0, Race(subject, work, "cpu", QUIET))
    assert str(limit) == "the model 2 times as fast" and limit.share == 0.5
    with pytest.raises(PlanError):
        work_of(subject, 1, 100)
