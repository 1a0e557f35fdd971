"""Perplexity against a plain transformers loop, and every kind of text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BY_MAGNITUDE, run_cli
from llmprune_cli.report import eval_report
from llmprune_cli.run import perplexity as evaluation
from llmprune_cli.source.full_model import load_model

WINDOW = 32


def plain_perplexity(folder: Path, text: str, window: int, limit: int | None = None) -> float:
    """The example's protocol in ten lines of plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids[0]
    losses = []
    for start in range(0, len(tokens) - window + 1, window)[:limit]:
        batch = tokens[start : start + window].unsqueeze(0)
        with torch.no_grad():
            logits = model(batch).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def evaluated(folder: Path, *options: str | Path) -> dict[str, Any]:
    run = run_cli("eval", folder, *options, "--json")
    assert run.code == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 0.25}),
        ("gpt2", {"n_inner": 48}),
        ("mixtral", {"num_local_experts": 3}),
    ],
)
def test_it_agrees_with_a_plain_loop(
    make_tiny: Callable[..., Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(evaluation, "LOGIT_ELEMENTS", 96 * 5)  # five positions at a time, so that chunks matter
    folder = make_tiny(family, **changes)
    report = evaluated(folder, "--dataset", text_file, "--max-seq-len", str(WINDOW), "--batch-size", "3")
    expected = plain_perplexity(folder, text_file.read_text(), WINDOW)
    assert report["results"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "folder"])
def test_every_form_of_text_gives_the_same_windows(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    from datasets import Dataset

    rows = [f"row {number} of a dataset" for number in range(40)]
    dataset = Dataset.from_dict({"text": rows})
    path = tmp_path / f"corpus.{form}"
    if form == "jsonl":
        dataset.to_json(path)
    else:
        target = tmp_path / "data" / "test-00000-of-00001.parquet" if form == "folder" else path
        target.parent.mkdir(exist_ok=True)
        dataset.to_parquet(target)
        path = tmp_path / "data" if form == "folder" else path
    (tmp_path / "corpus.txt").write_text("\n\n".join(rows))
    options = ["--max-seq-len", str(WINDOW), "--limit", "5"]
    found = evaluated(tiny_llama, "--dataset", path, *options)["results"][0]
    expected = evaluated(tiny_llama, "--dataset", tmp_path / "corpus.txt", *options)["results"][0]
    assert found["windows"] == 5 and found["tokens"] == 5 * WINDOW
    assert found["perplexity"] == expected["perplexity"]


def test_two_models_side_by_side(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    run = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", tmp_path / "small")
    assert run.code == 0, run.stderr
    options = ["--dataset", text_file, "--max-seq-len", str(WINDOW)]
    report = evaluated(tiny_llama, "--compare", tmp_path / "small", *options)
    big, small = report["results"]
    assert small["parameters"] < big["parameters"]
    assert small["perplexity"] == evaluated(tmp_path / "small", *options)["results"][0]["perplexity"]
    table = run_cli("eval", tiny_llama, "--compare", tmp_path / "small", *options).stdout
    assert "perplexity" in table and f"{big['parameters']:,}" in table and f"{small['parameters']:,}" in table


def test_the_window_is_the_models_maximum_unless_said_otherwise(tiny_llama: Path, text_file: Path) -> None:
    assert evaluated(tiny_llama, "--dataset", text_file)["results"][0]["max_seq_len"] == 64


def test_long_windows_by_default_are_warned_about(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny("llama", max_position_embeddings=8200, num_hidden_layers=1)
    (tmp_path / "long.txt").write_text("word " * 1700)
    run = run_cli("eval", folder, "--dataset", tmp_path / "long.txt", "--json")
    assert run.code == 0 and "--max-seq-len" in run.stderr and json.loads(run.stdout)["results"][0]["windows"] == 1


@pytest.mark.parametrize(("family", "stays"), [("llama", True), ("mixtral", False)])
def test_what_exceeds_the_memory_lies_on_disk(
    make_tiny: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, family: str, stays: bool
) -> None:
    """Weights that are stored as they are used are read where they are; the others go into a folder that vanishes."""
    import psutil

    folder = make_tiny(family, num_hidden_layers=4, **({} if stays else {"num_local_experts": 3}))
    options = ("--dataset", text_file, "--max-seq-len", str(WINDOW), "--limit", "6", "--batch-size", "3")
    expected = evaluated(folder, *options)["results"][0]["perplexity"]
    size, whole, seen = sum(path.stat().st_size for path in folder.glob("*.safetensors")), psutil.virtual_memory(), []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole._replace(available=size // 2))

    def load_and_look(*args: Any) -> Any:
        model = load_model(*args)
        seen.append(({*model.hf_device_map.values()}, args[-1], list(args[-1].glob("*experts*"))))
        return model

    monkeypatch.setattr(eval_report, "load_model", load_and_look)
    assert evaluated(folder, *options)["results"][0]["perplexity"] == pytest.approx(expected, rel=1e-6)
    ((places, offload, resaved),) = seen
    assert places == {"cpu", "disk"} and (not resaved) == stays and not offload.exists()


def test_prune_with_eval_is_the_examples_whole_run(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    options = ["--pruning-ratio", "0.5", "--eval", "--max-seq-len", str(WINDOW), "--dataset", text_file, "--json"]
    kept = run_cli("prune", tiny_llama, *BY_MAGNITUDE, *options, "--output", tmp_path / "out")
    temporary = run_cli("prune", tiny_llama, *BY_MAGNITUDE, *options)
    assert kept.code == temporary.code == 0, kept.stderr + temporary.stderr
    reports = [json.loads(run.stdout)["evaluation"]["results"] for run in (kept, temporary)]
    assert [r["perplexity"] for r in reports[0]] == [r["perplexity"] for r in reports[1]]
    again = evaluated(tmp_path / "out", "--dataset", text_file, "--max-seq-len", str(WINDOW))["results"][0]
    assert again["perplexity"] == reports[0][1]["perplexity"]
    assert json.loads(temporary.stdout)["output"] is None
