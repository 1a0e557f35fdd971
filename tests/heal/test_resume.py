"""A healing that is cut short goes on where it was."""

from __future__ import annotations

import math
import re
import shutil
import signal
import time
from collections import namedtuple
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from llmprune_cli.commands.recover import end_to_end, task
from llmprune_cli.errors import OutputError
from llmprune_cli.heal.blocks import walk
from llmprune_cli.heal.blocks.training import Streams
from llmprune_cli.heal.figures import HealedLayer, HeldOut
from llmprune_cli.heal.loss import Student
from llmprune_cli.heal.training import trainer
from llmprune_cli.heal.training.trainer import Lesson
from support.checkpoints import flip
from support.full import in_full
from support.heal_runs import QUICK, interrupt_at, recover, run_recover
from support.refusals import CHECKPOINT, INTERRUPTED, OUTPUT, PLAN, VERIFICATION, assert_refused
from support.started import start
from support.stock import written_tensors

resource: Any
try:
    import resource
except ImportError:  # on Windows
    resource = None

LONG = ("--tokens", "4096")  # two judgements


def test_a_run_does_not_go_on_with_another_text(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 16, True)
        assert run_recover(pruned, text, tmp_path / "out", *LONG).code == INTERRUPTED
    text.write_text(text_file.read_text()[::-1])
    run = run_recover(pruned, text, tmp_path / "out", *LONG, "--resume")
    assert_refused(run, PLAN, "windows differs")
    text.write_text(text_file.read_text())
    recover(pruned, text, tmp_path / "out", *LONG, "--resume")


def assert_alike(one: Path, other: Path) -> None:
    expected, found = written_tensors(one), written_tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def judge_ever_worse(patched: pytest.MonkeyPatch) -> None:
    """Let each judgement find a model to be worse than the one before, but for the first one, before any step."""
    judge, numbers = Lesson.judge, chain([9.0], count(0.001, 0.001))

    def worse(*given: Any) -> HeldOut:
        number = next(numbers)
        return replace(judge(*given), kl=number, perplexity=math.exp(number))

    patched.setattr(Lesson, "judge", worse)


def note_begin(patched: pytest.MonkeyPatch) -> list[str | None]:
    """The checkpoints that trainings begin with, where they train at all."""
    train, begun = trainer._train, list[str | None]()

    def noting(student: Student, lesson: Lesson, folder: Path, last: Path | None, best: Path | None) -> TrainerState:
        begun.append(last and last.name)
        return train(student, lesson, folder, last, best)

    patched.setattr(trainer, "_train", noting)
    return begun


@pytest.mark.parametrize(("step", "marked"), [pytest.param(16, True, marks=in_full), (32, False)])
def test_a_resumed_run_comes_to_the_same(
    pruned: Path, text_file: Path, tmp_path: Path, step: int, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recover(pruned, text_file, tmp_path / "whole", *LONG)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, step, marked)
        cut = run_recover(pruned, text_file, tmp_path / "out", *LONG)
    assert cut.code == INTERRUPTED and "--resume goes on from there" in " ".join(cut.stderr.split())
    assert not (tmp_path / "out").exists()
    begun = note_begin(monkeypatch)
    resumed = recover(pruned, text_file, tmp_path / "out", *LONG, "--resume")
    assert begun == ["checkpoint-16"]
    assert resumed["curve"] == whole["curve"] and resumed["after"] == whole["after"]
    assert_alike(tmp_path / "whole", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_was_trained_is_not_trained_again_where_writing_failed(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the best state is not the last one."""

    def failing(*_: object) -> None:
        raise OutputError("The disk is full.")

    with pytest.MonkeyPatch.context() as patched:
        judge_ever_worse(patched)
        whole = recover(pruned, text_file, tmp_path / "whole", *LONG)
        judge_ever_worse(patched)
        patched.setattr(end_to_end, "write_healed", failing)
        assert_refused(run_recover(pruned, text_file, tmp_path / "out", *LONG), OUTPUT, "--resume goes on")
    begun = note_begin(monkeypatch)
    resumed = recover(pruned, text_file, tmp_path / "out", *LONG, "--resume")
    assert not begun and resumed["curve"] == whole["curve"] and resumed["best_tokens"] == 2048
    assert_alike(tmp_path / "whole", tmp_path / "out")


def leave_free(patched: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    patched.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, free))


@pytest.mark.parametrize("mode", ["end-to-end", "blocks"])
def test_what_a_run_has_written_counts_as_room_for_it(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    options = (*LONG, "--mode", mode)
    leave_free(monkeypatch, 1000)
    refused = run_recover(pruned, text_file, tmp_path / "out", *options)
    assert_refused(refused, OUTPUT, "1,000 bytes")
    said = " ".join(refused.stderr.split())
    needed = sum(int(number.replace(",", "")) for number in re.findall(r"(?<=take )[\d,]+|(?<=weights )[\d,]+", said))
    leave_free(monkeypatch, needed)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 16, marked=True)
        interrupt_after_a_layer(patched)
        assert run_recover(pruned, text_file, tmp_path / "out", *options).code == INTERRUPTED
    leave_free(monkeypatch, needed - 1000)
    recover(pruned, text_file, tmp_path / "out", *options, "--resume")
    assert_refused(run_recover(pruned, text_file, tmp_path / "again", *options), OUTPUT, f"{needed - 1000:,} bytes")


def interrupt_after_a_layer(patched: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when the second layer is trained."""
    heal = walk._heal

    def interrupted(own: walk.Walk, number: int, streams: Streams) -> HealedLayer:
        if number == 1:
            raise KeyboardInterrupt
        return heal(own, number, streams)

    patched.setattr(walk, "_heal", interrupted)


def test_no_work_is_kept_that_would_come_to_nan_again(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, kls = Lesson.judge, iter((0.2, 0.1, math.inf))
    monkeypatch.setattr(Lesson, "judge", lambda *given: replace(judge(*given), kl=next(kls)))
    run = run_recover(pruned, text_file, tmp_path / "out", *LONG)
    assert_refused(run, VERIFICATION, "After 32 steps", "smaller --learning-rate")
    assert "--resume" not in run.stderr and not list(tmp_path.iterdir())


def test_a_run_whose_folder_moved_still_writes_its_best_state(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    """Checkpoints name the best one by its path."""
    (tmp_path / "old").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        judge_ever_worse(patched)
        recover(pruned, text_file, tmp_path / "whole", *LONG)
        judge_ever_worse(patched)
        interrupt_at(patched, 32, marked=True)
        assert run_recover(pruned, text_file, tmp_path / "old" / "out", *LONG).code == INTERRUPTED
    (tmp_path / "old").rename(tmp_path / "new")
    recover(pruned, text_file, tmp_path / "new" / "out", *LONG, "--resume")
    assert_alike(tmp_path / "whole", tmp_path / "new" / "out")


def test_a_resumed_run_has_its_teacher_where_it_had_it(
    pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free by then."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(task, "_free_memory", lambda *_: 2**40)
        interrupt_at(patched, 16, marked=True)
        assert run_recover(pruned, text_file, tmp_path / "out", *LONG).code == INTERRUPTED
    other = run_recover(pruned, text_file, tmp_path / "out", *LONG, "--teacher-mode", "streamed", "--resume")
    assert_refused(other, PLAN, "another run: teacher-mode was resident and is streamed", "leave out --resume")
    assert "goes on from there" not in other.stderr
    monkeypatch.setattr(task, "_free_memory", lambda *_: 0)
    assert recover(pruned, text_file, tmp_path / "out", *LONG, "--resume")["teacher_mode"] == "resident"


def test_a_damaged_checkpoint_and_another_run_are_refused(pruned: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 16, marked=True)
        run_recover(pruned, text_file, tmp_path / "out", *LONG)
    work = tmp_path / ".out.llmprune-work"
    other = run_recover(pruned, text_file, tmp_path / "out", *LONG, "--loss", "ce", "--resume")
    assert_refused(other, PLAN, "loss was kl+0.1ce and is ce")
    flip(work / "checkpoint-16" / "model.safetensors")
    damaged = run_recover(pruned, text_file, tmp_path / "out", *LONG, "--resume")
    assert_refused(damaged, CHECKPOINT, "checkpoint-16 is damaged", "--resume")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(resource is None, reason="this system has no limit of file sizes")
@pytest.mark.parametrize(
    "most_bytes", [pytest.param(100_000, marks=in_full), 200_000]
)  # less than the weights, and than the optimizer's moments
def test_a_checkpoint_that_cannot_be_written_is_said(
    pruned: Path, text_file: Path, tmp_path: Path, most_bytes: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
        run = run_recover(pruned, text_file, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_refused(run, OUTPUT, "cannot be kept", "--output")
    assert not (tmp_path / "out").exists()


@in_full
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.7])
def test_a_killed_run_goes_on(pruned: Path, text_file: Path, tmp_path: Path, delay: float) -> None:
    recover(pruned, text_file, tmp_path / "whole", *LONG)
    process = start("recover", pruned, "--text", text_file, "--output", tmp_path / "out", *QUICK, *LONG)
    work = tmp_path / ".out.llmprune-work"
    while not any(work.glob("checkpoint-*")) and process.is_alive():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        recover(pruned, text_file, tmp_path / "out", *LONG, "--resume")
    assert_alike(tmp_path / "whole", tmp_path / "out")
