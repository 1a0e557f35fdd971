"""How much each input of a matrix matters: its mean square on text, which llama.cpp calls an importance matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llmprune_cli.folder.tensors import split_name
from llmprune_cli.run.layer import check_states
from llmprune_cli.source.stored_names import Rules

if TYPE_CHECKING:
    from llmprune_cli.coupling.products import Product
    from llmprune_cli.run.layered_model import LayeredModel

LEAST = 1e-6  # of the mean importance
Place = tuple[str, int | None]  # a parameter in memory, and which slice of it where experts are stacked


def measure_importance(
    model: LayeredModel, windows: torch.Tensor, progress: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """E[x²] of each input of every matrix in the layers, float32 [inputs], by the stored tensor's name.

    What nothing but zeros reaches has none, and so have the embedding and the output, as in llama.cpp.

    Args:
        windows: token ids, [N, T].
        progress: told after each layer.

    Raises:
        CheckpointError: see `check_states`.
    """
    found: dict[Place, torch.Tensor] = {}
    with torch.inference_mode():
        stream = model.embed(windows)
        for number in range(model.layers):
            found |= _measure_layer(model, number, stream)
            check_states(stream, f"Layer {number}")
            progress(1)
    rules = Rules(model.skeleton)
    places = {entry.name: _place(rules, entry.name) for entry in model.checkpoint.entries}
    return {name: found[place] for name, place in places.items() if place in found}


def _measure_layer(model: LayeredModel, number: int, stream: torch.Tensor) -> dict[Place, torch.Tensor]:
    """The same for one layer, by places in memory; the stream passes through it."""
    totals: dict[Place, torch.Tensor] = {}
    counts: Counter[Place] = Counter()

    def watch(seen: Product) -> None:
        values = seen.values.reshape(-1, seen.values.shape[-1]).float()
        template, numbers = split_name(seen.parameter)
        place = template.format(number, *numbers[1:]), seen.expert
        squares = values.square().sum(0).cpu().double()
        totals[place] = totals[place] + squares if place in totals else squares
        counts[place] += len(values)

    model.load_layer(number).advance(stream, lambda first, batch: watch)
    means = {place: total / counts[place] for place, total in totals.items()}
    # An input that is always 0 has to count a little: where a whole block of them did not, it would have no scale.
    return {place: own.clamp_min(LEAST * own.mean()).float() for place, own in means.items() if own.mean() > 0}


def _place(rules: Rules, name: str) -> Place:
    memory, pattern, numbers = rules.locate(name)
    return memory, numbers[1] if pattern is not None and len(numbers) > 1 else None
