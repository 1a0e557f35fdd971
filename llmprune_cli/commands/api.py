"""The commands as functions of named options: the defaults, the checks and the bytes of the command line.

Nothing is printed and nothing ends the process. Warnings go to the logger `llmprune_cli`. A call loads what it needs.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from llmprune_cli.commands import inspect as inspecting
from llmprune_cli.commands.inspect.request import LEFT_OUT as NOT_MEASURED
from llmprune_cli.commands.inspect.request import Measured, check_inspect
from llmprune_cli.commands.named_options import NamedOption, by_own_names, make, options_of, refuse_unknown, short_names
from llmprune_cli.commands.recipe import read_recipe
from llmprune_cli.commands.recover.request import RecoverRequest, check_recover
from llmprune_cli.commands.requests import PRUNE_PARTS, PruneRequest, check_eval, check_export, check_prune
from llmprune_cli.commands.sweep.request import LEFT_OUT, Sweep, check_sweep
from llmprune_cli.errors import UsageError, memory_explained
from llmprune_cli.formats.request import Conversion
from llmprune_cli.heal.options import Healed, Healing, Teaching
from llmprune_cli.options import Evaluation, ModelReference
from llmprune_cli.progress import Listener, Told
from llmprune_cli.report.json_results import (
    EvalReport,
    ExportResult,
    InspectResult,
    PruneResult,
    RecoverResult,
    SensitivityResult,
    SweepResult,
    VerifyResult,
)
from llmprune_cli.run.questions.request import TaskRequest

Function = TypeVar("Function", bound=Callable[..., Any])


def _known(*kinds: type, without: Sequence[str] = ()) -> dict[str, NamedOption]:
    found: dict[str, NamedOption] = {}
    for kind in kinds:
        found = {own.name: own for own in options_of(kind) if own.name not in without} | found
    return found


def _takes(*kinds: type, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Show the options of some values in a function's signature."""

    def decorate(function: Function) -> Function:
        own = signatures.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            signatures.Parameter(o.name, signatures.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.kind)
            for o in _known(*kinds, without=without).values()
            if o.name not in own.parameters
        ]
        cast(Any, function).__signature__ = own.replace(parameters=[*named, *more])
        return function

    return decorate


@_takes(ModelReference, Measured, without=NOT_MEASURED)
def inspect(
    model: str | Path | None = None,
    *,
    verify: bool = False,
    sensitivity: bool = False,
    config: str | Path | None = None,
    progress: Told | None = None,
    **options: Any,
) -> InspectResult | VerifyResult | SensitivityResult:
    """What a model is, and with a width what pruning would make of it, from headers and small files alone.

    Args:
        model: folder, `.gguf` file or hub id; a recipe may say it instead.
        verify: hold a folder that llmprune wrote against its checksums, and no more.
        sensitivity: measure on text what a part of each layer is worth.
        config: a recipe, or a folder that `prune` wrote; arguments beat it.
        progress: told how far a measurement is.
        options: of the command, by name.

    Raises:
        LlmpruneError: see there; `UsageError` where options are wrong.
    """
    name, given = _gather("inspect", model, config, options, (ModelReference, Measured), NOT_MEASURED)
    reference, measured = _reference(name, given), make(Measured, given)
    check_inspect(reference, measured, verify, sensitivity)
    with _at_work():
        if sensitivity:
            from llmprune_cli.commands.inspect import sensitivity as measuring

            return measuring.sensitivity(reference, measured, Listener(progress))
        if verify:
            return inspecting.verify_folder(Path(name))
        return inspecting.inspect(reference, measured.widths, measured.tokens)


@_takes(ModelReference, *PRUNE_PARTS)
def prune(
    model: str | Path | None = None,
    *,
    evaluate: bool | None = None,
    config: str | Path | None = None,
    progress: Told | None = None,
    **options: Any,
) -> PruneResult | None:
    """Remove channels, heads, neurons, experts and layers, and write a smaller checkpoint.

    Args:
        model: folder, `.gguf` file or hub id; a recipe may say it instead.
        evaluate: perplexity before and after.
        config: a recipe, or a folder that `prune` wrote; arguments beat it.
        progress: told how far it is.
        options: of the command, by name.

    Returns:
        What `--json` prints; None in all but the first of several processes.

    Raises:
        LlmpruneError: see there; `UsageError` where options are wrong.
    """
    kinds = (ModelReference, *PRUNE_PARTS)
    name, given = _gather("prune", model, config, options, kinds, (), ("evaluate",))
    judged = given.pop("evaluate", False) if evaluate is None else evaluate
    choice, text, delivery, scratch, evaluation, vocabulary = (make(kind, given) for kind in kinds[1:])
    judge = evaluation if judged else None
    request = PruneRequest(_reference(name, given), choice, text, delivery, scratch, judge, vocabulary)
    check_prune(request)
    with _at_work():
        from llmprune_cli.commands.delivery import deliver

        return deliver(request, Listener(progress))


@_takes(ModelReference, Sweep, without=LEFT_OUT)
def sweep(
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    progress: Told | None = None,
    **options: Any,
) -> SweepResult | None:
    """Prune to several sizes in one run, and say what each is worth.

    Args:
        model: folder, `.gguf` file or hub id; a recipe may say it instead.
        config: a recipe; arguments beat it.
        progress: told how far it is.
        options: of the command, by name.

    Returns:
        What `--json` prints; None in all but the first of several processes.

    Raises:
        LlmpruneError: see there; `UsageError` where options are wrong.
    """
    name, given = _gather("sweep", model, config, options, (ModelReference, Sweep), LEFT_OUT)
    reference, asked = _reference(name, given), make(Sweep, given)
    check_sweep(reference, asked)
    with _at_work():
        from llmprune_cli.commands.sweep import curve as sweeping

        return sweeping.sweep(reference, asked, Listener(progress))


@_takes(ModelReference, Healing, Teaching, Healed, without=("dtype",))
def recover(
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    progress: Told | None = None,
    **options: Any,
) -> RecoverResult | None:
    """Heal a pruned model: train it to predict what the unpruned one predicts.

    Args:
        model: folder that `prune` wrote; a recipe may say it instead.
        config: a recipe; arguments beat it.
        progress: told how far it is.
        options: of the command, by name.

    Returns:
        What `--json` prints; None in all but the first of several processes.

    Raises:
        LlmpruneError: see there; `UsageError` where options are wrong.
    """
    kinds = (ModelReference, Healing, Teaching, Healed)
    name, given = _gather("recover", model, config, options, kinds, ("dtype",))
    healing, teaching, delivery = (make(kind, given) for kind in kinds[1:])
    request = RecoverRequest(_reference(name, given), healing, teaching, delivery)
    check_recover(request)
    with _at_work():
        from llmprune_cli.commands.recover import recovery

        return recovery.recover(request, Listener(progress))


@_takes(ModelReference, Evaluation, TaskRequest)
def evaluate(
    model: str | Path | None = None,
    *,
    compare: str | Path | Sequence[str | Path] | None = None,
    config: str | Path | None = None,
    progress: Told | None = None,
    **options: Any,
) -> EvalReport:
    """Perplexity of a model, or of several side by side.

    Args:
        model: folder, `.gguf` file or hub id; a recipe may say it instead.
        compare: another model, or several.
        config: a recipe; arguments beat it.
        progress: told how far it is.
        options: of the command, by name.

    Raises:
        LlmpruneError: see there; `UsageError` where options are wrong.
    """
    kinds = (ModelReference, Evaluation, TaskRequest)
    name, given = _gather("eval", model, config, options, kinds, (), ("compare",))
    second = given.pop("compare", None) if compare is None else compare
    reference = _reference(name, given)
    given.pop("revision", None)
    names = [second] if isinstance(second, str | Path) else second or []
    others = [_reference(str(name), given) for name in names]
    evaluation, asked = make(Evaluation, given), make(TaskRequest, given)
    check_eval([reference, *others], evaluation, asked.tasks)
    with _at_work():
        from llmprune_cli.commands import evaluate as evaluating

        return evaluating.evaluate(reference, others, evaluation, Listener(progress), asked)


@_takes(ModelReference, Conversion, without=("device",))
def export(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    config: str | Path | None = None,
    progress: Told | None = None,
    **options: Any,
) -> ExportResult:
    """Write a checkpoint in another format, dtype or shard size, and prove it in the runtime that reads it.

    Args:
        model: folder, `.gguf` file or hub id; a recipe may say it instead.
        output: folder to write; a recipe may say it instead.
        overwrite: replace the model folder that is there.
        config: a recipe; arguments beat it.
        progress: told how far it is.
        options: of the command, by name.

    Raises:
        LlmpruneError: see there; `UsageError` where options are wrong.
    """
    kinds = (Conversion, ModelReference)
    name, given = _gather("export", model, config, options, kinds, ("device",), ("output", "overwrite"))
    target = given.pop("output", None) if output is None else output
    if target is None:
        raise UsageError("say where to write: output.")
    conversion, reference = make(Conversion, given), _reference(name, given)
    overwrite = overwrite or bool(given.get("overwrite"))
    check_export(reference, Path(target), overwrite, conversion)
    with _at_work():
        from llmprune_cli.commands import export as exporting

        return exporting.export(reference, Path(target), overwrite, conversion, Listener(progress))


# --- options --------------------------------------------------------------------------------------------------------


def _gather(
    command: str,
    model: str | Path | None,
    config: str | Path | None,
    options: dict[str, Any],
    kinds: Sequence[type],
    without: Sequence[str] = (),
    plain: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """The model and the options of a command, each held to its type.

    Args:
        without: names of options that the command does not have.
        plain: names of further ones that a recipe may give.

    Raises:
        UsageError: one is unknown, or not of its type.
    """
    known, recipe = _known(*kinds, without=without), {} if config is None else read_recipe(Path(config), command)
    names = {"eval": "evaluate", **short_names(known.values())}
    recipe, options = by_own_names(recipe, names), by_own_names(options, names)
    for own, where in ((recipe, str(config)), (options, command)):
        refuse_unknown(own, [*known, *short_names(known.values()), *plain, "model"], where)
    given = {**recipe, **{name: value for name, value in options.items() if value is not None}}
    said = given.pop("model", None)
    if (name := said if model is None else model) is None:
        raise UsageError("say which model.")
    return str(name), {key: _checked(known[key], value) if key in known else value for key, value in given.items()}


def _checked(own: NamedOption, value: Any) -> Any:
    option = own.option
    try:
        if option.parse is not None and value and isinstance(value, str | list | tuple):
            value = option.parse(value if isinstance(value, str) else ",".join(map(str, value)))
        value = TypeAdapter(own.kind).validate_python(str(value) if isinstance(value, Path) else value)
        if option.check is not None:
            option.check(value)
    except ValidationError as error:
        raise UsageError(f"{own.name}: {error.errors()[0]['msg']}, not {value!r}.") from error
    except UsageError as error:
        raise UsageError(f"{own.name}: {error}") from error
    if own.choices and value not in own.choices:
        raise UsageError(f"{own.name}: {value!r} is none of {', '.join(own.choices)}.")
    if option.least is not None and value is not None and value < option.least:
        raise UsageError(f"{own.name}: {value} is less than {option.least}.")
    return value


def _reference(name: str, given: dict[str, Any]) -> ModelReference:
    names = [own.name for own in options_of(ModelReference)]
    return ModelReference(name, **{key: given[key] for key in names if key in given})


@contextmanager
def _at_work() -> Iterator[None]:
    """Keep libraries from drawing progress bars, and say so where memory runs out."""
    from transformers.utils import logging as transformers_logging

    drew = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with memory_explained():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if drew:
            transformers_logging.enable_progress_bar()
