"""How a pruned checkpoint does on held-out calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmprune_cli.architecture import read_widths
from llmprune_cli.calibration import CalibrationText
from llmprune_cli.divergence import measure_divergence
from llmprune_cli.layerwise import LayeredModel
from llmprune_cli.loading import ModelReference, open_checkpoint
from llmprune_cli.options import Listener, PruneOptions
from llmprune_cli.reconstruction import LayerRepair
from llmprune_cli.results import CalibrationResult
from llmprune_cli.selection import SEARCH_WINDOWS
from llmprune_cli.subject import Subject


def report_card(
    subject: Subject,
    folder: Path,
    options: PruneOptions,
    calibration: CalibrationText,
    repairs: tuple[LayerRepair, ...],
    listener: Listener,
) -> CalibrationResult:
    """What a pruned checkpoint does on text that neither fitted it nor, where there is enough, chose it."""
    import torch

    chosen_on = SEARCH_WINDOWS // 2 if options.budget else 0
    windows = calibration.held_out[chosen_on:] if len(calibration.held_out) > chosen_on else calibration.held_out
    reference, device = ModelReference(str(folder)), options.layer_device
    with open_checkpoint(reference, need_weights=True) as checkpoint, torch.inference_mode():
        pruned = replace(subject.architecture, config=checkpoint.config, widths=read_widths(checkpoint.config))
        layers = subject.widths.num_hidden_layers + pruned.widths.num_hidden_layers
        listener.stage("Judging on held-out text", layers)
        divergence = measure_divergence(
            subject.layered(device), LayeredModel(checkpoint, pruned, device), windows, listener.advance
        )
    return CalibrationResult(
        dataset=calibration.corpus.name,
        origin=calibration.corpus.origin,
        split=options.calibration.split,
        tokens=calibration.fitted.numel(),
        seq_len=calibration.fitted.shape[1],
        seed=options.seed,
        held_out_tokens=divergence.tokens,
        perplexity_before=divergence.perplexity_before,
        perplexity_after=divergence.perplexity_after,
        kl=divergence.kl,
        layers=repairs,
    )
