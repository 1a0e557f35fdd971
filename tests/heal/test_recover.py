"""Healing: a pruned model learns what the unpruned one predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmprune_cli
from llmprune_cli.commands.recover import task
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.heal.teacher.resident import ResidentTeacher
from llmprune_cli.heal.teacher.streamed import StreamedTeacher
from llmprune_cli.heal.training.trainer import Lesson
from llmprune_cli.report.schemas import DOCUMENTS, adapter_of
from llmprune_cli.run.layered_model import LayeredModel
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.heal_runs import recover, run_recover
from support.refusals import USAGE, assert_refused
from support.stock import written_tensors
from support.tiny import save_tiny


def test_a_healed_model_is_nearer_to_its_teacher_and_stock(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    healed, curve = tmp_path / "healed", tmp_path / "curve.svg"
    result = recover(pruned, text_file, healed, "--report", curve)
    assert result["after"]["kl"] < 0.6 * result["before"]["kl"] and result["is_better"]
    assert result["loss"] == "kl+0.1ce" and result["after"]["perplexity"] < result["before"]["perplexity"]
    assert [judged["tokens"] for judged in result["curve"]] == [2048]
    assert "KL divergence" in curve.read_text()
    adapter_of(DOCUMENTS["recover"]).validate_json(json.dumps(result), strict=True)
    before, after = written_tensors(pruned), written_tensors(healed)
    assert {name: (own.shape, own.dtype) for name, own in before.items()} == {
        name: (own.shape, own.dtype) for name, own in after.items()
    }
    assert "lm_head.weight" not in after and not torch.equal(
        before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]
    )
    _, info = AutoModelForCausalLM.from_pretrained(healed, output_loading_info=True)
    assert not any(info.values())
    assert run_cli("inspect", healed, "--verify").code == 0
    manifest = json.loads((healed / "llmprune.json").read_text())
    assert manifest["source"] == result["teacher"] and manifest["healing"]["model"] == str(pruned)
    assert manifest["widths"] == json.loads((pruned / "llmprune.json").read_text())["widths"]
    card = (healed / "README.md").read_text()
    assert "Then it was trained on 2,048 tokens" in card and "predicts and the text itself (`kl+0.1ce`)" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.svg", "healed"]


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        pytest.param("norms", "norm", marks=in_full),
        ("mlp", ".mlp."),
        ("layers", ".layers."),
        pytest.param("attention", ".self_attn.", marks=in_full),
    ],
)
def test_only_what_is_asked_for_is_trained(
    pruned: Path, text_file: Path, tmp_path: Path, part: str, changed: str
) -> None:
    recover(pruned, text_file, tmp_path / "healed", "--train", part, "--loss", "kl+ce", "--gradient-checkpointing")
    before, after = written_tensors(pruned), written_tensors(tmp_path / "healed")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if changed in name
    }


def test_the_reverse_divergence_brings_a_model_nearer_in_its_own_way(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--temperature", "2", "--seed", "1")
    usual = recover(pruned, text_file, tmp_path / "usual", "--loss", "kl+0.1ce", *options)
    monkeypatch.setattr(task, "_free_memory", lambda *_: 1)
    assert recover(pruned, text_file, tmp_path / "kl", *options)["teacher_mode"] == "streamed"
    result = recover(pruned, text_file, tmp_path / "healed", "--loss", "reverse-kl+0.1ce", *options)
    assert result["is_better"] and result["after"]["kl"] < 0.9 * result["before"]["kl"]
    assert result["after"]["kl"] != pytest.approx(usual["after"]["kl"], rel=1e-3)
    assert result["teacher_mode"] == "resident"
    assert "predicts and the text itself (`reverse-kl+0.1ce`)" in (tmp_path / "healed" / "README.md").read_text()
    for streamed in (("--teacher-mode", "streamed"), ("--teacher-cache", tmp_path / "cache")):
        run = run_recover(pruned, text_file, tmp_path / "out", "--loss", "reverse-kl", *streamed)
        assert_refused(run, USAGE, "--loss reverse-kl needs what the teacher would not say")


@pytest.mark.parametrize("mode", ["end-to-end", "blocks"])
def test_a_single_step_is_learned_from(pruned: Path, text_file: Path, tmp_path: Path, mode: str) -> None:
    result = recover(pruned, text_file, tmp_path / "healed", "--tokens", "128", "--mode", mode)
    assert result["steps"] == 1 and result["after"]["kl"] < result["before"]["kl"]


def test_adapters_are_merged_and_ties_kept(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = recover(pruned, text_file, tmp_path / "healed", "--lora", "4")
    assert result["is_better"]
    before, after = written_tensors(pruned), written_tensors(tmp_path / "healed")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "_proj" in name
    }


@pytest.mark.parametrize("options", [(), ("--lora", "4")])
def test_a_model_that_nothing_was_gained_for_is_written_as_it_was(
    pruned: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    if options:
        pytest.importorskip("peft")
    run = run_recover(pruned, text_file, tmp_path / "healed", "--tokens", "1k", "--learning-rate", "0.5", *options)
    assert run.code == 0, run.stderr
    assert "no state that was judged is better" in run.stderr and "Try a smaller --learning-rate" in run.stderr
    result = json.loads(run.stdout)
    assert not result["is_better"] and result["best_tokens"] == result["trained_parameters"] == 0
    assert result["curve"][0]["held_out"]["kl"] > result["before"]["kl"]
    assert result["after"]["kl"] == pytest.approx(result["before"]["kl"], rel=1e-4)
    before, after = written_tensors(pruned), written_tensors(tmp_path / "healed")
    assert before.keys() == after.keys() and all(own.equal(after[name]) for name, own in before.items())
    assert "held-out text gained nothing" in (tmp_path / "healed" / "README.md").read_text()


def test_prune_does_not_advise_what_it_has_no_option_for(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, kls = Lesson.judge, count(1.0)
    monkeypatch.setattr(Lesson, "judge", lambda *given: replace(judge(*given), kl=next(kls)))
    run = run_cli(
        *("prune", dense, *BY_MAGNITUDE, "--intermediate-pruning-ratio", "0.5", "--output", tmp_path / "out"),
        *("--recover", "512", "--calibration", text_file, "--calibration-seq-len", "32"),
    )
    assert run.code == 0, run.stderr
    assert "no state that was judged is better" in run.stderr and "--recover N" in run.stderr
    assert "--learning-rate" not in run.stderr


def test_a_teacher_in_memory_runs_once_on_text_that_is_seen_again(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen, text = ResidentTeacher._hidden, list[bytes](), tmp_path / "numbers.txt"
    text.write_text(" ".join(str(number**3) for number in range(600)))

    def counting(self: ResidentTeacher, windows: torch.Tensor) -> torch.Tensor:
        seen.extend(window.numpy().tobytes() for window in windows)
        return run(self, windows)

    monkeypatch.setattr(ResidentTeacher, "_hidden", counting)
    asked = ("--tokens", "16384", "--teacher-mode", "resident")
    result = recover(pruned, text, tmp_path / "healed", *asked)
    assert result["is_better"] and len(seen) == len(set(seen)) < 16384 // 32 / 2
    kept = written_tensors(tmp_path / "healed")
    seen.clear()
    monkeypatch.setattr(task, "are_worth_keeping", lambda *_: False)
    recover(pruned, text, tmp_path / "without room", *asked)
    judged = {own for own in seen if seen.count(own) == 1}  # which are kept anyhow
    assert judged and len(seen) > 16384 // 32
    for name, tensor in written_tensors(tmp_path / "without room").items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_teacher_that_is_not_learned_from_runs_on_held_out_text_alone(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stream, seen = ResidentTeacher._hidden, task.stream_teacher, list[int]()

    def counting(self: ResidentTeacher, windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows[:, 1:].numel())
        return run(self, windows)

    def streaming(model: LayeredModel, windows: torch.Tensor, *given: Any, **named: Any) -> StreamedTeacher:
        seen.append(windows[:, 1:].numel())
        return stream(model, windows, *given, **named)

    monkeypatch.setattr(ResidentTeacher, "_hidden", counting)
    monkeypatch.setattr(task, "stream_teacher", streaming)
    found = {}
    for mode in ("resident", "streamed"):
        seen.clear()
        found[mode] = recover(pruned, text_file, tmp_path / mode, "--loss", "ce", "--teacher-mode", mode)
        assert sum(seen) == found[mode]["held_out_tokens"]
    for one, other in zip(*(own["curve"] for own in found.values()), strict=True):
        assert other["held_out"]["kl"] == pytest.approx(one["held_out"]["kl"], rel=0.01)


def test_products_in_float32_are_the_teachers_as_well(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", dtype="bfloat16", initializer_range=0.2)
    load, loaded = task.load_model, list[str]()

    def noting(checkpoint: Checkpoint, device: str, dtype: str) -> Any:
        loaded.append(dtype)
        return load(checkpoint, device, dtype)

    monkeypatch.setattr(task, "native_dtype", lambda stored, _: stored)
    monkeypatch.setattr(task, "load_model", noting)
    options = ("--teacher", model, "--tokens", "128", "--teacher-mode", "resident", "--compute-dtype")
    for dtype in ("float32", "bfloat16"):
        recover(model, text_file, tmp_path / dtype, *options, dtype)
    assert loaded == ["float32", "bfloat16"]


def test_python_heals_as_the_command_does(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"text": str(text_file), "tokens": "1k", "batch_tokens": 128, "seq_len": 32, "learning_rate": 0.003}
    told: list[llmprune_cli.Progress] = []
    own = llmprune_cli.recover(pruned, output=tmp_path / "python", loss="ce", progress=told.append, **options)
    assert own is not None and own.after.perplexity < own.before.perplexity and own.learning_rate == 0.003
    assert {"Healing", "Writing"} <= {now.stage for now in told}


def test_prune_heals_in_the_same_run(dense: Path, text_file: Path, tmp_path: Path) -> None:
    run = run_cli(
        *("prune", dense, *BY_MAGNITUDE, "--intermediate-pruning-ratio", "0.5", "--output", tmp_path / "out"),
        *("--recover", "2048", "--calibration", text_file, "--calibration-seq-len", "32", "--json"),
        *("--eval", "--dataset", text_file, "--max-seq-len", "32", "--limit", "4"),
    )
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["output"] == str(tmp_path / "out") and result["recovery"]["is_better"]
    whole, cut, healed = (own["perplexity"] for own in result["evaluation"]["results"])
    assert whole != cut != healed
    manifest = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert manifest["recipe"]["recover"] == "2048" and manifest["healing"]["model"].endswith("(pruned)")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = run_cli("prune", "--config", tmp_path / "out", "--output", tmp_path / "again", dense)
    assert again.code == 0, again.stderr
    assert written_tensors(tmp_path / "again").keys() == written_tensors(tmp_path / "out").keys()
