"""Charts: the errors of all layers, how healing went, what sizes and parts of layers are worth."""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import OutputError, UnsupportedError
from llmprune_cli.folder.documents import replace_file

if TYPE_CHECKING:
    from llmprune_cli.choose.layers.figures import WidthSensitivity
    from llmprune_cli.report.json_results import (
        CalibrationResult,
        LayerResult,
        PruneResult,
        RecoverResult,
        SensitivityResult,
        SweepResult,
    )

INCHES = (8.0, 24.0)  # least and largest width
INCHES_PER_LAYER = 0.22
MODEL_CHARACTERS = 80  # of a model's name, from its end
LOGARITHMIC = 20  # times the least figure, from which on a panel of sizes has another scale
SPEED = "prefill_tokens_per_second"
SIZE_PANELS = {  # figures of a `SweepPoint`, with words and colours
    "bits_per_byte": ("bits per byte\n(held-out text)", "removal"),
    "kl": ("KL divergence, nats", "refit"),
    SPEED: ("tokens per second,\nprefill", "stream"),
}
PARTS = {  # of layers, in words
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV groups",
    "intermediate_size": "MLP neurons",
    "moe_intermediate_size": "expert neurons",
    "shared_expert_intermediate_size": "shared expert's neurons",
    "num_experts": "experts",
    "num_hidden_layers": "the whole layer",
}
COLOURS = {"removal": "#c8553d", "refit": "#2a6f97", "stream": "#6c757d"}


def check_chart_target(path: Path, output: Path | None) -> None:
    """Make sure that a chart can be drawn and written, before any work is done.

    Args:
        output: a folder that the run itself makes.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OutputError: the target cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("Drawing a chart needs the matplotlib package: pip install 'llmprune[report]'")
    folder = path.absolute().parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Choose another --report.")
    if output is not None and folder == output.absolute():
        return
    try:  # trying it is the only test that holds for every user and file system
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder} is not writable ({error.strerror}). Choose another --report.") from error


def draw_chart(result: PruneResult, card: CalibrationResult, path: Path) -> None:
    """Draw the errors of the layers into a .png or .svg file.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    refitted = [row for row in card.layers if row.removal_error is not None and row.refit_error is not None]
    width = min(max(INCHES[0], INCHES_PER_LAYER * result.before.widths.num_hidden_layers), INCHES[1])
    figure = Figure(figsize=(width, 6.5 if refitted else 4.0), layout="constrained")
    panels = figure.subplots(2 if refitted else 1, 1, sharex=card.kl is not None, squeeze=False)[:, 0]
    if refitted:
        _draw_repairs(panels[0], refitted)
    if card.kl is None:
        _draw_bits(panels[-1], card)
    else:
        _draw_stream(panels[-1], result, card)
    figure.suptitle(_title(result, card), fontsize=10)
    _save(figure, path)


def draw_curve(result: RecoverResult, path: Path) -> None:
    """Draw how held-out text gained by training into a .png or .svg file.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], 4.0), layout="constrained")
    axes: Any = figure.subplots()
    places = [(0, result.before.kl), *((judged.tokens, judged.held_out.kl) for judged in result.curve)]
    axes.plot(*zip(*places, strict=True), "o-", color=COLOURS["refit"])
    axes.axvline(result.best_tokens, color="0.8", zorder=0)
    axes.set_xlabel("tokens of training text; the line shows where what was written stood")
    axes.set_ylabel("KL divergence from the teacher, nats\n(held-out text)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    before, after = result.before, result.after
    figure.suptitle(
        f"{_shown(result.model)}, healed\n"
        f"perplexity {before.perplexity:,.4g} → {after.perplexity:,.4g}, "
        f"KL divergence {before.kl:.3f} → {after.kl:.3f} nats on {result.held_out_tokens:,} held-out tokens",
        fontsize=10,
    )
    _save(figure, path)


def draw_sizes(result: SweepResult, path: Path) -> None:
    """Draw what the sizes of a sweep are worth into a .png or .svg file, a panel for each figure.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    points = (result.dense, *result.points)
    sizes, is_healed = [point.parameters / 1e6 for point in points], any(point.before_healing for point in points)
    figure = Figure(figsize=(INCHES[0], 2.2 * len(SIZE_PANELS) + 1), layout="constrained")
    panels = figure.subplots(len(SIZE_PANELS), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, (label, colour)) in zip(panels, SIZE_PANELS.items(), strict=True):
        heights = [getattr(point, name) for point in points]
        spread = [height * point.prefill_spread for height, point in zip(heights, points, strict=True)]
        bars, made = (spread if name == SPEED else None), ("healed" if is_healed else None)
        axes.errorbar(sizes, heights, bars, fmt="o-", capsize=3, color=COLOURS[colour], label=made)
        if is_healed and name != SPEED:
            before = [getattr(point.before_healing or point, name) for point in points]
            axes.plot(sizes, before, "o--", color=COLOURS[colour], alpha=0.4, label="pruned")
            axes.legend(frameon=False)
            heights += before
        axes.set_ylabel(label)
        if max(heights) > LOGARITHMIC * min(heights) > 0:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    for size, point in zip(sizes, points, strict=True):
        place = (size, getattr(point, next(iter(SIZE_PANELS))))
        panels[0].annotate(point.name, place, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    panels[-1].set_xlabel("parameters, millions")
    figure.suptitle(
        f"{_shown(result.model)}, pruned to several sizes\n"
        f"refit: {result.refit}; on {result.held_out_tokens:,} held-out tokens",
        fontsize=10,
    )
    _save(figure, path)


def draw_sensitivity(result: SensitivityResult, path: Path) -> None:
    """Draw what a part of each layer is worth into a .png or .svg file, a panel for each width.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    layers, rows = len(result.widths[0].kl), result.widths
    width = min(max(INCHES[0], INCHES_PER_LAYER * layers), INCHES[1])
    figure = Figure(figsize=(width, 1.9 * len(rows) + 1), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row, colour in zip(panels, rows, itertools.cycle(COLOURS.values()), strict=False):
        places = [(number, kl) for number, kl in enumerate(row.kl) if kl is not None and math.isfinite(kl)]
        axes.bar([number for number, _ in places], [kl for _, kl in places], 0.8, color=colour)
        heights = [kl for _, kl in places if kl > 0]
        if heights and max(heights) > LOGARITHMIC * min(heights):
            axes.set_yscale("log")
        axes.set_ylabel(_lost(row))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlim(-0.6, layers - 0.4)
    panels[-1].set_xlabel("layer")
    figure.suptitle(
        f"{_shown(result.model)}\n"
        f"KL divergence from the whole model, nats, where a part of one layer goes\n"
        f"on {result.held_out_tokens:,} held-out tokens; units by {result.importance}; nothing refitted",
        fontsize=10,
    )
    _save(figure, path, "What was measured is kept.")


def _lost(row: WidthSensitivity) -> str:
    """What goes, in words."""
    what = PARTS.get(row.width, row.width)
    return what if row.units == 1 else f"{row.removed:,} of {row.units:,}\n{what}"


def _save(figure: Any, path: Path, rest: str = "The model was written.") -> None:
    import matplotlib

    plain: Any = {"svg.hashsalt": "llmprune", "svg.fonttype": "none"}  # equal bytes every time, and text that is text
    kind, drawn = path.suffix[1:].lower(), io.BytesIO()
    with matplotlib.rc_context(plain):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    replace_file(path, [drawn.getbuffer()], rest)


def _draw_repairs(axes: Any, rows: list[LayerResult]) -> None:
    """Two bars for each refitted layer."""
    for offset, name, label in ((-0.2, "removal", "units removed"), (0.2, "refit", "and refitted")):
        heights = [getattr(row, f"{name}_error") for row in rows]
        axes.bar([row.layer + offset for row in rows], heights, 0.4, color=COLOURS[name], label=label)
    axes.set_ylabel("error of what a layer adds\n(calibration text)")
    axes.legend(frameon=False)
    _finish(axes)


def _draw_stream(axes: Any, result: PruneResult, card: CalibrationResult) -> None:
    """A bar for each layer that stays; those that went are shaded."""
    numbers = [row.layer for row in card.layers]
    axes.bar(numbers, [row.stream_error for row in card.layers], 0.8, color=COLOURS["stream"])
    whole = result.before.widths.num_hidden_layers
    for number in sorted(set(range(whole)) - set(numbers)):
        axes.axvspan(number - 0.5, number + 0.5, color="0.92", zorder=0)
    axes.set_xlim(-0.6, whole - 0.4)
    axes.set_ylabel("error of the residual stream\n(held-out text)")
    axes.set_xlabel("layer, numbered before pruning" + ("; shaded: dropped" if len(numbers) < whole else ""))
    _finish(axes)


def _draw_bits(axes: Any, card: CalibrationResult) -> None:
    """A bar for each model; what is behind a layer cannot be compared where the tokens before it differ."""
    bits = {"before": card.bits_per_byte_before, "after": card.bits_per_byte_after}
    bars = axes.barh([*bits], [*bits.values()], 0.6, color=[COLOURS["stream"], COLOURS["refit"]])
    axes.bar_label(bars, fmt="%.3f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("bits per byte (held-out text)")
    axes.spines[["top", "right"]].set_visible(False)


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _title(result: PruneResult, card: CalibrationResult) -> str:
    before, after = result.before.parameters, result.after.parameters
    target = f" (target: {result.target})" if result.target else ""
    perplexity = f"perplexity {card.perplexity_before:,.4g} → {card.perplexity_after:,.4g}, "
    bits = f"bits per byte {card.bits_per_byte_before:.3f} → {card.bits_per_byte_after:.3f}, "
    own = result.vocabulary
    tokens = f", {own.tokens:,} → {own.after:,} tokens" if own is not None and own.after is not None else ""
    figures = bits if card.kl is None else f"{perplexity}{bits}KL {card.kl:.3f} nats, "
    return (
        f"{_shown(result.model)}\n"
        f"{before:,} → {after:,} parameters, {100 * after / before:.1f}%{tokens}{target}; refit: {result.refit}\n"
        f"{figures}on {card.held_out_tokens:,} held-out tokens"
    )


def _shown(model: str) -> str:
    return model if len(model) <= MODEL_CHARACTERS else f"…{model[-MODEL_CHARACTERS:]}"
