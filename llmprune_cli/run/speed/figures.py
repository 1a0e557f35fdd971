"""How fast a model is beside another, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Tokens per second of all texts of a batch together."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class SpeedResult:
    """How fast the pruned model is beside the dense one, timed by turns with layers of random weights."""

    speedup: float  # median over the rounds of the dense model's time by the pruned one's, for all tokens
    rounds: int
    batch: int  # texts at a time
    prompt_tokens: int  # that are read, of each
    new_tokens: int  # that are written then, of each
    device: str
    dtype: str
    threads: int  # of torch on the CPU
    before: Pace
    after: Pace
