"""The numbers of tokens in settings: configurations name special tokens by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

ENDINGS = ("token_id", "token_ids", "token_index")  # of the names of fields that hold numbers of tokens
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")

Renumber = Callable[[int], int | None]


def new_numbers(kept: Iterable[int]) -> dict[int, int]:
    """New numbers by old ones."""
    return {old: new for new, old in enumerate(kept)}


def named_tokens(settings: dict[str, Any]) -> set[int]:
    """The numbers of all tokens that settings name."""
    found: set[int] = set()

    def remember(number: int) -> int:
        found.add(number)
        return number

    renumbered(settings, remember)
    return found


def renumbered(settings: dict[str, Any], renumber: Renumber) -> dict[str, Any]:
    """The fields of settings that name tokens, with other numbers; negative ones say that there is none, and stay."""
    found = {}
    for name, value in settings.items():
        if name.endswith(ENDINGS) or name in LISTS:
            found[name] = _mapped(value, renumber)
        elif name == "forced_decoder_ids" and isinstance(value, list):
            found[name] = [[place, _mapped(number, renumber)] for place, number in value]
        elif name == "sequence_bias" and isinstance(value, list):
            found[name] = [[_mapped(numbers, renumber), bias] for numbers, bias in value]
    return found


def _mapped(value: Any, renumber: Renumber) -> Any:
    if isinstance(value, list | tuple):
        return [_mapped(item, renumber) for item in value]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return renumber(value) if is_number and value >= 0 else value
