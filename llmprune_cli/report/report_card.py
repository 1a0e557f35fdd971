"""How a pruned checkpoint does on held-out calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmprune_cli.choose.selection import judged_windows
from llmprune_cli.coupling.trace import Instance
from llmprune_cli.family.widths import Width, read_widths
from llmprune_cli.options import Choice, ModelReference
from llmprune_cli.plan.document import Plan
from llmprune_cli.processes import ALONE
from llmprune_cli.repair.layer_refit import LayerRepair, relative_distance
from llmprune_cli.report.results import CalibrationResult, LayerResult
from llmprune_cli.report.throughput import Clock
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.run.divergence import Divergence, Side, compare, tokens_at_a_time
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.source.opening import open_checkpoint


def report_card(
    bench: Workbench, folder: Path, plan: Plan, choice: Choice, split: str, repairs: tuple[LayerRepair, ...]
) -> CalibrationResult:
    """What a pruned checkpoint does on text that neither fitted it nor, where there is enough, chose it.

    Args:
        split: of the dataset that the text is from.
    """
    dense, text, listener = bench.model, bench.text, bench.listener
    assert text is not None
    windows = max(text.judged, _not_chosen_by(text, choice), key=len)
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint, torch.inference_mode():
        architecture = dense.architecture
        pruned = replace(architecture, config=checkpoint.config, widths=read_widths(checkpoint.config))
        subject = replace(dense.subject, checkpoint=checkpoint, architecture=pruned, processes=ALONE)
        listener.stage("Judging on held-out text", dense.layers)
        models = dense, LayeredModel(subject, dense.device, dense.compute)
        found = _run_side_by_side(*models, plan, windows, listener.advance)
    refitted = {row.layer: row for row in repairs if row.layer not in plan.protected}
    layers = []
    for number, stream_error in zip(plan.layers, found.stream_errors, strict=True):
        row = refitted.get(number)
        removal, refit = (row.removal_error, row.refit_error) if row else (None, None)
        layers.append(LayerResult(number, removal, refit, stream_error))
    before, after = found.clocks
    return CalibrationResult(
        dataset=text.corpus.name,
        origin=text.corpus.origin,
        split=split,
        tokens=text.fitted.numel(),
        seq_len=text.fitted.shape[1],
        seed=choice.seed,
        held_out_tokens=found.divergence.tokens,
        perplexity_before=found.divergence.perplexity_before,
        perplexity_after=found.divergence.perplexity_after,
        kl=found.divergence.kl,
        layers=tuple(layers),
        prefill_tokens_per_second_before=before.tokens_per_second,
        prefill_tokens_per_second_after=after.tokens_per_second,
        device=dense.device,
    )


def _not_chosen_by(text: CalibrationText, choice: Choice) -> torch.Tensor:
    """Held-out windows [N, T] of a short text, where there are enough those by which no candidate was chosen."""
    chosen_by = judged_windows(text) if choice.budget else 0
    return text.held_out[chosen_by:] if len(text.held_out) > chosen_by else text.held_out


@dataclass(frozen=True)
class _Comparison:
    """What two models make of the same windows."""

    divergence: Divergence
    stream_errors: tuple[float, ...]  # behind each layer that stays
    clocks: tuple[Clock, Clock]  # of the dense model and of the pruned one


def _run_side_by_side(
    dense: LayeredModel, pruned: LayeredModel, plan: Plan, windows: torch.Tensor, progress: Callable[[int], None]
) -> _Comparison:
    """Run both models in turns, layer by layer, so that whatever else the machine does slows both alike.

    Args:
        windows: token ids, [N, T].
        progress: told after each layer of the dense model.
    """
    channels = plan.keep.get(Width.HIDDEN, {}).get(Instance())
    clocks, errors = (Clock(), Clock()), []
    ahead, behind = (model.walk(windows, clock.advance) for model, clock in zip((dense, pruned), clocks, strict=True))
    for number, dense_end in enumerate(ahead):
        if number in plan.layers:
            after, pruned_items = next(behind)
            before = dense_end[0]
            errors.append(relative_distance(after, before if channels is None else before[..., list(channels)]))
        progress(1)
    ends = dense.load_ends(exact=True)
    other = ends if channels is None else pruned.load_ends(exact=True)  # with the same channels only layers differ
    sides = Side(ends, *dense_end), Side(other, after, pruned_items)
    for clock, side in zip(clocks, sides, strict=True):
        clock.finish(side.ends, side.states[:1, : tokens_at_a_time(side.ends)], side.items)
    return _Comparison(compare(*sides, windows), tuple(errors), clocks)
