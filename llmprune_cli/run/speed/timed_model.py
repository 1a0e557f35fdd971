"""A model of some widths that reads and writes, to see how long that takes.

Its weights are random: how long products take depends on their shapes. It has as many layers as do not stay in a
processor's cache from one token to the next; the others take as long as those of their kind.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from llmprune_cli.errors import UnsupportedError, first_line
from llmprune_cli.family.skeleton import is_remote
from llmprune_cli.run.layered_model import layer_prefix
from llmprune_cli.run.speed.clock import timing

LARGE_BYTES = 2**29  # of layers, which no cache holds
STEPS = 8  # tokens that are written and timed; those of a longer text take as long
NEW_TOKENS = 128  # that are written after each prompt
POOL, SPREAD = 2**20, 0.02  # random numbers that all weights are made of


@dataclass(frozen=True)
class Work:
    """What is timed."""

    batch: int
    prompt: int  # tokens
    new_tokens: int = NEW_TOKENS


@dataclass(frozen=True)
class PassTime:
    """The seconds of a forward pass, part by part."""

    ends: float  # before, between and after the layers
    layers: dict[int, float]  # of one layer of each kind, by the number of the first of its kind

    def of(self, kinds: Sequence[int]) -> float:
        """Of a model with layers of these kinds."""
        return self.ends + sum(self.layers[kind] for kind in kinds)


@dataclass(frozen=True)
class RunTime:
    """The seconds of a prompt, and of a token that is written."""

    prefill: PassTime
    decode: PassTime

    def of(self, kinds: Sequence[int], work: Work) -> float:
        """Of all tokens, in a model with layers of these kinds."""
        return self.prefill.of(kinds) + work.new_tokens * self.decode.of(kinds)


class TimedModel:
    """One that runs as `generate` runs it."""

    def __init__(self, config: PretrainedConfig, kinds: Sequence[int], device: str, dtype: torch.dtype) -> None:
        """With random weights.

        Args:
            kinds: of the layers of this configuration.

        Raises:
            UnsupportedError: transformers cannot build it.
        """
        self._kinds, self._device = kinds, torch.device(device)
        self._model: Any = _build(config, self._device, dtype)
        layers = self._model.get_submodule(layer_prefix(self._model).removesuffix(".0."))
        assert isinstance(layers, nn.ModuleList)
        self._layers = layers

    def run(self, work: Work) -> RunTime:
        """Read a batch of prompts and write a few tokens.

        Raises:
            UnsupportedError: the model cannot.
        """
        ids = torch.randint(
            0, self._model.config.get_text_config().vocab_size, (work.batch, work.prompt), device=self._device
        )
        how = GenerationConfig(
            max_new_tokens=1 + STEPS, min_new_tokens=1 + STEPS, do_sample=False, pad_token_id=0, use_cache=True
        )
        with ExitStack() as stack:
            layers = [stack.enter_context(timing(layer, self._device)) for layer in self._layers]
            passes = stack.enter_context(timing(self._model, self._device))
            stack.enter_context(torch.inference_mode())
            try:
                self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise UnsupportedError(f"It cannot be timed, as it does not generate: {first_line(error)}.") from error
        parts = [self._split(passes[number], [own[number] for own in layers]) for number in range(len(passes))]
        return RunTime(parts[0], _median(parts[1:]))

    def _split(self, whole: float, layers: Sequence[float]) -> PassTime:
        by_kind: dict[int, list[float]] = defaultdict(list)
        for kind, seconds in zip(self._kinds, layers, strict=True):
            by_kind[kind].append(seconds)
        return PassTime(max(0.0, whole - sum(layers)), {kind: statistics.mean(own) for kind, own in by_kind.items()})


def _median(parts: Sequence[PassTime]) -> PassTime:
    kinds = {kind: statistics.median(part.layers[kind] for part in parts) for kind in parts[0].layers}
    return PassTime(statistics.median(part.ends for part in parts), kinds)


def _build(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with one pool of random numbers for all weights; norms have ones."""
    try:
        with init_empty_weights(include_buffers=False):
            options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": is_remote(config)}
            model: Any = AutoModelForCausalLM.from_config(config, **options)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"It cannot be timed, as it cannot be built: {first_line(error)}.") from error
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).to(device, dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                _fill(values, pool)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()


def _fill(values: torch.Tensor, pool: torch.Tensor) -> None:
    flat = values.view(-1)
    for first in range(0, math.ceil(len(flat) / len(pool)) * len(pool), len(pool)):
        part = flat[first : first + len(pool)]
        part.copy_(pool[: len(part)])
