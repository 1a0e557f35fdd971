"""Tasks of lm-evaluation-harness: the same answers as the harness itself gets, and clear refusals without it."""

from __future__ import annotations

import io
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli import evaluate
from llmprune_cli.cli.screen.answers import answers_table
from llmprune_cli.report.json_results import EvalResult
from llmprune_cli.run.questions.figures import TaskResult
from support.cli import BY_MAGNITUDE, evaluated, run_cli
from support.refusals import CHECKPOINT, UNSUPPORTED, USAGE, assert_refused

HARNESS = find_spec("lm_eval") is not None
needs_the_harness = pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed; run make check-consumers")
ANIMALS = ("fox", "dog", "cat", "cow")
TASK = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
STORY = """
task: story
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks, with their questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"text": f"the quick brown {animal}", "choices": ANIMALS, "answer": n % 4}
        for n, animal in enumerate(ANIMALS * 3)
    ]
    Path("animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("animals.yaml").write_text(TASK.replace("DATA", str(tmp_path / "animals.jsonl")))
    Path("story.yaml").write_text(STORY.replace("DATA", str(tmp_path / "animals.jsonl")))
    return tmp_path


@needs_the_harness
@pytest.mark.filterwarnings("ignore")  # those of the harness
def test_answers_stand_beside_each_other(tiny_llama: Path, place: Path, text_file: Path) -> None:
    small = place / "small"
    assert run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", small).code == 0
    options = ("--tasks", "animals.yaml,story.yaml", "--dataset", text_file, "--max-seq-len", "32", "--limit", "8")
    report = evaluated(tiny_llama, small, *options)
    for result in report["results"]:
        figures = {(own["task"], own["metric"]): own for own in result["tasks"]}
        assert {*figures} == {("animals", "acc"), ("animals", "acc_norm"), ("story", "bits_per_byte")}
        accuracy = figures["animals", "acc"]
        expected = (accuracy["value"] * (1 - accuracy["value"]) / 7) ** 0.5
        assert accuracy["questions"] == 8 and accuracy["stderr"] == pytest.approx(expected)
        assert accuracy["version"] == "2.0" and accuracy["higher_is_better"] and accuracy["shots"] == 0
    own = [_of_the_harness(folder) for folder in (tiny_llama, small)]
    assert [result["tasks"][0]["value"] for result in report["results"]] == [each["acc,none"] for each in own]
    values = [result["tasks"][-1]["value"] for result in report["results"]]
    assert values[0] != values[1]
    shown = run_cli("eval", tiny_llama, small, *options)
    assert f"{values[1]:.4f}" in shown.stdout and f"{values[1] - values[0]:+.4f}" in shown.stdout, shown.stdout
    assert "Asking" in shown.stderr and "it/s" not in shown.stderr


def _of_the_harness(folder: Path) -> dict[str, Any]:
    """What it finds out by itself, from the folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    asked = {"tasks": ["animals.yaml"], "device": "cpu", "limit": 8, "task_manager": manager}
    found = simple_evaluate("hf", {"pretrained": str(folder)}, **asked)
    return dict(found["results"]["animals"])


@needs_the_harness
@pytest.mark.filterwarnings("ignore")
def test_python_asks_quietly(tiny_llama: Path, place: Path, text_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = []
    report = evaluate(
        tiny_llama,
        tasks="animals.yaml",
        dataset=text_file,
        max_seq_len=32,
        limit=2,
        progress=lambda progress: stages.append((progress.stage, progress.done, progress.total)),
    )
    assert [own.questions for own in report.results[0].tasks] == [2, 2]
    assert (f"Asking {tiny_llama}", 8, 8) in stages
    assert capfd.readouterr() == ("", "") and logging.getLogger("lm_eval").level != logging.ERROR


@needs_the_harness
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_cannot_be_read_is_told_before_any_model_is(tiny_llama: Path, place: Path) -> None:
    Path("animals.jsonl").unlink()
    run = run_cli("eval", tiny_llama, "--tasks", "animals.yaml")
    assert_refused(run, CHECKPOINT, "The tasks animals.yaml cannot be read", "HF_HUB_OFFLINE")
    assert "Loading" not in run.stderr
    Path("animals.yaml").write_text("task: [")
    assert_refused(run_cli("eval", tiny_llama, "--tasks", "animals.yaml"), CHECKPOINT, "animals.yaml cannot be read")


def test_what_cannot_be_asked_is_told_at_once(tiny_llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run_cli("eval", tiny_llama, "--tasks", "nope.yaml"), CHECKPOINT, "nope.yaml does not exist")
    run = run_cli("eval", tiny_llama, "--tasks", "animals.jsonl")
    assert_refused(run, CHECKPOINT, "animals.jsonl is no task", "data_files: {test: animals.jsonl}")
    assert_refused(run_cli("eval", tiny_llama, "--tasks", "arc_easy,,hellaswag"), USAGE, "arc_easy,hellaswag")
    assert_refused(run_cli("eval", tiny_llama, "--tasks", "arc_easy,arc_easy"), USAGE, "each of them once")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("llmprune_cli.run.questions.request.find_spec", lambda name: None)
    run = run_cli("eval", tiny_llama, "--tasks", "animals.yaml")
    assert_refused(run, UNSUPPORTED, "pip install 'llmprune[tasks]'")


def test_the_table_fits_and_shows_a_group_in_the_place_of_its_parts() -> None:
    from rich.console import Console

    def result(model: str, value: float) -> EvalResult:
        numbers = {"perplexity": 1.0, "mean_nll": 1.0, "bits_per_byte": 1.0, "seconds": 1.0, "tokens_per_second": 1.0}
        counts = {"bytes": 1, "windows": 1, "tokens": 1, "max_seq_len": 1, "parameters": 1, "size_bytes": 1}
        tasks = [
            TaskResult(name, metric, value, 0.0123, 1000, 0, "1", True, group)
            for name, metric, group in (
                ("mmlu", "acc", None),
                ("mmlu_astronomy", "acc", "mmlu"),
                ("a_task_whose_name_goes_on_and_on", "acc_norm", "a_tag_without_figures"),
            )
        ]
        return EvalResult(
            model,
            **numbers,
            **counts,
            same_tokens=True,
            kl=None,
            dtype="float32",
            peak_memory_bytes=1,
            tasks=(*tasks,),  # type: ignore[arg-type]
        )

    results = [result("meta-llama/Llama-3.1-8B-Instruct", 0.75), result("a-folder/that-was-pruned-and-healed", 0.5)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(answers_table(results, console.width))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    assert "astronomy" not in shown and "0.7500" in shown and "0.0123" in shown and shown.count("-0.2500") == 2, shown
