"""Signals, a terminal that goes away, and memory that runs out."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from llmprune_cli.errors import CheckpointError
from support.cli import BY_CHANCE, run_cli
from support.full import examples
from support.refusals import INTERRUPTED, MEMORY, assert_refused
from support.started import start


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 270 MB, all zeros, whose writing takes long enough to be interrupted."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from llmprune_cli.family.skeleton import expected_index

    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=512,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_index(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def begin(model: Path, place: Path, said: Path, errors: Path, terminal: int | None = None) -> BaseProcess:
    """Start a prune, and wait until it writes.

    Args:
        terminal: our end of one that must not fill up meanwhile.
    """
    command = ("prune", model, *BY_CHANCE, "--intermediate-size", "4090", "--output", place / "out")
    process, deadline = start(*command, said=said, errors=errors), time.monotonic() + 120
    while not (place / ".out.llmprune-work" / "new" / "model.safetensors").exists():
        assert process.is_alive() and time.monotonic() < deadline, "no writing was seen"
        if terminal is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(terminal, 4096)
        time.sleep(0.005)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("interruption", examples(["SIGINT", "SIGTERM", "SIGHUP"], ["SIGTERM"]))
def test_an_interrupted_prune_leaves_nothing(large_model: Path, tmp_path: Path, interruption: str) -> None:
    place, said, errors = tmp_path / "place", tmp_path / "said", tmp_path / "errors"
    place.mkdir()
    process = begin(large_model, place, said, errors)
    assert process.pid is not None
    os.kill(process.pid, getattr(signal, interruption))
    while interruption != "SIGINT" and process.is_alive():  # what comes again does not stop the tidying up
        with contextlib.suppress(ProcessLookupError):  # the fork server may have reaped it meanwhile
            os.kill(process.pid, getattr(signal, interruption))
        time.sleep(0.001)
    process.join(60)
    assert process.exitcode == INTERRUPTED, errors.read_text()
    assert said.read_text() == "" and "Traceback" not in errors.read_text()
    assert not list(place.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_terminal_that_goes_away(large_model: Path, tmp_path: Path) -> None:
    import pty

    mine, its = pty.openpty()
    os.set_blocking(mine, False)
    terminal = Path(os.ttyname(its))
    process = begin(large_model, tmp_path, terminal, terminal, mine)
    os.close(its)
    os.close(mine)
    process.join(60)
    assert process.exitcode == INTERRUPTED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", ["torch.empty(2**50, dtype=torch.uint8)", "numpy.empty(2**50)", "cuda", "mapped", "refused"]
)
def test_memory_that_runs_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    import numpy
    import torch

    from llmprune_cli.commands import inspect

    def exhaust(*_: object) -> None:
        shortage = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")
        if error == "cuda":
            raise shortage
        if error == "mapped":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if error == "refused":
            raise CheckpointError("It cannot be loaded.") from shortage
        eval(error, {"torch": torch, "numpy": numpy})

    monkeypatch.setattr(inspect, "inspect", exhaust)
    assert_refused(run_cli("inspect", tiny_llama), MEMORY, "Memory ran out: ", "--calibration-tokens")
