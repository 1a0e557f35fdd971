"""What a twin answers: to several sequences at once, with padding within one of them, and word by word from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmprune_cli.coupling.twin import VOCABULARY
from llmprune_cli.errors import UnsupportedError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PADDED = slice(1, 5)  # places of a padded sequence that nobody sees; before its first token nobody would see any
CACHED = 20  # tokens that are in the cache before the others come, one by one
FIRST = 3  # token that is not special
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)

Answers = dict[str, torch.Tensor | Exception]  # logits by the way of asking, or why there are none


def answer(model: PreTrainedModel, tokens: torch.Tensor) -> Answers:
    """The logits of a model by every way to ask it.

    Args:
        tokens: ids, [1, T].
    """
    every = torch.arange(FIRST, VOCABULARY)
    others = every[~torch.isin(every, tokens)]
    batch = torch.cat([tokens, torch.cat([others, tokens[0].flip(0)])[None, : tokens.shape[1]]])
    mask = torch.ones_like(batch)
    mask[1, PADDED] = 0
    ways = {"in a batch": _plainly, "around padding": _padded, "from a cache": _cached}
    answers: Answers = {}
    for name, ask in ways.items():
        try:
            with torch.no_grad():
                answers[name] = ask(model, batch, mask)
        except FAILURES as error:  # a family may have no cache, or none that takes one word at a time
            answers[name] = error
    return answers


def differ(dense: Answers, pruned: Answers) -> tuple[float, str]:
    """Largest difference of logits relative to how far they differ among tokens, and the way of asking that shows it.

    A way that the dense model has no finite answer to is left out, but for the first.

    Raises:
        UnsupportedError: the dense model does not run, or the pruned one does not where the dense one does.
    """
    found = (-1.0, "")
    for number, (way, expected) in enumerate(dense.items()):
        given = pruned[way]
        if isinstance(expected, Exception):
            if number == 0:
                raise UnsupportedError(f"A small twin does not run ({first_line(expected)}).") from expected
            continue
        if isinstance(given, Exception):
            raise UnsupportedError(f"A pruned twin does not run {way} ({first_line(given)}).") from given
        if number and not expected.isfinite().all():
            continue
        difference = float((expected - given).abs().max() / (expected - expected.mean(-1, keepdim=True)).abs().max())
        if not difference <= found[0]:
            found = (difference, way)
    return found


def _plainly(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _padded(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


def _cached(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    begun = model(input_ids=tokens[:, :CACHED], use_cache=True)
    rest = [begun.logits]
    name = "past_key_values" if "past_key_values" in begun else "cache_params"  # as state-space models call it
    for place in range(CACHED, tokens.shape[1]):
        step = model(input_ids=tokens[:, place : place + 1], use_cache=True, **{name: begun[name]})
        rest.append(step.logits)
    return torch.cat(rest, dim=1)
