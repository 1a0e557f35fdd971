"""The numbers of tokens in settings: configurations name special tokens by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

ENDINGS = ("token_id", "token_ids", "token_index")  # of the names of fields that hold numbers of tokens
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")

Renumber = Callable[[int], int | None]


def is_naming(field: str) -> bool:
    """Whether a field of a tokenizer's settings names tokens by their texts."""
    return field.endswith(("_token", "_tokens"))


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
    """The fields of settings that name tokens, with other numbers; negative ones say that there is none, and stay.

    Tokens without a new number go from lists, and sequences of tokens with them.
    """
    found = {}
    for name, value in settings.items():
        if name.endswith(ENDINGS) or name in LISTS:
            is_list = isinstance(value, list | tuple)
            found[name] = _mapped_items(value, renumber) if is_list else _mapped(value, renumber)
        elif name == "forced_decoder_ids" and isinstance(value, list):
            pairs = [[place, number, _mapped(number, renumber)] for place, number in value]
            found[name] = [[place, new] for place, number, new in pairs if (new is None) == (number is None)]
        elif name == "sequence_bias" and isinstance(value, list):
            sequences = [[_mapped(numbers, renumber), bias] for numbers, bias in value]
            found[name] = [[numbers, bias] for numbers, bias in sequences if numbers is not None]
    return found


def _mapped_items(values: Sequence[Any], renumber: Renumber) -> list[Any] | None:
    """What stays of tokens, or of sequences of them; None where nothing does."""
    found = [new for new in (_mapped(value, renumber) for value in values) if new is not None]
    return found if found or not values else None


def _mapped(value: Any, renumber: Renumber) -> Any:
    """A number, or a sequence of them; None where one of them goes."""
    if isinstance(value, list | tuple):
        found = [_mapped(item, renumber) for item in value]
        return found if None not in found else None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return renumber(value) if is_number and value >= 0 else value
