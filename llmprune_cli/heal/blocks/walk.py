"""The walk through both models: one layer after the other is trained, written, and run as it was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.folder.tensors import DTYPES, split_name
from llmprune_cli.heal.blocks.training import Streams, judge_layer, train_layer
from llmprune_cli.heal.figures import HealedLayer, RateTrial
from llmprune_cli.heal.student import trained_names
from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.heal.training.learning_rate import search_rates
from llmprune_cli.heal.training_text import TrainingText
from llmprune_cli.journal.forms import Json
from llmprune_cli.journal.journal import Journal
from llmprune_cli.progress import Listener
from llmprune_cli.repair.layer_refit import store_layer
from llmprune_cli.repair.refit import with_new_weights
from llmprune_cli.run.layer import Layer
from llmprune_cli.run.layered_model import LayeredModel


@dataclass(frozen=True)
class Walk:
    """What goes through both models, and how layers are trained on the way."""

    student: LayeredModel
    teacher: LayeredModel
    stands_for: tuple[int, ...]  # the teacher's layers, see there
    tokens: TokenMap | None  # where the student has fewer
    text: TrainingText
    train: str  # which weights
    learning_rate: float
    journal: Journal  # in whose folder trained layers and streams lie
    listener: Listener

    @property
    def folder(self) -> Path:
        """Where files are written."""
        assert self.journal.folder is not None
        return self.journal.folder


def heal_layers(walk: Walk) -> tuple[HealedLayer, ...]:
    """Train every layer of the student; what a run that was cut short has trained is only run.

    Each layer sees what those before it were written as. It stays as it was where held-out text gains nothing.

    Raises:
        OutputError: what is made cannot be written.
        DivergedError: a loss is no number.
    """
    streams, found = _begin(walk), []
    walk.listener.stage("Healing layers", len(walk.stands_for))
    for number in range(len(walk.stands_for)):
        _advance_teacher(walk, number, streams)
        heal = partial(_heal, walk, number, streams)
        found.append(walk.journal.recall(f"block-{number:05d}", Json(HealedLayer), heal))
        with torch.no_grad():
            written(walk.student, (number,), walk.journal).load_layer(number).advance(streams.pruned)
        walk.listener.stand_at(number + 1, f"error {found[-1].error_before:.2%} to {found[-1].error_after:.2%}")
    return tuple(found)


def first_trained(student: LayeredModel, train: str) -> int:
    """The number of the first layer that has weights to train.

    Raises:
        UnsupportedError: none has.
    """
    places = (split_name(name)[1] for name in trained_names(student.skeleton, train))
    numbers = [int(place[0]) for place in places if place]
    if not numbers:
        raise UnsupportedError(
            f"The layers of {student.architecture.config.model_type} have no weights that --train {train} names."
        )
    return min(numbers)


def search_on_layer(walk: Walk, number: int, parameters: int) -> tuple[RateTrial, ...]:
    """Try learning rates on a layer, with those before it as they were."""
    walk.listener.stage("Trying learning rates", 0)
    streams = _begin(walk)
    for before in range(number):
        _advance_teacher(walk, before, streams)
        with torch.no_grad():
            walk.student.load_layer(before).advance(streams.pruned)
    _advance_teacher(walk, number, streams)

    def judge(rate: float, text: TrainingText) -> float:
        layer, weights = _load_trained(walk, number)
        train_layer(layer, weights, streams, text, rate)
        return judge_layer(layer, streams, text)

    return search_rates(parameters, walk.text, judge)


def _begin(walk: Walk) -> Streams:
    """The streams before the first layer."""
    windows = torch.cat([walk.text.windows, walk.text.held_out])
    its = windows if walk.tokens is None else walk.tokens.read(windows)
    with torch.no_grad():
        return Streams(walk.student.embed(windows, walk.folder), walk.teacher.embed(its, walk.folder))


@torch.no_grad()
def _advance_teacher(walk: Walk, number: int, streams: Streams) -> None:
    """The teacher's stream through the layers that a layer of the student stands for."""
    first = 1 + walk.stands_for[number - 1] if number else 0
    for its in range(first, walk.stands_for[number] + 1):
        walk.teacher.load_layer(its).advance(streams.teacher)


def written(model: LayeredModel, layers: tuple[int, ...], journal: Journal) -> LayeredModel:
    """The model with the weights that a journal keeps of some layers."""
    checkpoint = with_new_weights(model.checkpoint, layers, journal)
    return replace(model, subject=replace(model.subject, checkpoint=checkpoint))


def _heal(walk: Walk, number: int, streams: Streams) -> HealedLayer:
    """Train a layer, and write it where that is better."""
    layer, weights = _load_trained(walk, number)
    before = judge_layer(layer, streams, walk.text)
    if weights:
        train_layer(layer, weights, streams, walk.text, walk.learning_rate)
    after = judge_layer(layer, streams, walk.text)
    if not after < before:
        return HealedLayer(number, before, before, 0)
    _store(walk, layer, number)
    return HealedLayer(number, before, after, sum(own.numel() for own in weights))


def _load_trained(walk: Walk, number: int) -> tuple[Layer, list[torch.Tensor]]:
    """A layer in float32, and those of its weights that are trained."""
    layer = replace(replace(walk.student, compute=torch.float32).load_layer(number), compute=walk.student.compute)
    names = trained_names(layer.model, walk.train)
    weights: list[torch.Tensor] = []
    for name, own in layer.model.named_parameters():
        own.data = own.data.clone()  # what is loaded may lie in the file
        if own.requires_grad_(name in names and name.startswith(layer.prefix)).requires_grad:
            weights.append(own)
    return layer, weights


def _store(walk: Walk, layer: Layer, number: int) -> None:
    known, tensors = walk.student.checkpoint.by_name, {}
    for name, tensor in layer.stored().items():
        template, numbers = split_name(name)
        real = template.format(number, *numbers[1:])
        if numbers and real in known:
            tensors[real] = tensor.to("cpu", DTYPES[known[real].dtype].torch).contiguous()
    store_layer(walk.folder, number, tensors)
