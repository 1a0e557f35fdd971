"""A sweep that heals: every size is judged as it is after its training, on text that none was trained on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from llmprune_cli.cli.sweep import print_sweep
from llmprune_cli.commands.recover import task
from llmprune_cli.commands.sweep.request import Kept, Points, Sweep
from llmprune_cli.errors import DivergedError
from llmprune_cli.heal.training import trainer
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.options import ModelReference, Text
from llmprune_cli.report.json_results import SweepResult
from llmprune_cli.report.schemas import DOCUMENTS, adapter_of
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.windows import Reader
from support.cli import Run, run_cli
from support.full import in_full
from support.refusals import CHECKPOINT, INTERRUPTED, PLAN, VERIFICATION, assert_refused
from support.stock import load_stock, written_tensors
from support.tiny import save_tiny

SIZES = ("--mlp", "25%,50%", "--importance", "range")
HEALING = ("--recover", "4k")
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "llmprune_cli")
COLUMNS = 80
FEWER_TOKENS, WINDOW = 160, 40
Words = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("healed") / "model", initializer_range=0.15)


@pytest.fixture(scope="module")
def corpus(model: Path) -> Path:
    """Text in which no window is there twice."""
    path = model.with_name("corpus.txt")
    path.write_text(" ".join(f"The quick brown fox jumps {number} times over the dog." for number in range(1000)))
    return path


@pytest.fixture(scope="module")
def text(corpus: Path) -> Words:
    tokens = ("--calibration-tokens", f"{FEWER_TOKENS}", "--calibration-seq-len", f"{WINDOW}")
    return "--calibration", corpus, *tokens


def done(*words: str | Path) -> Run:
    run = run_cli(*words)
    assert run.code == 0, run.stderr
    return run


def judged_windows(model: Path, corpus: Path) -> torch.Tensor:
    with open_checkpoint(ModelReference(str(model)), need_weights=True) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    asked = Text(str(corpus), calibration_tokens=FEWER_TOKENS, calibration_seq_len=WINDOW)
    return prepare_calibration(asked, Reader(tokenizer, 96), 0, lambda _: None).judged


@pytest.fixture(scope="module")
def healed(model: Path, corpus: Path, text: Words) -> tuple[Path, SweepResult, list[TrainingText]]:
    """A folder with two sizes, what was said of them, and what they were trained on."""
    folder, trained_on = model.with_name("sizes"), []
    with pytest.MonkeyPatch.context() as patched:
        prepare = task.prepare_training
        patched.setattr(task, "prepare_training", lambda *given: trained_on.append(prepare(*given)) or trained_on[-1])
        options = ("--keep-models", "--report", folder / "sizes.svg", "--json")
        run = done("sweep", model, *SIZES, *text, *HEALING, "--output", folder, *options)
    result = adapter_of(DOCUMENTS["sweep"]).validate_json(run.stdout, strict=True)
    return folder, result, trained_on


@torch.no_grad()
def test_figures_are_those_of_the_healed_models_on_text_that_none_was_trained_on(
    model: Path, corpus: Path, healed: tuple[Path, SweepResult, list[TrainingText]]
) -> None:
    folder, result, trained_on = healed
    windows = judged_windows(model, corpus)
    assert result.held_out_tokens == windows[:, 1:].numel() and len(trained_on) == 2
    others = {tuple(window) for own in trained_on for window in torch.cat((own.windows, own.held_out)).tolist()}
    assert len(others) > 20 and not others & {tuple(window) for window in windows.tolist()}
    dense = functional.log_softmax(load_stock(model)(windows).logits[:, :-1], -1)
    for point in result.points:
        logs = functional.log_softmax(load_stock(folder / str(point.folder))(windows).logits[:, :-1], -1)
        lost = functional.nll_loss(logs.flatten(0, 1), windows[:, 1:].flatten())
        kl = functional.kl_div(logs, dense, reduction="sum", log_target=True) / windows[:, 1:].numel()
        assert point.perplexity == pytest.approx(math.exp(float(lost)), rel=1e-4)
        assert point.kl == pytest.approx(float(kl), rel=1e-3)
        assert point.before_healing is not None and point.kl < point.before_healing.kl
        assert point.healed_tokens == 4000
    assert result.dense.before_healing is None and result.dense.healed_tokens == 0


def test_each_size_is_pruned_as_without_healing_and_kept_healed(
    model: Path, text: Words, healed: tuple[Path, SweepResult, list[TrainingText]], tmp_path: Path
) -> None:
    folder, result, _ = healed
    plain = json.loads(done("sweep", model, *SIZES, *text, "--keep-models", "-o", tmp_path / "plain", "--json").stdout)
    for point, before in zip(result.points, plain["points"], strict=True):
        said = point.before_healing
        assert said is not None and point.parameters == before["parameters"]
        assert (said.kl, said.perplexity) == (before["kl"], before["perplexity"])
        assert said.bits_per_byte == before["bits_per_byte"]
        manifest = json.loads((folder / point.name / "llmprune.json").read_text())
        assert manifest["healing"]["tokens"] == point.healed_tokens and manifest["recipe"]["recover"] == "4k"
        one, other = (written_tensors(own / point.name) for own in (folder, tmp_path / "plain"))
        assert one.keys() == other.keys() and not any(one[name].equal(other[name]) for name in one)
        done("inspect", folder / point.name, "--verify")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["mlp-25%", "mlp-50%"]
    drawn = (folder / "sizes.svg").read_text()
    assert "healed" in drawn and "pruned" in drawn


ASKED_OF, ASKED = ModelReference("whole"), Sweep(Points(mlp=(0.25, 0.5)), delivery=Kept(recover="4k"))


def test_the_table_says_what_was_healed_and_fits_into_80_columns(
    healed: tuple[Path, SweepResult, list[TrainingText]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result, _ = healed
    wide = {"num_attention_heads": 128, "num_key_value_heads": 16, "intermediate_size": 53_248}
    dense = replace(result.dense, parameters=405 * 10**9, size_bytes=811 * 10**9, perplexity=1e12)
    for changed in (result, replace(result, dense=replace(dense, widths=replace(dense.widths, **wide)))):
        print_sweep(replace(changed, output=None), ASKED_OF, ASKED)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= COLUMNS and "…" not in shown, shown
        assert "Healed on 4,000 tokens each" in shown and "healed" in shown, shown
    print_sweep(replace(result, points=tuple(replace(own, folder=None) for own in result.points)), ASKED_OF, ASKED)
    assert "--plan" in (said := capsys.readouterr().out) and "--recover 4k -o pruned" in said


def without_times(document: Any) -> Any:
    if isinstance(document, dict):
        varying = ("seconds", "output", "prefill_tokens_per_second", "prefill_spread")
        return {name: without_times(value) for name, value in document.items() if name not in varying}
    return [without_times(each) for each in document] if isinstance(document, list) else document


def test_work_goes_on_within_the_training_of_a_size(
    model: Path, text: Words, healed: tuple[Path, SweepResult, list[TrainingText]], tmp_path: Path
) -> None:
    command = ("sweep", model, *SIZES, *text, *HEALING, "--keep-models", "--output", tmp_path / "out", "--json")
    with pytest.MonkeyPatch.context() as patched:
        mark = trainer.mark_whole

        def interrupted(folder: Path, number: int) -> None:
            mark(folder, number)
            if "mlp-50%" in str(folder):
                raise KeyboardInterrupt

        patched.setattr(trainer, "mark_whole", interrupted)
        stopped = run_cli(*command)
    assert stopped.code == INTERRUPTED and "--resume goes on from there" in " ".join(stopped.stderr.split())
    assert not (tmp_path / "out").exists()
    other = run_cli(*command[:-1], "--resume", "--recover", "2k")
    assert_refused(other, PLAN, "tokens to heal on was 4k and is 2k")
    run = done(*command, "--resume")
    assert "mlp-50% (2 of 2): Judging" in run.stderr
    assert not any(stage in run.stderr for stage in ("mlp-25%", "Refitting", "starting at the beginning")), run.stderr
    folder, result, _ = healed
    said = without_times(json.loads((folder / "sweep.json").read_text()))
    assert without_times(json.loads(run.stdout)) == said
    for point in result.points:
        one, two = written_tensors(folder / point.name), written_tensors(tmp_path / "out" / point.name)
        assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_size_that_cannot_be_healed_costs_no_other(model: Path, text: Words, tmp_path: Path) -> None:
    command = ("sweep", model, *SIZES, *text, *HEALING, "--output", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patched:
        mark = trainer.mark_whole

        def diverged(folder: Path, number: int) -> None:
            mark(folder, number)
            if "mlp-50%" in str(folder):
                raise DivergedError("The loss became NaN.")

        patched.setattr(trainer, "mark_whole", diverged)
        stopped = run_cli(*command)
    assert_refused(stopped, VERIFICATION, "became NaN", "--resume goes on from there")
    (kept,) = tmp_path.glob(".out*")
    assert (kept / "point-mlp-25%.json").is_file() and not [*kept.glob("**/checkpoint-*")]


@in_full
def test_two_processes_heal_as_one_does(
    model: Path, text: Words, healed: tuple[Path, SweepResult, list[TrainingText]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", *LAUNCH, "sweep", model, *SIZES, *text, *HEALING, "-o", tmp_path / "two", "--json"]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for one, two in zip(healed[1].points, json.loads(run.stdout)["points"], strict=True):
        assert two["kl"] == pytest.approx(one.kl, rel=0.02) and two["before_healing"]["kl"] > two["kl"]


def test_too_little_text_is_told_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The quick brown fox jumps over the lazy dog, and then it does so again at noon. ")
    run = run_cli("sweep", model, *SIZES, "--calibration", short, "--calibration-seq-len", "36", *HEALING)
    assert_refused(run, CHECKPOINT, "--recover:", "tokens to train on", "Give more text")
    assert "Measuring" not in run.stderr


@in_full
def test_text_that_repeats_itself_is_told(model: Path, text_file: Path) -> None:
    run = done("sweep", model, "--mlp", "50%", "--calibration", text_file, "--calibration-seq-len", "36", *HEALING)
    assert "repeats itself" in run.stderr
