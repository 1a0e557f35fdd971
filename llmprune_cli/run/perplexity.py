"""Perplexity of a causal LM over windows of tokens."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch.nn import functional

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

try:
    import resource
except ImportError:  # on Windows, where psutil tells the peak, as it does nowhere else
    resource = None  # type: ignore[assignment]

LOGIT_ELEMENTS = 2**24  # logits formed at a time: 64 MiB in float32
MOST_WINDOWS = 64  # that are tried together


@dataclass(frozen=True)
class RunningPerplexity:
    """Where an evaluation stands."""

    windows_done: int
    windows: int
    tokens: int  # tokens read so far
    seconds: float
    mean_nll: float  # mean over the windows so far of their mean negative log-likelihood, nats per token

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf


def largest_batch(model: PreTrainedModel, windows: torch.Tensor) -> int:
    """How many windows, [N, T], fit into the device's memory at a time: halved from many until they do.

    One is taken to fit: what else would be said of it is said when it is evaluated.
    """
    size = min(MOST_WINDOWS, len(windows))

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)  # type: ignore[untyped-decorator]
    def fitting(batch_size: int) -> int:
        if batch_size > 1:
            with torch.inference_mode():
                window_nll(model, windows[:batch_size])
        return batch_size

    return int(fitting())


def evaluate_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int,
    progress: Callable[[RunningPerplexity], None],
    processes: Processes = ALONE,
) -> RunningPerplexity:
    """Exponent of the mean over windows of the mean negative log-likelihood of each window's tokens but the first.

    Args:
        windows: token ids, [N, T], of which each process runs its share.
        progress: told where this process's share stands.

    Returns:
        Where all windows stand, and the seconds of the slowest process. What the windows add up to does not depend on
        the number of processes: their sums are added in the same order.
    """
    share = processes.share(windows, batch_size)
    started, sums, total = time.perf_counter(), [], 0.0
    state = RunningPerplexity(0, len(share), 0, 0.0, math.nan)
    with torch.inference_mode():
        for batch in share.split(batch_size) if len(share) else ():
            sums.append(float(window_nll(model, batch).sum()))
            total += sums[-1]
            done = state.windows_done + len(batch)
            seconds = time.perf_counter() - started
            state = RunningPerplexity(done, len(share), state.tokens + batch.numel(), seconds, total / done)
            progress(state)
    total = functools.reduce(operator.add, itertools.chain(*processes.gather(sums)), 0.0)  # `sum` would round otherwise
    slowest = max(processes.gather(state.seconds))
    return RunningPerplexity(len(windows), len(windows), windows.numel(), slowest, total / len(windows))


def window_nll(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window, [B]; logits are formed for a chunk of positions at a time."""
    place = next(model.get_input_embeddings().parameters()).device
    if place.type != "meta":  # where an embedding lies on disk, accelerate moves what it is given
        batch = batch.to(place)
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
    targets = batch[:, 1:]
    vocabulary = model.config.get_text_config().vocab_size
    chunk = max(1, LOGIT_ELEMENTS // (vocabulary * len(batch)))
    total = torch.zeros(len(batch), dtype=torch.float64)
    for start in range(0, targets.shape[1], chunk):
        logits = head_logits(model, hidden[:, start : start + chunk]).float()
        wanted = targets[:, start : start + chunk].to(logits.device)
        losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        total += losses.view(wanted.shape).sum(dim=1, dtype=torch.float64).cpu()
    return total / targets.shape[1]


class _Given:
    """What a base model returns, of any family: the given hidden states, and None for whatever else is asked."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, T, D] to logits [B, T, V] by the model's own forward, so that soft-capping and scales stay.

    For this one call the base model's forward hands out the given hidden states, and so does that of a decoder within
    it, which some families ask instead (OPT).

    Raises:
        UnsupportedError: the model asks neither.
    """
    asked: list[Any] = []

    def hand_out(*args: Any, **options: Any) -> _Given:
        asked.append(options)
        return _Given(hidden)

    parts = [part for part in (model.base_model, getattr(model.base_model, "decoder", None)) if part is not None]
    originals = [part.forward for part in parts]
    try:
        for part in parts:
            part.forward = hand_out
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for part, original in zip(parts, originals, strict=True):
            part.forward = original
    if not asked:
        raise UnsupportedError(f"{model.config.model_type} forms its logits in a way that is unknown here.")
    return logits


def peak_memory_bytes(model: PreTrainedModel) -> int:
    """Largest memory of this process so far: with weights on CUDA what torch allocated there, else resident memory."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    if resource is None:
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
