"""Typer's parameters, made from the values that a command takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, is_dataclass
from difflib import get_close_matches
from functools import partial, wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from llmprune_cli.commands.named_options import NamedOption, by_own_names, make, options_of, refuse_unknown
from llmprune_cli.commands.requests import CALLED
from llmprune_cli.errors import UsageError
from llmprune_cli.options import OUTPUT, PANELS, ModelReference
from llmprune_cli.sizes import parse_number

COMMON = "Options that most people need"
METAVARS: dict[Any, str] = {int: "N", float: "R", str: "TEXT", Path: "PATH"}  # what is parsed from text is TEXT, too
MODEL = typer.Argument(help="Model folder, hub id, or .gguf file.", metavar="MODEL")
NUMBERS = (int, float)
SWITCHES = {"verify", "kv_cache"}  # options that can be switched off as well

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress, only warnings and results.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show all tables.", rich_help_panel=OUTPUT)]
Detail = Annotated[  # the two above as one
    bool | None,
    typer.Option(
        "--verbose/--quiet",
        "-v/-q",
        help="Show all tables; or no progress, only warnings and results.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT)]


def takes(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of the values that it takes, and `--config`.

    A parameter of the command that is a value object becomes all of that object's options; a `ModelReference` becomes
    the argument MODEL, too. What contradicts itself is refused as wrong usage.

    Args:
        left_out: names of options that this command does not have.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        values = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        options = {own.name: own for kind in values.values() for own in options_of(kind) if own.name not in left_out}

        @wraps(command)
        def run(config: Path | None, **given: Any) -> None:
            try:
                objects = {name: _make(kind, given) for name, kind in values.items()}
                rest = {name: given[name] for name in hints if name in given and name not in values}
                command(**objects, **rest)
            except UsageError as error:
                raise typer.BadParameter(str(error)) from error

        own_parameters = inspect.signature(command).parameters.values()
        others = [_parameter(p.name, hints[p.name], p.default) for p in own_parameters if p.name not in values]
        parameters = [*_ordered(options, others, values)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _ordered(
    options: dict[str, NamedOption], others: list[inspect.Parameter], values: dict[str, Any]
) -> Iterator[inspect.Parameter]:
    """The model, what most people need, and the rest by panels."""
    if ModelReference in values.values():
        yield _parameter("model", Annotated[str, MODEL], inspect.Parameter.empty)
        yield from (other for other in others if _is_argument(other))
        others = [other for other in others if not _is_argument(other)]
    by_panel = sorted(options.values(), key=lambda own: PANELS.index(own.option.panel))
    yield from (_of(own) for own in by_panel if own.option.is_common)
    yield from (other for other in others if _panel(other) == COMMON)
    for panel in PANELS:
        yield from (_of(own) for own in by_panel if own.option.panel == panel and not own.option.is_common)
        yield from (other for other in others if _panel(other) == panel)
        if panel == OUTPUT:
            yield _parameter("config", Annotated[Path | None, CONFIG], None)


def _is_argument(other: inspect.Parameter) -> bool:
    return any(type(note).__name__ == "ArgumentInfo" for note in get_args(other.annotation))


def _panel(other: inspect.Parameter) -> str:
    return next((a.rich_help_panel for a in get_args(other.annotation) if hasattr(a, "rich_help_panel")), OUTPUT)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _of(own: NamedOption) -> inspect.Parameter:
    option = own.option
    flag = own.name.replace("_", "-")
    names = [f"--{flag}/--no-{flag}" if own.name in SWITCHES else f"--{flag}"]
    names = [option.short, *names] if option.short else names  # first, since help cuts long lists of names
    plain, default = _plain(own), None if own.default is MISSING else own.default
    metavar = METAVARS.get(plain, "TEXT") + (f" [x>={option.least}]" if option.least is not None else "")
    if plain in NUMBERS and option.parse is None:  # so that what is wrong with it is said in our words
        default, plain = None if default is None else str(default), str
    if option.parse is not None and default is not None and not isinstance(default, str):
        default = None
    if option.parse is not None:
        plain = str
    declared = typer.Option(
        *names,
        help=f"{option.help.rstrip('.')}: {', '.join(own.choices)}." if own.choices else option.help,
        metavar="NAME" if own.choices else None if plain is bool else metavar,
        rich_help_panel=COMMON if option.is_common else option.panel,
        callback=_callback(own),
        autocompletion=_completion(own.choices),
        show_default=option.left_out or default not in (None, False),
    )
    return _parameter(own.name, Annotated[plain | None if default is None else plain, declared], default)


def _plain(own: NamedOption) -> Any:
    """The type of an option that is given."""
    if not isinstance(own.kind, UnionType):
        return own.kind
    return next(part for part in get_args(own.kind) if part is not type(None))


def _number(own: NamedOption) -> Callable[[str], Any] | None:
    """What reads an option that is a number."""
    kind = _plain(own)
    return partial(parse_number, kind=kind, least=own.option.least) if kind in NUMBERS else None


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    """What a shell offers."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete if choices else None


def _callback(own: NamedOption) -> Callable[[Any], Any] | None:
    check, parse = own.option.check, own.option.parse or _number(own)
    if check is None and parse is None and not own.choices:
        return None

    def checked(value: Any) -> Any:
        if value is None:
            return None
        try:
            parsed = parse(value) if parse is not None and isinstance(value, str) else value
            if own.choices and parsed not in own.choices:
                called = CALLED.get(str(parsed).lower())
                near = [called] if called in own.choices else get_close_matches(str(parsed), own.choices, 1)
                meant = f" Did you mean {near[0]}?" if near else ""
                raise UsageError(f"{parsed!r} is none of {', '.join(own.choices)}.{meant}")
            if check is not None:
                check(parsed)
            return parsed
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error

    return checked


def _make(kind: Any, given: dict[str, Any]) -> Any:
    """A value of the options that were given; those that were not have their defaults."""
    named = {own.name: given[own.name] for own in options_of(kind) if given.get(own.name) is not None}
    if kind is ModelReference:
        return ModelReference(given["model"], **named)
    return make(kind, named)


# --- recipes --------------------------------------------------------------------------------------------------------


def _read_config(context: typer.Context, value: Path | None) -> Path | None:
    """Let a recipe say what the command line does not."""
    if value is None or context.resilient_parsing:
        return value
    from llmprune_cli.commands.recipe import read_recipe

    known = {parameter.name: parameter for parameter in context.command.params}
    try:
        recipe = read_recipe(value, context.info_name or "")
        names = {flag.lstrip("-").replace("-", "_"): str(own.name) for own in known.values() for flag in own.opts}
        refuse_unknown(recipe, [name for name in names if len(name) > 1 and name != "config"], str(value))
        recipe = by_own_names(recipe, names)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    told = {
        name: _as_values(given) if _takes_several(known[name]) else _as_text(given) for name, given in recipe.items()
    }
    context.default_map = {**(context.default_map or {}), **told}
    return value


def _takes_several(parameter: Any) -> bool:
    return bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1


def _as_values(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _as_text(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


CONFIG = typer.Option(
    "--config",
    help="File with options by name (.yaml, .toml or .json); of prune also a folder that it wrote; flags beat it.",
    metavar="PATH",
    rich_help_panel=OUTPUT,
    is_eager=True,
    callback=_read_config,
)
