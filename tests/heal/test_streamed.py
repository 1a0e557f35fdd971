"""A teacher that runs once, layer by layer."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from llmprune_cli.commands.recover import end_to_end
from llmprune_cli.folder.scratch import filled_alone
from llmprune_cli.heal.student import compute_twice
from support.heal_runs import recover, run_recover
from support.refusals import CHECKPOINT, OUTPUT, PLAN, assert_refused, state_of
from support.tiny import save_tiny

STREAMED = ("--teacher-mode", "streamed")


def test_a_streamed_teacher_teaches_what_a_resident_one_does(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    resident = recover(pruned, text_file, tmp_path / "resident", "--teacher-mode", "resident")
    streamed = recover(pruned, text_file, tmp_path / "streamed", *STREAMED)
    assert streamed["teacher_mode"] == "streamed"
    for one, other in zip(resident["curve"], streamed["curve"], strict=True):
        assert other["held_out"]["kl"] == pytest.approx(one["held_out"]["kl"], rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resident", "streamed"]


@pytest.mark.parametrize(
    ("options", "are"),
    [
        (STREAMED, True),
        (("--teacher-mode", "resident"), False),
        (("--gradient-checkpointing",), True),
    ],
)
def test_activations_are_computed_twice_beside_a_streamed_teacher_or_where_that_is_asked_for(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], are: bool
) -> None:
    models = []

    def note(model: PreTrainedModel) -> None:
        models.append(model)
        compute_twice(model)

    monkeypatch.setattr(end_to_end, "compute_twice", note)
    assert recover(pruned, text_file, tmp_path / "healed", *options)["is_better"]
    assert bool(models) == are


def test_what_a_teacher_predicts_is_kept_for_other_students_of_it_alone(
    dense: Path, pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = recover(pruned, text_file, tmp_path / "first", "--teacher-cache", cache)
    held = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert first["teacher_mode"] == "streamed" and "teacher.json" in held
    second = recover(pruned, text_file, tmp_path / "second", "--teacher-cache", cache, "--train", "mlp")
    assert second["before"] == first["before"]
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == held

    other = Path(shutil.copytree(dense, tmp_path / "other"))
    save_tiny(other, initializer_range=0.19, tie_word_embeddings=True)
    before = state_of(tmp_path)
    run = run_recover(pruned, text_file, tmp_path / "out", "--teacher-cache", cache, "--teacher", other)
    assert_refused(run, PLAN, "another teacher", "weights differs", "--teacher-cache")
    run = run_recover(pruned, text_file, tmp_path / "out", "--teacher-cache", cache, "--seed", "3")
    assert_refused(run, PLAN, "text differs", "--teacher-cache", "--calibration-tokens", "--seq-len")
    with (cache / "tokens.bin").open("r+b") as file:
        file.truncate(1000)
    before = state_of(tmp_path)
    run = run_recover(pruned, text_file, tmp_path / "out", "--teacher-cache", cache)
    assert_refused(run, CHECKPOINT, "tokens.bin is damaged")
    assert state_of(tmp_path) == before


def test_a_folder_that_another_run_fills_is_left_to_it(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with filled_alone(cache, "--teacher-cache"):
        run = run_recover(pruned, text_file, tmp_path / "out", "--teacher-cache", cache)
        assert_refused(run, OUTPUT, "Another run is filling", "--teacher-cache")
        assert [path.name for path in cache.iterdir()] == ["filling.lock"]
    assert not (tmp_path / "out").exists()


def test_a_cache_may_be_a_link(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    recover(pruned, text_file, tmp_path / "out", "--teacher-cache", tmp_path / "cache")
    assert "teacher.json" in {path.name for path in (tmp_path / "disk").iterdir()}
    assert not list(tmp_path.rglob("*.lock"))


def test_a_teacher_without_room_is_refused_before_it_runs(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    run = run_recover(pruned, text_file, tmp_path / "out", "--train", "norms", *STREAMED)
    assert run.code == 0
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 300_000))
    run = run_recover(pruned, text_file, tmp_path / "out", "--train", "norms", *STREAMED)
    assert_refused(run, OUTPUT, "300,000 bytes", "--teacher-cache", "--tokens")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 3_000_000))
    run = run_recover(pruned, text_file, tmp_path / "out", *STREAMED)  # room for either, not for both
    assert_refused(run, OUTPUT, "3,000,000 bytes", "while it runs, and the training takes")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 1000))
    run = run_recover(pruned, text_file, tmp_path / "out")
    assert_refused(run, OUTPUT, "1,000 bytes", "checkpoints")
    assert not list(tmp_path.iterdir())
