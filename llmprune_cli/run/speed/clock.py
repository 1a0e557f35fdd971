"""The seconds of forward passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def timing(module: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """The seconds of each forward pass of a module, in the order in which they end."""
    passes: list[float] = []
    started = 0.0

    def start(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal started
        wait(device)
        started = time.perf_counter()

    def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        wait(device)
        passes.append(time.perf_counter() - started)

    handles = [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
