"""How many tokens a user wants to keep, and which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmprune_cli.errors import UsageError
from llmprune_cli.options import GOES, TEXT, Option
from llmprune_cli.sizes import parse_count


def check_vocab_size(value: str) -> None:
    """A number of tokens, or a share of them.

    Raises:
        UsageError: neither.
    """
    try:
        parse_count(value)
    except UsageError:
        raise UsageError(f"give a number of tokens such as 32000, or a share such as 50%, not {value!r}.") from None


@dataclass(frozen=True)
class VocabularyRequest:
    """The tokens that stay."""

    vocab_size: Annotated[
        str | None,
        Option("Tokens to keep, such as 32000 or 50%; the tokenizer is cut to match.", GOES, check=check_vocab_size),
    ] = None
    vocab_text: Annotated[
        str | None, Option("Text by whose use tokens stay, as --dataset.", TEXT, left_out="the calibration text")
    ] = None
    keep_tokens: Annotated[Path | None, Option("File with tokens, or their numbers, that stay; one a line.", GOES)] = (
        None
    )

    def __post_init__(self) -> None:
        """Refuse what would do nothing."""
        if self.vocab_size is None and (self.vocab_text is not None or self.keep_tokens is not None):
            raise UsageError("--vocab-text and --keep-tokens say which tokens stay; give --vocab-size with them.")
