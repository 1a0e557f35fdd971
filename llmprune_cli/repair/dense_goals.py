"""The unpruned model's residual stream within and behind a layer: what the readers there have to make up for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune_cli.coupling.products import Product
from llmprune_cli.repair.sites import Site, find_sites
from llmprune_cli.run.layer import Layer, check_states
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.states import DenseStates, KeptStates, copy_states, new_states

if TYPE_CHECKING:
    from llmprune_cli.coupling.products import Collector, Watcher

READERS = 2  # of a layer whose results are followed, at most as a rule: of its mixer and of its MLP


@dataclass(frozen=True)
class Streams:
    """Hidden states of the dense and of the pruned model, [N, T, D], for this process's share of windows."""

    dense: torch.Tensor  # see `stream_dtype`
    pruned: torch.Tensor  # float32
    fitted: int  # windows that are fitted; those behind them only pass through
    folder: Path | None = None  # of more of their kind, see `new_states`
    kept: KeptStates | None = None  # what the dense model has made of these windows already

    @classmethod
    def of(
        cls,
        model: LayeredModel,
        start: torch.Tensor,
        fitted: int,
        folder: Path | None = None,
        kept: KeptStates | None = None,
    ) -> Streams:
        """Both at the same float32 states before the first layer, of which the dense one is a copy."""
        return cls(copy_states(start, folder, stream_dtype(model)), start, fitted, folder, kept)


class StreamWithin:
    """Hidden states [B, T, D] behind the readers that have run so far, but for experts and what is no reader."""

    def __init__(self, states: torch.Tensor, sites: Sequence[Site]) -> None:
        """Start at the states before the layer, of which it makes a copy in float32.

        Args:
            sites: readers whose results are followed, where their entry is known.
        """
        self.states = states.to(torch.float32, copy=True)
        self._entries = {site.name: site.entry for site in sites if site.entry and site.entry.way != "shared"}

    def watch(self, seen: Product) -> None:
        """Add what a reader makes."""
        self.add(seen.parameter, seen.result)

    def add(self, name: str, result: torch.Tensor) -> None:
        """Add what the reader with this parameter has made."""
        if name in self._entries:
            added = self._entries[name].contribution(result.float())
            self.states.add_(added.to(self.states.device).view(self.states.shape))


def sites_of(model: LayeredModel, layer: Layer, number: int, kept: KeptStates | None) -> list[Site]:
    """The readers of a layer, see `find_sites`; of an unchanged one, as an earlier walk found them."""
    found: list[Site] = kept.states.notes[number] if kept is not None else find_sites(model, layer)
    return found


def advance_dense(layer: Layer, number: int, found: Sequence[Site], streams: Streams) -> dict[str, torch.Tensor]:
    """The dense stream through the layer; what it is behind each reader whose entry is known, [fitted, T, D]."""
    fitted, dense = streams.fitted, streams.dense
    known = [site for site in found if site.entry is not None]
    within = {site.name for site in known if not site.ends_layer}
    goals = {site.name: dense[:fitted] for site in known}
    goals |= {name: new_states(dense[:fitted].shape, streams.folder, dense.dtype) for name in within}
    if streams.kept is not None:
        streams.kept.read_into(dense, (number + 1, ""))
        for name in within:
            streams.kept.read_into(goals[name], (number, name))
        return goals

    def watcher_of(first: int, batch: torch.Tensor) -> Watcher:
        """What follows the residual stream of a batch through the layer, and keeps it where it is a goal."""
        followed = [site for site in known if site.name in within]
        stream, rows = StreamWithin(batch, followed), max(0, fitted - first)

        def watch(seen: Product) -> None:
            stream.watch(seen)
            if seen.parameter in within:
                goals[seen.parameter][first : first + len(batch)] = stream.states[:rows]

        return watch

    layer.advance(dense, watcher_of)
    return goals


def stream_dtype(model: LayeredModel) -> torch.dtype:
    """Of the dense stream: between layers that compute in bfloat16 a model as it is stored has no more digits."""
    return model.compute if model.compute == torch.bfloat16 else torch.float32


def keep_dense(states: DenseStates, windows: torch.Tensor, model: LayeredModel, is_needed: bool = False) -> None:
    """Make room for what the dense model makes of windows [N, T], see `DenseStates.begin`.

    What a GPU would read from a file it computes faster, so that there nothing is kept without need.
    """
    needed, on_cpu = model.layers + 1 if is_needed else 0, model.device == "cpu"
    if needed or on_cpu:
        places = places_of(model) if on_cpu else needed
        states.begin(windows, model.widths.hidden_size, places, needed, stream_dtype(model))


def places_of(model: LayeredModel) -> int:
    """Before, within and behind how many layers and readers the dense stream is kept."""
    return model.layers * READERS + 1


def advance_and_keep(
    model: LayeredModel,
    layer: Layer,
    number: int,
    stream: torch.Tensor,
    states: DenseStates | None,
    watcher: Watcher | None = None,
    collected: Collector | None = None,
) -> None:
    """The dense stream [N, T, D] through the layer, as `Layer.advance` does, and kept where states are wanted.

    Args:
        states: of these windows, if any.
        watcher: told of every product, as well.
    """
    if states is None or not states.is_open:
        layer.advance(stream, (lambda first, batch: watcher) if watcher else None, collected)
        return
    states.notes[number] = find_sites(model, layer)
    followed = [site for site in states.notes[number] if site.entry is not None and not site.ends_layer]
    within = {site.name for site in followed}

    def watcher_of(first: int, batch: torch.Tensor) -> Watcher:
        states.put((number, ""), first, batch)
        inside = StreamWithin(batch, followed)

        def watch(seen: Product) -> None:
            if watcher is not None:
                watcher(seen)
            inside.watch(seen)
            if seen.parameter in within:
                states.put((number, seen.parameter), first, inside.states)

        return watch

    layer.advance(stream, watcher_of, collected)
    if number + 1 == model.layers:
        states.put((number + 1, ""), 0, stream)
        states.is_whole = True


def walk_dense(
    model: LayeredModel,
    windows: torch.Tensor,
    states: DenseStates,
    progress: Callable[[int], None],
    is_needed: bool = False,
) -> KeptStates | None:
    """What the dense model makes of windows [N, T] of this process, kept from an earlier walk or from this one.

    Args:
        states: that are to keep it, where they keep nothing else.
        progress: told after each layer that is run.
        is_needed: whether to run the model even where there is next to no room.

    Raises:
        CheckpointError: see `check_states`.
        OutputError: there is no room for it.
    """
    kept = states.covering(windows)
    if kept is not None:
        return kept
    if states.is_whole:
        states = DenseStates(states.folder)
    keep_dense(states, windows, model, is_needed)
    if not states.is_open:
        return None
    stream = model.embed(windows, dtype=stream_dtype(model))
    for number in range(model.layers):
        advance_and_keep(model, model.load_layer(number), number, stream, states)
        check_states(stream, f"Layer {number}")
        progress(1)
    return KeptStates(states, tuple(range(len(windows)))) if states.windows is not None else None
