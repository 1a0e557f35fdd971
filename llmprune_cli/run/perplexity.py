"""Perplexity of a causal LM over windows of tokens."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch.nn import functional

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.processes import ALONE, Processes
from llmprune_cli.run.layer import running_as
from llmprune_cli.run.states import new_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

try:
    import resource
except ImportError:  # on Windows, where psutil tells the peak, as it does nowhere else
    resource = None  # type: ignore[assignment]

LOGIT_ELEMENTS = 2**23  # logits formed at a time: 32 MiB in float32
MOST_WINDOWS = 64  # that are tried together


@dataclass(frozen=True)
class RunningPerplexity:
    """Where an evaluation stands."""

    windows_done: int
    windows: int
    tokens: int  # tokens read so far
    seconds: float
    mean_nll: float  # mean over the windows so far of their mean negative log-likelihood, nats per token
    kl: float | None = None  # mean KL(first ‖ this) of the next token, nats; None where nothing was compared

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Negative log-likelihood of a text, in nats, as bits per byte of it; the same whatever the tokens are.

    Gao et al., "The Pile", arXiv 2101.00027: BPB = (L_T / L_B) · ℓ / ln 2, for L_T tokens of L_B bytes and the mean
    loss ℓ of a token.
    """
    return nats / math.log(2) / text_bytes if text_bytes else math.nan


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


class FirstModel:
    """What the first of several models predicts on some windows, for the divergence of the others from it.

    Of the model only what makes logits of its last hidden states is kept, and these states in a file without a name.
    """

    def __init__(self, folder: Path) -> None:
        """With a folder for the states."""
        self._folder = folder
        self._states: torch.Tensor | None = None  # [N, T-1, D] of this process's share
        self._model: PreTrainedModel | None = None

    def keep(self, model: PreTrainedModel, place: slice, hidden: torch.Tensor, windows: int) -> None:
        """Keep hidden states [B, T-1, D] of some of the windows."""
        if self._states is None:
            self._states = new_states((windows, *hidden.shape[1:]), self._folder, hidden.dtype)
        self._states[place] = hidden.to(self._states.device)
        self._model = model

    def shrink(self) -> None:
        """Let the weights of all layers go."""
        model = self._model
        if model is None:
            return
        body = without_head(model)
        within = {*body.modules()}
        needed = {id(p) for m in model.modules() if m not in within for p in m.parameters(recurse=False)}
        for parameter in body.parameters():
            if id(parameter) not in needed and not parameter.is_meta:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def divergence(self, windows: slice, places: slice, logits: torch.Tensor) -> torch.Tensor | None:
        """Σ over places of KL(first ‖ other) of each window, [B]; None where the vocabularies differ.

        Args:
            logits: of the other model, float32 [B, T', V].
        """
        assert self._states is not None and self._model is not None
        place = next((p.device for p in self._model.parameters() if p.numel() and not p.is_meta), logits.device)
        own = head_logits(self._model, self._states[windows, places].to(place)).float().to(logits.device)
        if own.shape != logits.shape:
            return None
        other, ours = functional.log_softmax(logits, -1), functional.log_softmax(own, -1)
        kl = functional.kl_div(other, ours, reduction="none", log_target=True).sum(-1)
        return kl.cpu().sum(1, dtype=torch.float64)


def evaluate_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int,
    progress: Callable[[RunningPerplexity], None],
    processes: Processes = ALONE,
    first: FirstModel | None = None,
    is_first: bool = False,
) -> RunningPerplexity:
    """Exponent of the mean over windows of the mean negative log-likelihood of each window's tokens but the first.

    Args:
        windows: token ids, [N, T], of which each process runs its share.
        progress: told where this process's share stands.
        first: the model that this one is held against, or that this one is.
        is_first: whether it is.

    Returns:
        Where all windows stand, and the seconds of the slowest process. What the windows add up to does not depend on
        the number of processes: their sums are added in the same order.
    """
    share = processes.share(windows, batch_size)
    started, sums, total = time.perf_counter(), [], 0.0
    kls: list[float | None] = []
    state = RunningPerplexity(0, len(share), 0, 0.0, math.nan)
    with torch.inference_mode():
        for batch in share.split(batch_size) if len(share) else ():
            done = state.windows_done + len(batch)
            place = slice(state.windows_done, done)
            if first is not None and is_first:
                hidden = last_states(model, batch)
                first.keep(model, place, hidden, len(share))
                sums.append(float(window_nll(model, batch, hidden).sum()))
            else:
                nll, kl = _nll_and_kl(model, batch, None, (first, place) if first else None)
                sums.append(float(nll.sum()))
                kls.append(None if kl is None else float(kl.sum()))
            total += sums[-1]
            seconds = time.perf_counter() - started
            state = RunningPerplexity(done, len(share), state.tokens + batch.numel(), seconds, total / done)
            progress(state)
    total = functools.reduce(operator.add, itertools.chain(*processes.gather(sums)), 0.0)  # `sum` would round otherwise
    slowest = max(processes.gather(state.seconds))
    divergence = _mean_kl([*itertools.chain(*processes.gather(kls))], windows[:, 1:].numel())
    if first is not None and is_first:
        first.shrink()
    return RunningPerplexity(len(windows), len(windows), windows.numel(), slowest, total / len(windows), divergence)


def _mean_kl(sums: list[float | None], tokens: int) -> float | None:
    """The mean over tokens, infinite for NaN; None where a part of the text was not compared, or nothing was."""
    known = [own for own in sums if own is not None]
    if not known or len(known) < len(sums):
        return None
    kl = sum(known) / tokens
    return math.inf if math.isnan(kl) else max(0.0, kl)  # rounding may leave less than nothing


def window_nll(model: PreTrainedModel, batch: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Mean negative log-likelihood of each window, [B]; logits are formed for a chunk of positions at a time.

    Args:
        hidden: what `last_states` gives, where it is known.
    """
    return _nll_and_kl(model, batch, hidden, None)[0]


def without_head(model: PreTrainedModel) -> Any:
    """The part of a model that gives hidden states; Llama 4 names another one as its base model, which it lacks."""
    base, embedding = model.base_model, model.get_input_embeddings()
    if base is not model:
        return base
    return next(own for own in model.children() if any(part is embedding for part in own.modules()))


def last_states(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Hidden states behind the last layer and its norm, [B, T-1, D], of all places that something follows."""
    place = next(model.get_input_embeddings().parameters()).device
    if place.type != "meta":  # where an embedding lies on disk, accelerate moves what it is given
        batch = batch.to(place)
    states: torch.Tensor = without_head(model)(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
    return states


def _nll_and_kl(
    model: PreTrainedModel,
    batch: torch.Tensor,
    hidden: torch.Tensor | None,
    against: tuple[FirstModel, slice] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `window_nll` gives, and the summed divergence of each window from the first model, [B] both."""
    hidden = last_states(model, batch) if hidden is None else hidden
    targets = batch[:, 1:]
    vocabulary = model.config.get_text_config().vocab_size
    chunk = max(1, LOGIT_ELEMENTS // (vocabulary * len(batch)))
    total = torch.zeros(len(batch), dtype=torch.float64)
    kl: torch.Tensor | None = total.clone() if against else None
    for start in range(0, targets.shape[1], chunk):
        logits = head_logits(model, hidden[:, start : start + chunk]).float()
        wanted = targets[:, start : start + chunk].to(logits.device)
        losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        total += losses.view(wanted.shape).cpu().sum(dim=1, dtype=torch.float64)
        if against is not None and kl is not None:
            first, windows = against
            own = first.divergence(windows, slice(start, start + wanted.shape[1]), logits)
            kl = None if own is None else kl + own
    return total / targets.shape[1], kl


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

    body = without_head(model)
    parts = [part for part in (body, getattr(body, "decoder", None)) if part is not None]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(running_as(part, hand_out))
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        except IndexError:  # it wants more than the states, as ProphetNet does
            asked.clear()
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
