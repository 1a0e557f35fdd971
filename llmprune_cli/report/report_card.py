"""How a pruned checkpoint does on held-out calibration text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune_cli.choose.selection import judged_windows
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.family.widths import Width, read_widths
from llmprune_cli.options import ModelReference
from llmprune_cli.plan.document import Plan
from llmprune_cli.processes import ALONE
from llmprune_cli.repair.layer_refit import LayerRepair, relative_distance
from llmprune_cli.report.json_results import CalibrationResult, LayerResult
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.run.divergence import Side, compare, losses, tokens_at_a_time
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.perplexity import bits_per_byte
from llmprune_cli.run.speed.throughput import Clock
from llmprune_cli.run.states import give_back_freed_memory, new_states
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.reading import predicted_bytes, read, spelled, window_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def report_card(
    bench: Workbench,
    folder: Path,
    plan: Plan,
    repairs: tuple[LayerRepair, ...],
    split: str,
    seed: int,
    was_searched: bool,
    is_healed: bool = False,
) -> CalibrationResult:
    """What a pruned checkpoint does on text that neither fitted it nor, where there is enough, chose it.

    Args:
        seed: by which the windows were drawn.
        was_searched: whether candidates were held against each other on a part of the held-out windows.
        split: of the dataset that the text is from.
        is_healed: whether what is around the layers was trained, too.
    """
    dense, text, listener = bench.model, bench.text, bench.listener
    assert text is not None
    whole = load_tokenizer(dense.subject.checkpoint)
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint, torch.inference_mode():
        architecture = dense.architecture
        pruned = replace(architecture, config=checkpoint.config, widths=read_widths(checkpoint.config))
        subject = replace(dense.subject, checkpoint=checkpoint, architecture=pruned, processes=ALONE)
        listener.stage("Judging on held-out text", dense.layers)
        cut = LayeredModel(subject, dense.device, dense.compute)
        own = load_tokenizer(checkpoint) if plan.vocabulary is not None else whole
        judged = _text_of_both(text, was_searched, whole, own)
        found = _run_side_by_side(bench, cut, plan, judged.windows, is_healed)
    refitted = {row.layer: row for row in repairs if row.layer not in plan.protected}
    layers = []
    for number, stream_error in zip_longest(plan.layers, found.stream_errors):
        row = refitted.get(number)
        removal, refit = (row.removal_error, row.refit_error) if row else (None, None)
        if row is not None or stream_error is not None:
            layers.append(LayerResult(number, removal, refit, stream_error))
    before, after = found.clocks
    return CalibrationResult(
        dataset=text.corpus.name,
        origin=text.corpus.origin,
        split=split,
        tokens=text.fitted.numel(),
        seq_len=text.fitted.shape[1],
        seed=seed,
        held_out_tokens=judged.windows[0][:, 1:].numel(),
        perplexity_before=found.perplexity(0),
        perplexity_after=found.perplexity(1),
        bits_per_byte_before=bits_per_byte(found.nats[0], judged.bytes[0]),
        bits_per_byte_after=bits_per_byte(found.nats[1], judged.bytes[1]),
        kl=found.kl,
        layers=tuple(layers),
        prefill_tokens_per_second_before=before.tokens_per_second,
        prefill_tokens_per_second_after=after.tokens_per_second,
        prefill_spread_before=before.spread,
        prefill_spread_after=after.spread,
        device=dense.device,
    )


def _unprefixed(text: str, told: str) -> str:
    """The text of a window without a space at its begin, where a tokenizer puts one before every text.

    Args:
        told: what the tokenizer makes of the window's tokens.
    """
    return text[1:] if text.startswith(" ") and not told.startswith(" ") else text


def judged_by(text: CalibrationText, was_searched: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows [N, T] that a result is judged on, see `report_card`, and their parts [N, 3], see `Reading`."""
    chosen_by = judged_windows(text) if was_searched else 0
    left = slice(chosen_by if len(text.held_out) > chosen_by else 0, None)  # of a short text, those that chose none
    if len(text.judged) >= len(text.held_out[left]):
        return text.judged, text.judged_parts
    return text.held_out[left], text.held_out_parts[left]


@dataclass(frozen=True)
class _Judged:
    """The same text for the dense model and the pruned one."""

    windows: tuple[torch.Tensor, torch.Tensor]  # token ids, [N, T]; the same tensor where both read the same tokens
    bytes: tuple[int, int]  # in UTF-8, of text in the tokens that are predicted


def _text_of_both(
    text: CalibrationText, was_searched: bool, whole: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> _Judged:
    """What `judged_by` gives, and its text in the tokens of a smaller vocabulary; what is more than T is left out."""
    windows, parts = judged_by(text, was_searched)
    places, source = parts.tolist(), text.corpus.text
    count = predicted_bytes(source, whole, windows, places)
    if own is whole:
        return _Judged((windows, windows), (count, count))
    texts = [
        _unprefixed(window_text(source, whole, window, part), spelled(whole, window))
        for window, part in zip(windows, places, strict=True)
    ]
    readings = [read(each, own, add_special_tokens=False) for each in texts]
    length = min(windows.shape[1], *(len(reading.tokens) for reading in readings))
    told = torch.stack([reading.tokens[:length] for reading in readings])
    return _Judged((windows, told), (count, sum(reading.predicted_bytes([length]) for reading in readings)))


@dataclass(frozen=True)
class _Comparison:
    """What the dense model and the pruned one make of the same text."""

    tokens: tuple[int, int]  # that were predicted
    nats: tuple[float, float]  # their negative log-likelihood
    kl: float | None  # mean KL(dense ‖ pruned) of the next token, nats; None where the tokens differ
    stream_errors: tuple[float, ...]  # behind each layer that stays; none where the tokens differ
    clocks: tuple[Clock, Clock]

    def perplexity(self, side: int) -> float:
        """Of all tokens together."""
        return math.exp(min(self.nats[side] / self.tokens[side], 700))


def _run_side_by_side(
    bench: Workbench,
    pruned: LayeredModel,
    plan: Plan,
    windows: tuple[torch.Tensor, torch.Tensor],
    is_healed: bool,
) -> _Comparison:
    """Run both models in turns, layer by layer, so that whatever else the machine does slows both alike.

    Args:
        windows: token ids, [N, T], of each model; the same tensor where both read the same tokens.
    """
    dense, are_same = bench.model, windows[0] is windows[1]
    channels = plan.keep.get(Width.HIDDEN, {}).get(Instance())
    clocks, errors = (Clock(), Clock()), []
    ahead, behind = _walk_once(bench, windows[0], clocks[0]), pruned.walk(windows[1], clocks[1].advance)
    for number, dense_end in enumerate(ahead):
        if number in plan.layers:
            after, pruned_items = next(behind)
            before = dense_end[0]
            if are_same:
                errors.append(relative_distance(after, before if channels is None else before[..., list(channels)]))
        bench.listener.advance(1)
    give_back_freed_memory()
    ends = dense.load_ends(exact=True)
    only_layers_differ = are_same and channels is None and not is_healed
    other = ends if only_layers_differ else pruned.load_ends(exact=True)
    sides = Side(ends, *dense_end), Side(other, after, pruned_items)
    for clock, side in zip(clocks, sides, strict=True):
        clock.finish(side.ends, side.states[:1, : tokens_at_a_time(side.ends)], side.items)
    tokens = (windows[0][:, 1:].numel(), windows[1][:, 1:].numel())
    if are_same:
        found = compare(*sides, windows[0])
        nats = math.log(found.perplexity_before) * tokens[0], math.log(found.perplexity_after) * tokens[1]
        return _Comparison(tokens, nats, found.kl, tuple(errors), clocks)
    nats = losses(sides[0], windows[0]), losses(sides[1], windows[1])
    return _Comparison(tokens, nats, None, (), clocks)


def _walk_once(bench: Workbench, windows: torch.Tensor, clock: Clock) -> Iterator[tuple[torch.Tensor, int]]:
    """The dense model over windows [N, T], see `LayeredModel.walk`; where it serves several results, it runs once.

    Args:
        clock: that times the layers, or is told how long they took.
    """
    dense, states = bench.model, bench.judged
    kept = states.covering(windows)
    if kept is not None:
        stream = new_states((*windows.shape, dense.widths.hidden_size), None)
        for number in range(dense.layers):
            seconds, items = states.notes[number]
            clock.seconds.append(seconds)
            yield kept.read_into(stream, (number + 1, "")), items
        return
    if bench.serves_several and dense.device == "cpu":  # a GPU computes them faster than it would read them
        states.begin(windows, dense.widths.hidden_size, dense.layers)
    for number, (stream, items) in enumerate(dense.walk(windows, clock.advance)):
        if states.is_open:
            states.put((number + 1, ""), 0, stream)
            states.notes[number] = clock.seconds[-1], items
        yield stream, items
    states.is_whole = states.is_open
