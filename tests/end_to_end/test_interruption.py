"""Signals, a terminal that goes away, and memory that runs out."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmprune_cli.errors import CheckpointError
from support.cli import BY_MAGNITUDE, run_cli
from support.full import examples
from support.refusals import INTERRUPTED, MEMORY, assert_refused


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


def hear_signals() -> None:
    """Undo what shells do to what they run behind, and nohup to what it runs."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("interruption", examples(["SIGINT", "SIGTERM", "SIGHUP"], ["SIGTERM"]))
def test_an_interrupted_prune_leaves_nothing(large_model: Path, tmp_path: Path, interruption: str) -> None:
    command = [sys.executable, "-m", "llmprune_cli", "prune", large_model, *BY_MAGNITUDE, "--intermediate-size", "4090"]
    command += ["--importance", "random", "--output", tmp_path / "out"]
    child = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.llmprune-work" / "new" / "model.safetensors").exists():
        assert child.poll() is None and time.monotonic() < deadline, "no writing was seen"
        time.sleep(0.005)
    child.send_signal(getattr(signal, interruption))
    while interruption != "SIGINT" and child.poll() is None:  # what comes again does not stop the tidying up
        child.send_signal(getattr(signal, interruption))
        time.sleep(0.001)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == INTERRUPTED, stderr
    assert stdout == "" and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_terminal_that_goes_away(large_model: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    command = [sys.executable, "-m", "llmprune_cli", "prune", large_model, *BY_MAGNITUDE, "--intermediate-size", "4090"]
    command += ["--importance", "random", "--output", tmp_path / "out"]
    terminal, its_end = pty.openpty()

    def take_terminal() -> None:
        hear_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    child = subprocess.Popen(
        list(map(str, command)),
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(its_end)
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.llmprune-work" / "new" / "model.safetensors").exists():
        assert child.poll() is None and time.monotonic() < deadline, "no writing was seen"
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 4096)
        time.sleep(0.005)
    os.close(terminal)
    assert child.wait(timeout=60) == INTERRUPTED
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
