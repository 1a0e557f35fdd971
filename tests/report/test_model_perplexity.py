"""Evaluations side by side, after a prune, and of what exceeds the memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmprune_cli.report import model_perplexity
from llmprune_cli.source.full_model import load_model
from support.cli import BY_MAGNITUDE, WINDOW, evaluated, run_cli
from support.refusals import CHECKPOINT, assert_refused
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level


def test_two_models_side_by_side(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    run = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", tmp_path / "small")
    assert run.code == 0, run.stderr
    options = ["--dataset", text_file, "--max-seq-len", str(WINDOW)]
    report = evaluated(tiny_llama, "--compare", tmp_path / "small", *options)
    big, small = report["results"]
    assert small["parameters"] < big["parameters"]
    assert small["perplexity"] == evaluated(tmp_path / "small", *options)["results"][0]["perplexity"]
    table = run_cli("eval", tiny_llama, "--compare", tmp_path / "small", *options, "-v").stdout
    assert "perplexity" in table and f"{big['parameters']:,}" in table and f"{small['parameters']:,}" in table


def test_any_number_of_models_are_held_against_the_first(
    tiny_llama: Path, make_tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """The divergence is the one that transformers gives; a model with another vocabulary has none."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small, other = tmp_path / "small", make_tiny("gpt2", vocab_size=104)
    run = run_cli("prune", tiny_llama, *BY_MAGNITUDE, "--intermediate-size", "24", "--output", small)
    assert run.code == 0, run.stderr
    options = ["--dataset", text_file, "--max-seq-len", str(WINDOW), "--limit", "3", "--batch-size", "2"]
    report = evaluated(tiny_llama, small, "--compare", tiny_llama, "--compare", other, *options)
    first, second, same, foreign = report["results"]
    assert first["kl"] is None and foreign["kl"] is None and same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["perplexity"] == first["perplexity"]
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text_file.read_text(), return_tensors="pt")["input_ids"]
    windows = ids[0, : 3 * WINDOW].view(3, WINDOW)
    with torch.inference_mode():
        dense, pruned = (
            functional.log_softmax(AutoModelForCausalLM.from_pretrained(folder)(windows).logits[:, :-1].double(), -1)
            for folder in (tiny_llama, small)
        )
    expected = (dense.exp() * (dense - pruned)).sum(-1).mean()
    assert second["kl"] == pytest.approx(float(expected), rel=5e-3)
    shown = run_cli("eval", tiny_llama, small, *options, "-q")
    ratio = second["perplexity"] / first["perplexity"]
    assert f"×{ratio:.4g}" in shown.stdout and f"{second['kl']:.3f}" in shown.stdout and shown.stderr == ""
    recipe = tmp_path / "compare.yaml"
    recipe.write_text(f"model: {tiny_llama}\ncompare: {small}\n")
    assert evaluated("--config", recipe, *options)["results"][1]["kl"] == second["kl"]  # type: ignore[arg-type]


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

    monkeypatch.setattr(model_perplexity, "load_model", load_and_look)
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


def test_half_precision_is_emulated_only_for_lack_of_memory(
    make_tiny: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil
    import torch

    folder, options = make_tiny(dtype="bfloat16"), ("--dataset", text_file, "--max-seq-len", str(WINDOW))

    def found(*more: str) -> tuple[str, float]:
        (result,) = evaluated(folder, *options, *more)["results"]
        return result["dtype"], result["perplexity"]

    asked = [found("--dtype", dtype) for dtype in ("bfloat16", "float32")]
    assert [dtype for dtype, _ in asked] == ["bfloat16", "float32"] and asked[0] != asked[1]
    monkeypatch.setattr(model_perplexity, "native_dtype", lambda stored, device: stored)
    assert found() == asked[0]
    monkeypatch.setattr(model_perplexity, "native_dtype", lambda stored, device: torch.float32)
    assert found() == asked[1]
    size, whole = sum(path.stat().st_size for path in folder.glob("*.safetensors")), psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole._replace(available=3 * size))
    assert found() == asked[0]


def test_windows_longer_than_a_table_of_positions_are_refused_before_anything_is_evaluated(
    tiny_llama: Path, make_tiny: Callable[..., Path], text_file: Path
) -> None:
    """Rotary embeddings go on, and a table ends."""
    learned, ahead = make_tiny("gpt2", max_position_embeddings=WINDOW), make_tiny("opt", max_position_embeddings=WINDOW)
    computed = make_tiny("llama", max_position_embeddings=WINDOW)
    options = ("--dataset", text_file, "--limit", "1", "--max-seq-len", str(WINDOW + 1), "--json")
    for folder in (learned, ahead):
        run = run_cli("eval", tiny_llama, folder, *options)
        assert_refused(run, CHECKPOINT, str(folder), "learned positions", f"--max-seq-len {WINDOW}")
        assert "Evaluating" not in run.stderr
    run = run_cli("eval", tiny_llama, computed, *options)
    assert run.code == 0 and f"more than the model's maximum of {WINDOW}" in run.stderr


def test_a_model_that_predicts_no_numbers_is_infinitely_far_from_another(
    tiny_llama: Path, tmp_path: Path, text_file: Path
) -> None:
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (shard,) = (own for own in broken.glob("*.safetensors") if "model.norm.weight" in load_file(own))
    tensors = load_file(shard)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, shard, {"format": "pt"})
    asked = ("--dataset", text_file, "--max-seq-len", str(WINDOW), "--limit", "1", "--json")
    run = run_cli("eval", tiny_llama, broken, *asked)
    first, second = json.loads(run.stdout)["results"]
    assert run.stderr.count("NaN") == 1 and "broken turns text into NaN" in run.stderr
    assert (first["kl"], second["kl"], second["perplexity"]) == (None, None, None)  # JSON has no word for infinity


@pytest.fixture
def two_readers(tiny_llama: Path, make_tiny: Callable[..., Path]) -> tuple[Path, Path]:
    """A model of ASCII letters, to which all others are `<unk>`, and one of the pieces of any text."""
    pieces = make_tiny("gpt2", vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(pieces)
    return tiny_llama, pieces


def test_models_are_compared_by_the_same_text_where_one_does_not_know_its_letters(
    two_readers: tuple[Path, Path], tmp_path: Path
) -> None:
    """The bytes are those of the text, not those of the letters `<unk>`, whichever model comes first."""
    from transformers import AutoTokenizer

    letters, pieces = two_readers
    text = "Тhe quick größe, naïve façade; œuvre: 敏捷的 fox jumps. " * 9
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    options = ("--dataset", tmp_path / "a.txt", "--max-seq-len", "32", "--limit", "5")
    first, second = evaluated(letters, pieces, *options)["results"]
    windows = [text[start : start + 32] for start in range(0, 160, 32)]
    assert first["bytes"] == sum(len(window[1:].encode()) for window in windows)
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    assert second["tokens"] == len(tokenizer(text[:160])["input_ids"])
    assert len(text[:160].encode()) - 3 * 8 <= second["bytes"] <= len(text[:160].encode())
    first, second = evaluated(pieces, letters, *options)["results"]
    whole = tokenizer.decode(tokenizer(text)["input_ids"][:160]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert text.startswith(whole) and second["tokens"] == len(whole)
    assert second["bytes"] == sum(len(whole[start + 1 : start + 32].encode()) for start in range(0, len(whole), 32))


def test_a_second_model_that_fills_no_window_gets_a_shorter_one(two_readers: tuple[Path, Path], tmp_path: Path) -> None:
    text = "def the tokenizer of the model: "
    (tmp_path / "a.txt").write_text(text)
    report = evaluated(*two_readers, "--dataset", tmp_path / "a.txt", "--max-seq-len", "32")
    first, second = report["results"]
    assert (first["windows"], first["max_seq_len"], first["bytes"]) == (1, 32, 31)
    assert second["windows"] == 1 and second["tokens"] == second["max_seq_len"] < 32
    assert 32 - 8 <= second["bytes"] < 32 and second["bits_per_byte"] > 0
