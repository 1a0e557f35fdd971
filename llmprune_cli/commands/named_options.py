"""How named options become the values that commands take, whoever names them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from llmprune_cli.commands.requests import CHOICES
from llmprune_cli.errors import UsageError
from llmprune_cli.options import Option


@dataclass(frozen=True)
class NamedOption:
    """One option of a command."""

    name: str  # what it is called everywhere
    attribute: str  # of the value that holds it
    option: Option
    kind: Any  # its type, without the annotation
    default: Any
    choices: tuple[str, ...]  # that it has to be one of; empty where any will do


def options_of(kind: Any) -> tuple[NamedOption, ...]:
    """The options that a value is made of, those of the values in it included."""
    hints = get_type_hints(kind, include_extras=True)
    found: list[NamedOption] = []
    for own in fields(kind):
        hint = hints[own.name]
        if is_dataclass(hint):
            found += options_of(hint)
        elif get_origin(hint) is Annotated:
            plain, option = get_args(hint)
            choices = CHOICES.get((kind, own.name), ())
            found.append(NamedOption(option.name or own.name, own.name, option, plain, own.default, choices))
    return tuple(found)


def make(kind: Any, named: Mapping[str, Any]) -> Any:
    """A value of those of the named options that it is made of; the others keep their defaults.

    Raises:
        UsageError: they contradict each other.
    """
    hints, values = get_type_hints(kind), {}
    for own in fields(kind):
        if is_dataclass(hints[own.name]):
            values[own.name] = make(hints[own.name], named)
    values |= {own.attribute: named[own.name] for own in _direct(kind) if own.name in named}
    return kind(**values)


def _direct(kind: Any) -> list[NamedOption]:
    return [own for own in options_of(kind) if own.attribute in {f.name for f in fields(kind)}]


def short_names(options: Collection[NamedOption]) -> dict[str, str]:
    """What people at a keyboard may call options, such as `mlp`, and their names."""
    short = {own.option.short[2:].replace("-", "_"): own.name for own in options if own.option.short.startswith("--")}
    return {name: own for name, own in short.items() if name not in {other.name for other in options}}


def by_own_names(named: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options under their own names.

    Args:
        names: other ones, each with an option's own.

    Raises:
        UsageError: one option is named twice.
    """
    found: dict[str, Any] = {}
    for name, value in named.items():
        own = names.get(name, name)
        if own in found:
            raise UsageError(f"{name} is another name of {own}; give one of them.")
        found[own] = value
    return found


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Make sure that options exist.

    Raises:
        UsageError: one does not; the message names one that is nearly called so.
    """
    every = list(known)
    for name in names:
        if name not in every:
            near = get_close_matches(name, every, 1)
            advice = f"; did you mean {near[0]}?" if near else f". There are: {', '.join(sorted(every))}."
            raise UsageError(f"{where} has no option {name}{advice}")
