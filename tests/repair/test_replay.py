"""Parts of a layer whose results are known are not run again, and what the dense model made is not made again."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.choose.activity import measure_activity
from llmprune_cli.choose.gradients import measure_gradients, measure_taylor
from llmprune_cli.choose.measuring import Measuring
from llmprune_cli.choose.selection import make_plan
from llmprune_cli.coupling.products import Products
from llmprune_cli.heal.teacher.repeated import Repeated
from llmprune_cli.journal.journal import Journal
from llmprune_cli.options import Choice, WidthRequest
from llmprune_cli.plan.document import Plan
from llmprune_cli.plan.requested_widths import resolve
from llmprune_cli.progress import QUIET, Listener, Progress
from llmprune_cli.repair import replay
from llmprune_cli.repair.dense_goals import Streams, keep_dense, walk_dense
from llmprune_cli.repair.refit import refit
from llmprune_cli.run.states import DenseStates
from llmprune_cli.run.workbench import Workbench
from support import families
from support.opened import Opened

every_family = pytest.mark.parametrize("opened", families.TRIED_SLOWLY, indirect=True)


def half_the_neurons(opened: Opened) -> Plan:
    subject = opened.subject
    request = WidthRequest(intermediate_pruning_ratio=0.5, round_to=8)
    target = resolve(subject.architecture, subject.trace.refused, request)
    return make_plan(Workbench(opened.layered, None, QUIET), target, Choice(importance="magnitude", refit="none"))


def refitted(
    opened: Opened, plan: Plan, folder: Path, states: DenseStates | None, compute: torch.dtype = torch.float32
) -> dict[str, bytes]:
    """The files that a refit writes, and the stream behind the last layer."""
    folder.mkdir()
    model = replace(opened.layered, compute=compute)
    with torch.inference_mode():
        start = model.embed(opened.tokens)
        kept = states.covering(opened.tokens) if states is not None else None
        assert (kept is None) == (states is None)
        streams = Streams.of(model, start, 3, kept=kept)  # the last window passes through
        refit(model, plan, streams, "residual", lambda n: None, Journal(folder=folder))
    found = {path.name: path.read_bytes() for path in folder.glob("layer-*")}
    both = {"stream": streams.pruned, "dense": streams.dense}
    return found | {name: stream.float().numpy().tobytes() for name, stream in both.items()}


@every_family
def test_a_refit_that_runs_nothing_twice_writes_the_same_bytes(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = half_the_neurons(opened)
    states = DenseStates(tmp_path)
    with torch.inference_mode():
        walk_dense(opened.layered, opened.tokens, states, lambda n: None)
    quick = refitted(opened, plan, tmp_path / "quick", states)
    monkeypatch.setattr(replay, "KEPT_BYTES", 0)
    assert quick == refitted(opened, plan, tmp_path / "plain", None)


@pytest.mark.parametrize("opened", ["llama", "gemma2", "mixtral"], indirect=True)
def test_a_dense_stream_is_rounded_alike_whether_it_is_kept_or_made_again(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, states = half_the_neurons(opened), DenseStates(tmp_path)
    half = replace(opened.layered, compute=torch.bfloat16)
    with torch.inference_mode():
        walk_dense(half, opened.tokens, states, lambda n: None)
    assert states.dtype == torch.bfloat16
    kept = refitted(opened, plan, tmp_path / "kept", states, torch.bfloat16)
    monkeypatch.setattr(replay, "KEPT_BYTES", 0)
    assert kept == refitted(opened, plan, tmp_path / "again", None, torch.bfloat16)
    dense = torch.frombuffer(bytearray(kept["dense"]), dtype=torch.float32)
    assert torch.equal(dense, dense.bfloat16().float())


@pytest.mark.parametrize("opened", ["llama", "gpt2", "gemma2", "mixtral"], indirect=True)
def test_attention_is_run_once_for_each_batch(opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[str] = []
    original = Products._seen

    def counted(self: Products, *args: torch.Tensor) -> torch.Tensor:
        found = self._weights.get(args[1].untyped_storage().data_ptr())
        if found is not None and args[0][..., 0].numel() % opened.tokens.shape[1] == 0:
            runs.append(found[0])
        return original(self, *args)  # type: ignore[arg-type]

    plan = half_the_neurons(opened)
    monkeypatch.setattr(Products, "_seen", counted)
    refitted(opened, plan, tmp_path / "out", None)
    inputs = [name for name in runs if any(word in name for word in ("q_proj", "c_attn"))]
    whole = 2 * opened.layered.layers  # the dense stream and the pruned one
    passing = opened.layered.layers  # the window that only passes through
    assert len(inputs) == whole + passing


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_gradients_take_the_states_of_an_earlier_walk(tmp_path: Path, opened: Opened) -> None:
    states, alone = DenseStates(tmp_path), DenseStates(tmp_path)
    done: list[int] = []
    with torch.inference_mode():
        keep_dense(states, opened.tokens, opened.layered)
        start = opened.layered.embed(opened.tokens)
        influence = measure_activity(opened.layered, start, "range", lambda n: None, states).influence
    reused = measure_gradients(opened.layered, opened.tokens[1:3], states, done.append)
    assert len(done) == opened.layered.layers  # the way back alone
    measured = measure_gradients(opened.layered, opened.tokens[1:3], alone, done.append)
    assert len(done) == 3 * opened.layered.layers
    for width, by in measured.scores.items():
        for instance, scores in by.items():
            torch.testing.assert_close(reused.scores[width][instance], scores, rtol=1e-5, atol=0)
    assert reused.influence != influence  # of two windows, and of four


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_gradients_are_done_when_all_that_was_to_do_is(opened: Opened, tmp_path: Path, walked: bool) -> None:
    told: list[Progress] = []
    bench = Workbench(opened.layered, None, Listener(told.append), offload_dir=tmp_path)
    if walked:
        with torch.inference_mode():
            walk_dense(opened.layered, opened.tokens, bench.dense, lambda n: None)
    measure_taylor(Measuring(bench, opened.tokens[1:3]))
    assert told[-1].done == told[-1].total == opened.layered.layers * (1 if walked else 2)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_states_that_do_not_fit_are_not_kept(tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune_cli.run.states.MOST_OF_FREE_SPACE", 0.0)
    with torch.inference_mode():
        assert walk_dense(opened.layered, opened.tokens, DenseStates(tmp_path), lambda n: None) is None
        gpu = replace(opened.layered, device="cuda")
        states = DenseStates(tmp_path)
        keep_dense(states, opened.tokens, gpu)
        assert not states.is_open
        keep_dense(states, opened.tokens, gpu, is_needed=True)
        assert states.is_open and states.only_between
        needed = walk_dense(opened.layered, opened.tokens, DenseStates(tmp_path), lambda n: None, is_needed=True)
    assert needed is not None and needed.states.covering(opened.tokens) is None  # what lies within layers is not kept
    assert {path.name for path in tmp_path.iterdir()} == {"model", "saved"}
    *_, (last, _) = opened.layered.walk(opened.tokens)
    torch.testing.assert_close(needed.read((opened.layered.layers, "")), last, rtol=0, atol=0)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_disk_that_fills_leaves_nothing_half_kept(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(io.BytesIO):
        def write(self, part: Any) -> int:
            if self.tell() >= 3 * opened.tokens.numel():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(part)

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Small())
    states = DenseStates(tmp_path)
    with torch.inference_mode():
        assert walk_dense(opened.layered, opened.tokens, states, lambda n: None) is None
    assert not states.is_open and states.covering(opened.tokens) is None
    repeated, windows = Repeated(tmp_path, opened.tokens, 0), list(opened.tokens.split(1))
    made = [torch.full((opened.tokens.shape[1] - 1, 256), float(number)) for number in range(len(windows))]
    for _ in range(2):  # what had been kept is made again
        for number, window in enumerate(windows):
            assert torch.equal(repeated.hidden(window, [number], lambda _, number=number: made[number]), made[number])
