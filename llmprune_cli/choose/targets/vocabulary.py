"""How many tokens stay where a target size is spent on them, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch

from llmprune_cli.choose.targets.limits import Limit
from llmprune_cli.choose.targets.search import Conditions, search_widths
from llmprune_cli.errors import PlanError
from llmprune_cli.journal.forms import Json
from llmprune_cli.plan.document import Plan, Vocabulary
from llmprune_cli.plan.requested_widths import Target
from llmprune_cli.repair.dense_goals import Streams
from llmprune_cli.repair.refit import refit
from llmprune_cli.run.divergence import Side, losses
from llmprune_cli.run.layer import windows_together
from llmprune_cli.run.perplexity import bits_per_byte
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.vocabulary.figures import TriedVocabulary
from llmprune_cli.vocabulary.request import STEP
from llmprune_cli.vocabulary.told import Told

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # of the tokens that are considered to stay


@dataclass(frozen=True)
class SizedVocabulary:
    """A vocabulary that a model may have."""

    vocabulary: Vocabulary  # of all tokens, too
    spared: tuple[int, int]  # parameters and bytes in the rows that go, which a target leaves to the rest
    told: Told | None  # held-out text in its tokens; None where nothing is tried

    @property
    def size(self) -> int:
        """The tokens that stay."""
        return len(self.vocabulary.kept)

    @property
    def cut(self) -> Vocabulary | None:
        """The same for a plan, which says nothing where all tokens stay."""
        return self.vocabulary if self.size < self.vocabulary.before else None


def sizes_to_try(rows: int, least: int, share: float) -> tuple[int, ...]:
    """All tokens, and ever fewer, down to as many as must stay or as reach the target alone.

    Args:
        rows: of the embedding.
        least: the smallest size that it can have.
        share: of all rows that are to go where nothing else does.
    """
    enough = math.floor((1 - share) * rows / STEP) * STEP if share < 1 else 0
    least = max(least, enough)
    below = {max(least, math.ceil(part * rows / STEP) * STEP) for part in SHARES}
    return tuple(sorted({rows, *(size for size in below if size < rows)}, reverse=True))


@dataclass(frozen=True)
class TryOut:
    """What a vocabulary is tried out with."""

    bench: Workbench
    fitted: torch.Tensor  # token ids, [N, T], on which the rest of the target is refitted
    method: str  # see `refit`
    limit: Limit  # of the model with all tokens
    conditions: Conditions
    layer_scores: tuple[float, ...]  # see `search_widths`
    follow: Callable[[Target], Plan]  # gives the plan of some widths


def settle_vocabulary(
    try_out: TryOut, sized: Sequence[SizedVocabulary]
) -> tuple[SizedVocabulary, tuple[TriedVocabulary, ...]]:
    """The vocabulary that a target is best spent on, by bits per byte of held-out text, and all that were tried.

    Args:
        sized: the largest first; a single one is not tried.
    """

    def judge(own: SizedVocabulary) -> float | None:
        target = _first_fitting(try_out, own.spared)
        if target is None:
            return None
        read = partial(_bits_per_byte, try_out, target, own)
        return try_out.bench.journal.recall(f"judged-{own.size}-tokens", Json(float), read)

    return search_vocabulary(sized, judge) if len(sized) > 1 else (sized[0], ())


def search_vocabulary(
    sized: Sequence[SizedVocabulary], judge: Callable[[SizedVocabulary], float | None]
) -> tuple[SizedVocabulary, tuple[TriedVocabulary, ...]]:
    """The vocabulary that does best, and all that were tried, the best first.

    They are tried from the largest on, until one does worse than all before it.

    Args:
        judge: gives bits per byte of held-out text; None where no widths fit beside so many tokens.
    """
    tried: list[TriedVocabulary] = []
    best = sized[-1]
    for own in sized:
        bits = judge(own)
        if bits is None:
            continue
        is_better = not tried or bits < min(other.bits_per_byte for other in tried)
        tried.append(TriedVocabulary(own.size, bits))
        if not is_better:
            break
        best = own
    return best, tuple(sorted(tried, key=lambda other: other.bits_per_byte))


def _first_fitting(try_out: TryOut, spared: tuple[int, int]) -> Target | None:
    """What a search of widths begins with: as many layers and neurons as fit; None where nothing does."""
    numbers = count()

    def in_turn(target: Target) -> float:
        return next(numbers)

    about = (try_out.limit.sparing(spared), try_out.layer_scores, in_turn, try_out.conditions)
    try:
        found = search_widths(try_out.bench.model.subject, *about)
    except PlanError:
        return None
    return found[0].target


def _bits_per_byte(try_out: TryOut, target: Target, own: SizedVocabulary) -> float:
    """Of held-out text in the tokens of a vocabulary, when widths are cut and some text refitted."""
    bench, told = try_out.bench, own.told
    assert told is not None
    model, plan = bench.model, try_out.follow(target)
    fitted = model.share(try_out.fitted)
    places = model.processes.share(torch.arange(len(told.windows)), windows_together(told.windows)).tolist()
    bench.listener.stage(f"Trying {own.size:,} tokens", model.layers)
    known = torch.zeros(own.vocabulary.before, dtype=torch.bool)
    known[list(own.vocabulary.kept)] = True
    with torch.inference_mode():
        start = model.embed(torch.cat([fitted, told.windows[places]]))
        streams = Streams.of(model, start, len(fitted))
        refit(model, plan, streams, try_out.method, bench.listener.advance, with_errors=False)
        ends, items, nats = model.load_ends(exact=True), model.load_layer(0).returned_items(start), 0.0
        for place, states in zip(places, streams.pruned[len(fitted) :], strict=True):
            length = told.lengths[place]
            nats += losses(Side(ends, states[None, :length], items), told.windows[place][None, :length], known)
    return bits_per_byte(model.processes.add_up(nats)[0], told.bytes)
