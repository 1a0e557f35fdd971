"""Two layers of a model in the place of all, so that what a run does with text can be tried on a little of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune_cli.commands.prune.estimate.stopwatch import Stopwatch
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import DTYPES, TensorEntry
from llmprune_cli.plan.document import Plan
from llmprune_cli.processes import ALONE
from llmprune_cli.repair.layer_refit import LayerRefit
from llmprune_cli.run.layer import BATCH_TOKENS, Ends, Layer
from llmprune_cli.run.layered_model import VOCABULARY, LayeredModel
from llmprune_cli.run.states import DenseStates, new_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune_cli.repair.least_squares import Moments
    from llmprune_cli.repair.sites import Site


class Imagined(Checkpoint):
    """A checkpoint whose weights are not on this machine: random ones take their place."""

    def tensors(self) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        """See `Checkpoint`."""
        generator = torch.Generator().manual_seed(0)
        for entry in self.entries:
            dtype = DTYPES[entry.dtype].torch
            tensor = torch.ones(entry.shape, dtype=dtype)
            is_matrix = len(entry.shape) > 1 and dtype.is_floating_point
            yield entry, tensor.normal_(0, 0.02, generator=generator) if is_matrix else tensor


def imagined(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with random weights where its own are not on this machine."""
    shards = {entry.shard for entry in checkpoint.entries}
    if all(shard is not None and (checkpoint.folder / shard).is_file() for shard in shards):
        return checkpoint
    return Imagined(**{name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__})


class NoRoom(DenseStates):
    """States that are only kept where they have to be."""

    def begin(
        self, windows: torch.Tensor, channels: int, places: int, needed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        """See `DenseStates`."""
        if needed:
            super().begin(windows, channels, needed, needed, dtype)


@dataclass(frozen=True)
class CountedEnds(Ends):
    """Ends that make next to nothing of hidden states, and count how many tokens they are asked about."""

    watch: Stopwatch | None = None

    def logits(self, hidden: torch.Tensor, items: int) -> torch.Tensor:
        """See `Ends`; of a few tokens of the vocabulary."""
        assert self.watch is not None
        self.watch.asked(hidden.shape[:-1].numel(), torch.is_grad_enabled() and hidden.requires_grad)
        return hidden[..., :VOCABULARY].float()


@dataclass(frozen=True)
class TwoLayers(LayeredModel):
    """Two layers of a model, which run one window of each text that the run shares out."""

    whole: LayeredModel | None = None
    numbers: tuple[int, ...] = ()  # of these layers in the whole model
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def of(cls, whole: LayeredModel, numbers: tuple[int, ...]) -> TwoLayers:
        """Those with these numbers."""
        subject = replace(whole.subject, processes=ALONE, checkpoint=imagined(whole.checkpoint))
        return cls(subject, whole.device, whole.compute, whole=whole, numbers=numbers)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """See `LayeredModel`."""
        assert self.whole is not None
        return self.whole.skeleton

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.numbers)

    def load_layer(self, number: int) -> Layer:
        """See `LayeredModel`."""
        return super().load_layer(self.numbers[number])

    def share(self, windows: torch.Tensor, tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """The first window, of all that the run would share out here, [1, T]."""
        assert self.whole is not None
        self.watch.shared(len(self.whole.share(windows, tokens)))
        return windows[:1]

    def embed(
        self, windows: torch.Tensor, folder: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Random hidden states, see `LayeredModel`."""
        states = new_states((*windows.shape, self.widths.hidden_size), folder, dtype)
        return states.normal_(generator=torch.Generator().manual_seed(0))

    def load_ends(self, exact: bool = False, compute: torch.dtype = torch.float32) -> Ends:
        """Ends that cost nothing, see `CountedEnds`."""
        model = copy.deepcopy(self._shell(self.numbers[0]).model)
        return CountedEnds(model, model, self.device, compute, watch=self.watch)

    def plan(self, plan: Plan) -> Plan:
        """What a plan says of these layers, under the numbers that they have here."""
        places = {number: place for place, number in enumerate(self.numbers)}
        stays = {None, *places}
        keep = {
            width: {_placed(instance, places): kept for instance, kept in by.items() if instance.layer in stays}
            for width, by in plan.keep.items()
        }
        return replace(plan, layers=tuple(range(self.layers)), protected=(), keep=keep)


def _placed(instance: Instance, places: dict[int, int]) -> Instance:
    return instance if instance.layer is None else replace(instance, layer=places[instance.layer])


class Unsolved(LayerRefit):
    """A refit that gathers all it needs and solves nothing: how large the solutions are is enough to know."""

    def _solve(self, site: Site, moments: dict[int | None, Moments]) -> list[object]:  # type: ignore[override]
        assert isinstance(self.whole, TwoLayers)
        for expert in moments:
            outputs, inputs = self._matrix(site, expert).shape
            self.whole.watch.solved(outputs, inputs, len(self._kept(site, expert)))
        return []


def commonest_layers(kinds: Sequence[int], candidates: Sequence[int]) -> tuple[int, ...]:
    """Two layers of the kind that is there most often, or one where there is but one.

    Args:
        kinds: of every layer, see `Architecture`.
        candidates: numbers of the layers to choose from.
    """
    count = [kinds[number] for number in candidates]
    own = max(set(count), key=count.count)
    return tuple(number for number in candidates if kinds[number] == own)[-2:]
