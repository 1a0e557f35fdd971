"""What a text is called: the names of those that llmprune knows, mixtures, and what can be told of one in a moment."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from llmprune_cli.errors import CheckpointError, UsageError
from llmprune_cli.folder.documents import is_there
from llmprune_cli.text.columns import columns_in, find_columns
from llmprune_cli.text.files import COLUMNS, PLAIN, check_file, kind_of, looks_like_a_file, read_rows

PYTHON_DOCS = "python-docs"  # English that every CPython carries
DOCUMENTATION_SPLITS = ("test", "validation", "train")  # the last two are the same
WIKITEXT2 = "wikitext2"
USUAL_TEXT = f"{WIKITEXT2}:0.7,{PYTHON_DOCS}:0.3"  # to learn from, where nobody names a text
SELF = "self"  # what the model writes itself
WITH_CONVERSATIONS = f"{WIKITEXT2}:0.5,{PYTHON_DOCS}:0.2,{SELF}:0.3"  # the same for a model that chats
KNOWN = (WIKITEXT2, PYTHON_DOCS, SELF)


@dataclass(frozen=True)
class Part:
    """One text of a mixture."""

    name: str
    share: float  # of the tokens


def parts_of(text: str) -> tuple[Part, ...]:
    """The texts in a name such as `a.jsonl:0.7,b.txt:0.3`; without numbers they have equal shares.

    A share of one text is all of it; of a dataset of the hub it is a configuration instead.

    Raises:
        UsageError: some have shares and others have none, or one is no positive number, or their sum is none.
    """
    names = [part.strip() for part in text.split(",")]
    found = [_weighted(name) for name in names]
    if is_there(Path(text)) or (len(names) == 1 and not _is_here(found[0][0])):
        return (Part(text, 1.0),)
    if not all(name for name, _ in found):
        raise UsageError(f"{text!r} names no text between two commas.")
    weights = [weight for _, weight in found if weight is not None]
    if weights and (len(weights) < len(found) or min(weights) <= 0 or not math.isfinite(sum(weights))):
        raise UsageError(f"give every text of {text!r} a share above 0, as in a.jsonl:0.7,b.txt:0.3, or none of them.")
    total = sum(weights) or len(found)
    return tuple(Part(name, (weight or 1.0) / total) for name, weight in found)


def _is_here(name: str) -> bool:
    """Whether a text is one of a file or a folder, or of those that llmprune knows, and not of the hub."""
    return name in KNOWN or is_there(Path(name)) or looks_like_a_file(name)


def _weighted(name: str) -> tuple[str, float | None]:
    before, colon, after = name.rpartition(":")
    try:
        return (before, float(after)) if colon and before else (name, None)
    except ValueError:  # the configuration of a hub dataset
        return name, None


def check_text(name: str, column: str | None = None) -> None:
    """What can be told of a text before anything is loaded: that its file is there and is text.

    Raises:
        CheckpointError: it does not.
        UsageError: the name is none.
    """
    if not name.strip():
        raise UsageError(f"{name!r} names no text. Give a file, a folder, or a dataset of the hub (ORG/NAME).")
    local = os.environ.get("LLMPRUNE_WIKITEXT2")
    if name == WIKITEXT2 and local and not is_there(Path(local)):
        raise CheckpointError(f"LLMPRUNE_WIKITEXT2 names {local}, which does not exist. Correct it, or unset it.")
    path = Path(name)
    if is_there(path) and (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} is a model and no text. Give a file, a folder of texts, or a dataset of the hub (ORG/NAME)."
        )
    if name in KNOWN or not (is_there(path) or looks_like_a_file(name)) or (is_there(path) and path.is_dir()):
        return
    check_file(path)
    if kind_of(path) not in (*PLAIN, *COLUMNS):
        row = columns_in(read_rows(path))
        find_columns(name, list(row), [key for key, value in row.items() if isinstance(value, str)], column)


def check_texts(text: str | None, column: str | None = None) -> None:
    """The same of every part of a mixture; None is a text that nobody has named."""
    for part in parts_of(text) if text is not None else ():
        check_text(part.name, column)


def holds_conversations(text: str | None) -> bool:
    """Whether there may be turns of several speakers in a text, or in a part of a mixture: not in plain text."""
    plain = (WIKITEXT2, PYTHON_DOCS)
    names = [part.name for part in parts_of(text if text is not None else USUAL_TEXT)]
    return not all(name in plain or (kind_of(Path(name)) in PLAIN and not Path(name).is_dir()) for name in names)


def check_single(text: str, option: str) -> None:
    """Refuse a mixture where one text is read.

    Args:
        option: that names the text.

    Raises:
        UsageError: it is one, or has a share.
    """
    is_mixture = "," in text or parts_of(text)[0].name != text
    if is_mixture and not is_there(Path(text)):
        raise UsageError(
            f"{option} takes one text, without a share, and {text} is a mixture. Run the command for each of its texts."
        )


def check_column(column: str | None, *texts: str | None) -> None:
    """Refuse a column of texts that have none.

    Args:
        column: that the user asked for.
        texts: all that it is about, see `check_texts`.

    Raises:
        UsageError: see above.
    """
    if column is None or None in texts:
        return
    names = [part.name for text in texts if text is not None for part in parts_of(text)]
    if names and all(kind_of(Path(name)) in PLAIN and not Path(name).is_dir() for name in names):
        raise UsageError(
            f"--text-column {column} is about tables and data sets, and {', '.join(names)} is plain text. Leave it out."
        )


def check_split(text: str | None, split: str, usual: str, option: str) -> None:
    """Refuse a split of a text that has none, or not this one.

    Args:
        text: see `check_texts`.
        usual: the split that nobody has asked for.
        option: that names the split.

    Raises:
        UsageError: see above.
    """
    if split == usual or text is None:
        return
    if text == PYTHON_DOCS and split not in DOCUMENTATION_SPLITS:
        raise UsageError(f"{option} {split}: {PYTHON_DOCS} has the splits {', '.join(DOCUMENTATION_SPLITS)}. Name one.")
    if _any_has_splits(text):
        return
    raise UsageError(f"{option} {split} is about data sets with splits, and {text} has none. Leave it out.")


def with_split(text: str, split: str) -> str:
    """A text with the split that is read of it, if it has any."""
    return f"{text} ({split})" if _any_has_splits(text) else text


def _any_has_splits(text: str) -> bool:
    return any(has_splits(part.name) for part in parts_of(text))


def has_splits(name: str) -> bool:
    """Whether one text is read by its splits."""
    path = Path(name)
    is_file = path.is_file() if is_there(path) else looks_like_a_file(name)
    return name != SELF and not is_file


def split_of(name: str, split: str) -> str:
    """The split of a text that is read when one is asked for; in a mixture, documentation has every split."""
    return "validation" if name == PYTHON_DOCS and split != "test" else split


def short_name(text: str) -> str:
    """A text as tables name it: a mixture without its shares, a file without its folders."""
    try:
        names = [part.name for part in parts_of(text)]
    except UsageError:  # a file whose name looks like a mixture, and which is gone
        names = [text]
    files = (is_there(Path(name)) or looks_like_a_file(name) for name in names)
    return ", ".join(Path(name).name or name if is_file else name for name, is_file in zip(names, files, strict=True))
