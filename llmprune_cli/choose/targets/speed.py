"""A target in time: the dense model and others of fewer units, timed by turns on this machine."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from hashlib import sha256

import torch

from llmprune_cli.choose.targets.limits import Limit, whole_target
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.errors import PlanError
from llmprune_cli.family.architecture import with_widths
from llmprune_cli.family.layers import sample_layers
from llmprune_cli.family.widths import Widths
from llmprune_cli.folder.tensors import split_name
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.progress import Listener
from llmprune_cli.run.precision import native_dtype
from llmprune_cli.run.speed.figures import Pace, SpeedResult
from llmprune_cli.run.speed.timed_model import LARGE_BYTES, NEW_TOKENS, STEPS, RunTime, TimedModel, Work
from llmprune_cli.vocabulary.size import with_rows

ROUNDS, LAST_ROUNDS = 3, 7  # in which each model is timed once: of a candidate, and of what was chosen
WARM_UP = 32  # tokens of a prompt that touch fresh memory and start threads
PROMPT = 512  # tokens, where nothing else is asked for and the model can attend to as many

Rounds = list[tuple[RunTime, RunTime]]  # the dense model, and the other one


def work_of(subject: Subject, batch: int | None, context: int | None) -> Work:
    """What is timed.

    Args:
        batch, context: that are asked for.

    Raises:
        PlanError: more tokens than the model can attend to.
    """
    longest = getattr(subject.architecture.config, "max_position_embeddings", None) or math.inf
    if context is not None and context + 1 + STEPS > longest:
        raise PlanError(f"The model attends to {longest:,} tokens. Give at most --context {longest - 1 - STEPS}.")
    usual = int(min(PROMPT, max(longest - NEW_TOKENS, longest // 2)))
    return Work(batch or 1, context or usual)


class Race:
    """The dense model beside others."""

    def __init__(
        self, subject: Subject, work: Work, device: str, listener: Listener, tokens: int | None = None
    ) -> None:
        """On a device, in the dtype of the weights, or in float32 where it multiplies these no faster.

        Args:
            tokens: in the vocabulary of the others; None: as many as in the dense model's.
        """
        self.work, self._tokens = work, tokens
        self._subject, self._device, self._listener = subject, device, listener
        self._dtype = native_dtype(subject.checkpoint.stored_dtype, torch.device(device))
        architecture = subject.architecture
        sizes = [entry.size_bytes for entry in subject.checkpoint.entries if split_name(entry.name)[1]]
        each = math.ceil(LARGE_BYTES * subject.widths.num_hidden_layers / max(1, sum(sizes)))
        self._layers = sample_layers(architecture.config, architecture.layer_kinds, each)
        self._dense: TimedModel | None = None
        self._known: dict[Widths, Rounds] = {}

    def ratio(self, target: Target) -> float:
        """The time that a target takes, by the dense model's: the median over the rounds."""
        alike = replace(target.widths, num_hidden_layers=self._subject.widths.num_hidden_layers)
        if alike not in self._known:
            processes = self._subject.processes
            self._known[alike] = processes.broadcast(self._time(alike, ROUNDS) if processes.is_first else [])
        return self._ratio(target, self._known[alike])

    def finish(self, target: Target) -> SpeedResult:
        """Time what was chosen once more, for longer; what the race needed goes.

        All figures are of the round with the median ratio, so that they agree.
        """
        rounds = sorted(self._time(target.widths, LAST_ROUNDS), key=lambda own: self._ratio(target, [own]))
        self._dense = None
        self._known.clear()
        dense, other = middle = rounds[len(rounds) // 2]
        return SpeedResult(
            speedup=1 / self._ratio(target, [middle]),
            rounds=len(rounds),
            batch=self.work.batch,
            prompt_tokens=self.work.prompt,
            new_tokens=self.work.new_tokens,
            device=self._device,
            dtype=str(self._dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            before=self._pace(dense, whole_target(self._subject)),
            after=self._pace(other, target),
        )

    def __str__(self) -> str:
        work = self.work
        return f"batch {work.batch}, {work.prompt:,} tokens read and {work.new_tokens:,} written, on {self._device}"

    def _ratio(self, target: Target, rounds: Rounds) -> float:
        before, after = self._kinds(whole_target(self._subject)), self._kinds(target)
        return statistics.median(other.of(after, self.work) / dense.of(before, self.work) for dense, other in rounds)

    def _pace(self, time: RunTime, target: Target) -> Pace:
        work, kinds = self.work, self._kinds(target)
        return Pace(work.batch * work.prompt / time.prefill.of(kinds), work.batch / time.decode.of(kinds))

    def _kinds(self, target: Target) -> list[int]:
        return [self._subject.architecture.layer_kinds[layer] for layer in target.layers]

    def _time(self, widths: Widths, rounds: int) -> Rounds:
        """Both models by turns, so that what else the machine does meets both alike; a short first turn warms up."""
        self._listener.stage(f"Timing {_in_words(widths)}", rounds)
        short = replace(self.work, prompt=min(self.work.prompt, WARM_UP))
        if self._dense is None:
            self._dense = self._build(self._subject.widths, None)
            self._dense.run(short)
        other, found = self._build(widths, self._tokens), []
        other.run(short)
        for _ in range(rounds):
            found.append((self._dense.run(self.work), other.run(self.work)))
            self._listener.advance(1)
        return found

    def _build(self, widths: Widths, tokens: int | None) -> TimedModel:
        architecture, layers = self._subject.architecture, self._layers
        config = with_widths(architecture, replace(widths, num_hidden_layers=len(layers)), layers)
        if tokens is not None:
            config = with_rows(config, tokens)
        kinds = [architecture.layer_kinds[layer] for layer in layers]
        return TimedModel(config, kinds, self._device, self._dtype)


def _in_words(widths: Widths) -> str:
    shapes = {
        "heads": widths.num_attention_heads,
        "KV groups": widths.num_key_value_heads,
        "neurons": widths.intermediate_size or widths.moe_intermediate_size,
        "experts": widths.num_experts,
    }
    return "layers of " + ", ".join(f"{count:,} {name}" for name, count in shapes.items() if count)


@dataclass(frozen=True)
class SpeedLimit:
    """How many times as fast the model has to be."""

    speedup: float
    race: Race
    spared: tuple[int, int] = (0, 0)  # see `Limit`
    less = "less"

    def __str__(self) -> str:
        return f"the model {self.speedup:g} times as fast"

    @property
    def share(self) -> float:
        """See `Limit`."""
        return 1 / self.speedup

    def fits(self, target: Target) -> bool:
        """See `Limit`."""
        return self.race.ratio(target) <= self.share

    def sparing(self, spared: tuple[int, int]) -> SpeedLimit:
        """See `Limit`; how many tokens are timed the race knows."""
        return replace(self, spared=spared)

    def check(self, least: Target, remedy: str) -> None:
        """See `Limit`."""
        reached = math.floor(100 / self.race.ratio(least)) / 100
        if reached < self.speedup:
            raise PlanError(
                f"No uniform widths that the search reaches leave {self} here; with the least of all, it is "
                f"{reached:g} times as fast ({self.race}). Ask for less, or {remedy}."
            )


@dataclass(frozen=True)
class Remembered:
    """A limit whose answers a run that goes on need not measure again, which might come out otherwise."""

    limit: Limit
    journal: Journal

    @property
    def less(self) -> str:
        """See `Limit`."""
        return self.limit.less

    @property
    def share(self) -> float:
        """See `Limit`."""
        return self.limit.share

    @property
    def spared(self) -> tuple[int, int]:
        """See `Limit`."""
        return self.limit.spared

    def __str__(self) -> str:
        return str(self.limit)

    def fits(self, target: Target) -> bool:
        """See `Limit`."""
        mark = sha256(repr(target).encode()).hexdigest()[:16]
        return self.journal.recall(f"fits-{mark}", Json(bool), lambda: self.limit.fits(target))

    def sparing(self, spared: tuple[int, int]) -> Remembered:
        """See `Limit`."""
        return replace(self, limit=self.limit.sparing(spared))

    def check(self, least: Target, remedy: str) -> None:
        """See `Limit`."""
        self.limit.check(least, remedy)
