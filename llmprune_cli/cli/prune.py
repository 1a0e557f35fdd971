"""`llmprune prune`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from llmprune_cli.cli.evaluate import print_eval
from llmprune_cli.cli.export import print_export, print_push
from llmprune_cli.cli.inspect import modules_table
from llmprune_cli.cli.parameters import COMMON, AsJson, Detail, takes
from llmprune_cli.cli.recover import print_recovery
from llmprune_cli.cli.screen.card import print_card
from llmprune_cli.cli.screen.progress import estimate_text, in_words, progress_on_stderr
from llmprune_cli.cli.screen.table_parts import (
    NARROW,
    WIDTH_LABELS,
    count_text,
    new_console,
    number_text,
    print_deviations,
    print_json,
    print_runtimes,
    ranges_text,
    speed_text,
)
from llmprune_cli.commands.requests import PruneRequest, check_prune
from llmprune_cli.formats.request import suggested_gguf
from llmprune_cli.options import Choice, Delivery, Evaluation, ModelReference, Scratch, Text
from llmprune_cli.sizes import size_text
from llmprune_cli.startup.loading import loading
from llmprune_cli.text.names import short_name
from llmprune_cli.vocabulary.request import VocabularyRequest

if TYPE_CHECKING:
    from llmprune_cli.heal.figures import FinalistResult
    from llmprune_cli.report.json_results import CandidateResult, CountedSize, PruneResult
    from llmprune_cli.vocabulary.figures import TriedVocabulary

TARGETS = (  # that a dry run has made widths of
    *("target", "target_params", "target_size", "target_speedup", "context", "target_batch"),
    *("layer_importance", "keep_layers", "round_to"),
)
VOCABULARY = ("vocab_size", "vocab_text", "keep_tokens")
# What a saved plan leaves to be said.
PLANNED = (
    *("model", "revision", "dtype", "device", "refit", "seed", "compute_dtype", "calibration", "text_column"),
    *("calibration_split", "calibration_tokens", "calibration_seq_len"),
)

RECOVERED = {"calibration": "text", "calibration_split": "text_split", "text_column": "text_column"}  # by `recover`

Evaluate = Annotated[bool, typer.Option("--eval", help="Perplexity before and after.", rich_help_panel=COMMON)]


@takes()
def prune_command(
    model: ModelReference,
    choice: Choice,
    text: Text,
    delivery: Delivery,
    scratch: Scratch,
    evaluation: Evaluation,
    vocabulary: VocabularyRequest,
    evaluate: Evaluate = False,
    as_json: AsJson = False,
    detail: Detail = None,
) -> None:
    """Check what is asked for, do it, and print it."""
    judged = evaluation if evaluate else None
    request = PruneRequest(model, choice, text, delivery, scratch, judged, vocabulary)
    check_prune(request)
    with loading():
        from llmprune_cli.commands.delivery import deliver

    with progress_on_stderr(detail is False) as listener:
        if not evaluate and replace(evaluation, text_column=None) != Evaluation():
            listener.warn("--dataset, --split, --limit, --max-seq-len and --batch-size do nothing without --eval.")
        result = deliver(request, listener)
    if result is None:
        return
    if as_json:
        print_json(result)
    else:
        print_prune(result, request, bool(detail))


def _going_on(result: PruneResult, request: PruneRequest) -> str:
    """What a dry run was asked for, with the widths that it found in the place of a target."""
    from llmprune_cli.commands.recipe import as_words, recipe_of

    recipe = recipe_of(request, request.choice, None)
    if request.delivery.save_plan is not None:
        kept = {name: value for name, value in recipe.items() if name in PLANNED}
        return as_words({**kept, "plan": str(request.delivery.save_plan), **_as_given(request)})
    statistics = request.scratch.statistics
    if request.keeps_measurements:
        from llmprune_cli.startup.remembered import statistics_folder

        statistics = statistics_folder()
    if request.choice.budget is not None:
        before, after = asdict(result.before.widths), asdict(result.after.widths)
        found: dict[str, Any] = {n: size for n, size in after.items() if size != before[n] and n != "num_hidden_layers"}
        if "num_experts" in found:
            found["experts"] = found.pop("num_experts")
        if result.dropped_layers:
            found["drop_layers"] = list(result.dropped_layers)
        own = result.vocabulary
        if own is not None and own.after is not None:
            found["vocab_size"] = str(own.after)
        tokens = () if "vocab_size" in found else VOCABULARY
        recipe = {name: value for name, value in recipe.items() if name not in (*TARGETS, *tokens)} | found
    return as_words({**recipe, **({"statistics": str(statistics)} if statistics else {}), **_as_given(request)})


def _as_given(request: PruneRequest) -> dict[str, bool]:
    """What no recipe holds: whom the user trusts, and whether what is there may go."""
    from llmprune_cli.commands.recipe import trusted

    return {**trusted(request.model), "overwrite": request.delivery.overwrite}


def print_prune(result: PruneResult, request: PruneRequest, is_verbose: bool = False) -> None:
    """What came of `prune` in a few lines; verbose: all tables as well."""
    console, kind = new_console(), _gguf_of(result)
    if is_verbose:
        console.print(modules_table(result.before, result.after, console.width))
        print_runtimes(console, result.runtimes)
        if result.candidates:
            _print_candidates(console, result.candidates)
        if result.calibration:
            print_card(console, result.calibration, result.protected_layers)
        if result.evaluation:
            print_eval(result.evaluation)
    elif result.candidates and not result.output:
        _print_candidates(console, result.candidates)
    if result.vocabularies and (is_verbose or not result.output):
        _print_vocabularies(console, result.vocabularies)
    if not (is_verbose or result.output or result.evaluation):
        print_runtimes(console, result.runtimes)  # which may change what is asked for
    if is_verbose or not result.output:
        print_deviations(console, result.deviations)  # with an output they were warnings already
    console.print(_summary(result))
    for line in _what_went(result, request.choice.target_speedup or 0):
        console.print(line, highlight=False)
    if result.finalists:
        _print_finalists(console, result.finalists)
    if result.recovery:
        print_recovery(result.recovery)
    if result.export:
        print_export(result.export)
    if result.push:
        print_push(result.push)
    if result.output:
        if kind is not None:
            _warn_of_unpacked(console, kind, result)
        wrote = Words.assemble("Wrote ", (result.output, "bold"), f" in {in_words(result.seconds)}. Next:")
        console.print(wrote, soft_wrap=True)
    elif result.evaluation:
        console.print("Nothing was kept: give --output to save the pruned model.")
    else:
        if result.estimate:
            expected = estimate_text(result.estimate)
            console.print(f"Left to do: {expected[0].lower()}{expected[1:]}", highlight=False, soft_wrap=True)
        console.print("Dry run: no model was written. To go on from it:")
    for line in _next(result, request, kind):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _summary(result: PruneResult) -> Table:
    """Widths that changed, size, and quality, before and after."""
    before, after = result.before, result.after
    table = Table("", **{**NARROW, "box": None})
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, label in WIDTH_LABELS.items():
        old, new = getattr(before.widths, name), getattr(after.widths, name)
        if old != new and name != "num_hidden_layers":
            table.add_row(label, f"{old:,}", f"{new:,}", _change(old, new))
    own = result.vocabulary
    if own is not None and own.after is not None:
        table.add_row("vocabulary", f"{own.tokens:,}", f"{own.after:,}", _change(own.tokens, own.after))
    shown = count_text(before.parameters), count_text(after.parameters)
    table.add_row("parameters", *shown, _change(before.parameters, after.parameters))
    sizes = size_text(before.size_bytes), size_text(after.size_bytes)
    table.add_row("size", *sizes, _change(before.size_bytes, after.size_bytes))
    if result.counted is not None:
        old, new = result.counted.before_bytes, result.counted.after_bytes
        table.add_row(_how_counted(result.counted), size_text(old), size_text(new), _change(old, new))
    if result.speed is not None:
        for label, name in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second")):
            old, new = (getattr(pace, name) for pace in (result.speed.before, result.speed.after))
            table.add_row(f"{label}, tokens/s", f"{old:,.1f}", f"{new:,.1f}", _times(old, new))
    card, rows = result.calibration, result.evaluation.results if result.evaluation else ()
    if card is not None:
        old, new = card.perplexity_before, card.perplexity_after
        if card.kl is not None:
            table.add_row(
                f"perplexity ({short_name(card.dataset)})", number_text(old), number_text(new), _times(old, new)
            )
    if card is not None and len(rows) < 2:
        old, new = card.bits_per_byte_before, card.bits_per_byte_after
        table.add_row(f"bits per byte ({short_name(card.dataset)})", f"{old:.3f}", f"{new:.3f}", _times(old, new))
    if len(rows) > 1 and result.evaluation is not None:
        old, new = rows[0].perplexity, rows[1].perplexity
        label = f"({short_name(result.evaluation.dataset)} {result.evaluation.split})"
        if rows[1].same_tokens:
            table.add_row(f"perplexity {label}", number_text(old), number_text(new), _times(old, new))
        old, new = rows[0].bits_per_byte, rows[1].bits_per_byte
        table.add_row(f"bits per byte {label}", f"{old:.3f}", f"{new:.3f}", _times(old, new))
    return table


def _how_counted(own: CountedSize) -> str:
    return f"size{f' as {own.dtype}' if own.dtype else ''}{f', {own.context:,} tokens cached' if own.context else ''}"


def _change(old: float, new: float) -> str:
    return f"{100 * (new / old - 1):+.1f}%" if old else ""


def _times(old: float, new: float) -> str:
    return f"×{new / old:.3g}" if old and math.isfinite(new / old) else ""


def _what_went(result: PruneResult, speedup: float) -> Iterator[str]:
    """Which layers went, and what the figures were measured on.

    Args:
        speedup: how many times as fast the model was to be; 0 where that was not asked for.
    """
    gone = ranges_text(result.dropped_layers)
    before, after = result.before.widths.num_hidden_layers, result.after.widths.num_hidden_layers
    if gone:
        yield f"Layers {before} → {after}: {gone} {'went' if result.output else 'go'}."
    elif after < before:
        yield f"Layers {before} → {after}: which go is measured on text; with --save-plan in a dry run, too."
    own = result.vocabulary
    if own is not None and own.after is None:
        saved, share = own.saved_by(own.tokens // 2)
        said = (
            f"Rows of {own.tokens:,} tokens are {100 * own.share:.1f}% of the parameters; half of them would save "
            f"{count_text(saved)} ({100 * share:.1f}%)"
        )
        yield f"{said}, and cost more than other widths." if result.vocabularies else f"{said}: --vocab auto."
    if result.speed is not None:
        yield speed_text(result.speed)
        if result.speed.speedup < speedup:
            yield (
                f"That is less than the {speedup:g} times of the search: times differ from one measurement to the "
                "next. Ask for more to be safe, while nothing else runs."
            )
    if result.calibration is not None:
        card = result.calibration
        yield (
            f"Fitted on {card.tokens:,} tokens of {short_name(card.dataset)}, judged on {card.held_out_tokens:,} others"
            f"{'.' if card.kl is None else f': KL {card.kl:.3f} nats.'}"
        )


def _warn_of_unpacked(console: Console, kind: str, result: PruneResult) -> None:
    from llmprune_cli.formats.gguf.blocks.mixes import LEAST_BLOCK
    from llmprune_cli.report.runtimes import QUANTIZED_GGUF

    if any(own.runtime == QUANTIZED_GGUF for own in result.runtimes):
        said = f"As {kind} parts would stay in 16 bits: prune with --round-to {LEAST_BLOCK} to pack all."
        console.print(said, highlight=False)


def _next(result: PruneResult, request: PruneRequest, kind: str | None) -> Iterator[str]:
    """Commands that go on from here.

    Args:
        kind: see `_gguf_of`.
    """
    if result.output is None and result.evaluation is not None:
        return
    from llmprune_cli.source.tokenizer import has_tokenizer

    if result.output is None:
        place = shlex.quote(str(request.delivery.output or "pruned"))
        yield f"llmprune prune {_going_on(result, request)} --output {place}"
        return
    from llmprune_cli.commands.recipe import as_words, given, trusted

    output, trust = shlex.quote(result.output), trusted(request.model)
    if has_tokenizer(Path(result.output)):
        yield f"llmprune eval {as_words({'model': result.model, **given(request.model)}, result.output)}"
        if result.recovery is None:
            learned = {RECOVERED[name]: value for name, value in given(request.text).items() if name in RECOVERED}
            told = {"model": result.output, **learned, "tokens": "1M", "output": f"{result.output}-healed", **trust}
            yield f"llmprune recover {as_words(told)}"
    if kind is not None:
        told = {"model": result.output, "format": "gguf", "dtype": kind, "output": f"{result.output}-gguf", **trust}
        yield f"llmprune export {as_words(told)}"
    if result.push is None:
        yield f"llmprune push {output} YOUR_NAME/{shlex.quote(Path(result.output).name)}"


def _gguf_of(result: PruneResult) -> str | None:
    """The type to suggest for llama.cpp; None where what was written cannot be exported for it, or was already."""
    fits = any(own.runtime == "llama.cpp" and own.loads for own in result.runtimes)
    if result.output is None or result.export is not None or not fits:
        return None
    from llmprune_cli.formats.gguf.vocabulary import knows_tokenizer

    return suggested_gguf() if knows_tokenizer(Path(result.output)) else None


def _print_candidates(console: Console, candidates: tuple[CandidateResult, ...]) -> None:
    _print_sizes(console, "Candidates, best first", {"KL, nats": [own.kl for own in candidates]}, candidates)


def _print_finalists(console: Console, finalists: tuple[FinalistResult, ...]) -> None:
    before, after = [own.kl_before for own in finalists], [own.kl_after for own in finalists]
    _print_sizes(console, "Finalists, best first", {"KL, nats": before, "healed a while": after}, finalists)


def _print_sizes(
    console: Console,
    title: str,
    figures: dict[str, list[float]],
    models: tuple[CandidateResult, ...] | tuple[FinalistResult, ...],
) -> None:
    """A row for each model, with the widths in which they differ and figures by their heads."""
    names = [name for name in WIDTH_LABELS if len({getattr(own.widths, name) for own in models}) > 1]
    table = Table(title=title, title_justify="left", **NARROW)
    for label in (*(WIDTH_LABELS[name] for name in names), "parameters", *figures):
        table.add_column(label, justify="right")
    for own, *numbers in zip(models, *figures.values(), strict=True):
        sizes = [f"{getattr(own.widths, name):,}" for name in names]
        table.add_row(*sizes, count_text(own.parameters), *(f"{number:.3f}" for number in numbers))
    console.print(table)


def _print_vocabularies(console: Console, tried: tuple[TriedVocabulary, ...]) -> None:
    table = Table("tokens", "bits per byte", title="Vocabularies, best first", title_justify="left", **NARROW)
    for own in tried:
        table.add_row(f"{own.tokens:,}", f"{own.bits_per_byte:.3f}")
    console.print(table)
