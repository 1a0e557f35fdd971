"""How many tokens a user wants to keep, and which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmprune_cli.errors import PlanError, UsageError
from llmprune_cli.options import GOES, TEXT, Option
from llmprune_cli.sizes import parse_count

STEP = 64  # rows that kernels like a multiple of


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


def resolve_size(asked: str, rows: int) -> int:
    """The rows that stay: as many as asked for, rounded up to a multiple of 64.

    Args:
        asked: a number such as `32000`, or a share of the rows such as `50%`.

    Raises:
        PlanError: no row would go.
    """
    wanted = int(parse_count(asked).limit(rows, 0))
    size = max(1, -(-wanted // STEP)) * STEP
    if size >= rows:
        raise PlanError(f"--vocab-size {asked} comes to {size:,} tokens, and the model has {rows:,}. Give fewer.")
    return size


def read_keep_file(path: Path) -> list[str]:
    """The tokens, or their numbers, that a user wants to keep.

    Raises:
        UsageError: it is not readable.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start:,} is not UTF-8"
        raise UsageError(
            f"--keep-tokens {path} cannot be read: {reason}. Give a text file, one token a line."
        ) from error
