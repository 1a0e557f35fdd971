"""Text that a model writes itself, to be calibrated or healed on."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from llmprune_cli.run import calibration
from support.cli import run_cli
from support.heal_runs import recover
from support.refusals import CHECKPOINT, assert_refused
from support.stock import written_tensors
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny

ASKED = ("--mlp", "50%", "--calibration-tokens", "256", "--calibration-seq-len", "32")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writing") / "model"
    save_tiny(folder, initializer_range=0.15, vocab_size=BYTE_LEVEL_VOCABULARY, max_position_embeddings=64)
    save_byte_level(folder)
    return folder


def test_a_model_is_calibrated_on_what_it_writes_itself(
    writer: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed writes the same text, in a mixture as well."""
    monkeypatch.setattr(calibration, "JUDGED_TOKENS", 512)
    outputs = tmp_path / "one", tmp_path / "two"
    for output in outputs:
        run = run_cli("prune", writer, *ASKED, "--calibration", "self", "--output", output, "--json")
        assert run.code == 0, run.stderr
    card = json.loads(run.stdout)["calibration"]
    assert card["dataset"] == "self" and card["origin"] == f"text that {writer} wrote itself"
    assert card["tokens"] == 256 and card["held_out_tokens"] == 17 * 31  # which is 512 at least
    assert (outputs[0] / "model.safetensors").read_bytes() == (outputs[1] / "model.safetensors").read_bytes()
    mixture = ("--calibration", f"self:0.5,{text_file}:0.5", "--seed", "1")
    run = run_cli("prune", writer, *ASKED, *mixture, "--output", tmp_path / "mixed")
    assert run.code == 0, run.stderr
    assert written_tensors(tmp_path / "mixed").keys() == written_tensors(outputs[0]).keys()


def test_a_teacher_writes_what_its_student_learns_from(writer: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    options = ("--importance", "magnitude", "--refit", "none", "--output", pruned)
    assert run_cli("prune", writer, "--mlp", "50%", *options).code == 0
    result = recover(pruned, Path("self"), tmp_path / "healed")
    assert result["origin"] == f"text that {writer} wrote itself" and result["is_better"]


def test_a_model_without_room_writes_nothing(writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole._replace(available=1000))
    run = run_cli("prune", writer, *ASKED, "--calibration", "self", "--device", "cpu", "--output", tmp_path / "out")
    assert_refused(run, CHECKPOINT, "no room for", "'self'")
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_judged_by_what_it_writes_itself(writer: Path) -> None:
    assert_refused(run_cli("eval", writer, "--dataset", "self"), CHECKPOINT, "not judged", "Give a text")
