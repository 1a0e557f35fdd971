"""How many tokens a user wants to keep, and which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmprune_cli.errors import PlanError, UsageError
from llmprune_cli.folder.documents import check_regular
from llmprune_cli.options import GOES, TEXT, Option
from llmprune_cli.sizes import parse_count

STEP = 64  # rows that kernels like a multiple of
AUTO, KEEP = "auto", "keep"  # of a target: whether it is spent on tokens, too


def check_vocab_size(value: str) -> None:
    """A number of tokens, a share of them, or what a target does with them.

    Raises:
        UsageError: none of these.
    """
    try:
        _ = value in (AUTO, KEEP) or parse_count(value)
    except UsageError:
        raise UsageError(
            f"give a number of tokens such as 32000, a share such as 50%, or with a target auto or keep, not {value!r}."
        ) from None


@dataclass(frozen=True)
class VocabularyRequest:
    """The tokens that stay."""

    vocab_size: Annotated[
        str | None,
        Option(
            "Tokens to keep, such as 32000 or 50%, the tokenizer cut to match; with a target also auto or keep.",
            GOES,
            left_out="all",
            check=check_vocab_size,
            short="--vocab",
        ),
    ] = None
    vocab_text: Annotated[
        str | None,
        Option(
            "Text by whose use tokens stay: a file, a folder or a hub dataset.", TEXT, left_out="the calibration text"
        ),
    ] = None
    keep_tokens: Annotated[
        Path | None,
        Option("File with tokens that stay, one a line; where all lines are numbers, these are those of tokens.", GOES),
    ] = None

    @property
    def number(self) -> str | None:
        """How many tokens are to stay, or what share of them; None where that is left open."""
        return None if self.vocab_size in (AUTO, KEEP) else self.vocab_size

    @property
    def may_go(self) -> bool:
        """Whether tokens are to go, or may."""
        return self.vocab_size not in (None, KEEP) or (self.vocab_size is None and self.vocab_text is not None)

    def check(self, has_target: bool) -> None:
        """Refuse what would do nothing.

        Args:
            has_target: whether the widths are chosen for a size.

        Raises:
            UsageError: see above.
        """
        names = "--vocab-text and --keep-tokens say which tokens stay"
        given = self.vocab_text is not None or self.keep_tokens is not None
        if self.vocab_size in (AUTO, KEEP) and not has_target:
            raise UsageError(
                f"--vocab {self.vocab_size} says what a target does with tokens; give a target, or a number."
            )
        if self.vocab_size == KEEP and given:
            raise UsageError(f"{names}, and with --vocab keep all do; leave one of them out.")
        if self.vocab_size is None and given and not (has_target and self.vocab_text is not None):
            also = " or --vocab auto" if has_target else ""
            raise UsageError(f"{names}; give --vocab-size{also} with them.")


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


def check_vocabulary(asked: VocabularyRequest, model: str) -> None:
    """Refuse what can be refused in a moment.

    Args:
        model: as the user names it.

    Raises:
        LlmpruneError: a file or a text is not there, or no token would go.
    """
    from llmprune_cli.startup.config_checks import vocabulary_of
    from llmprune_cli.text.names import check_texts

    if asked.keep_tokens is not None:
        read_keep_file(asked.keep_tokens)
    check_texts(asked.vocab_text)
    rows = vocabulary_of(model)
    if asked.number is not None and rows is not None:
        resolve_size(asked.number, rows)


def read_keep_file(path: Path) -> list[str]:
    """The tokens that a user wants to keep, or their numbers.

    Raises:
        UsageError: it is not readable.
        CheckpointError: it is a pipe or a device.
    """
    try:
        check_regular(path)
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start:,} is not UTF-8"
        raise UsageError(
            f"--keep-tokens {path} cannot be read: {reason}. Give a text file, one token a line."
        ) from error
