"""The text of a dataset or of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, tee
from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError, first_line
from llmprune_cli.folder.documents import is_there
from llmprune_cli.progress import LOGGER
from llmprune_cli.text.columns import columns_in, find_columns, texts_in
from llmprune_cli.text.conversations import BETWEEN, Range, Spelled, Speller, joined
from llmprune_cli.text.files import COLUMNS, PLAIN, Row, check_file, kind_of, looks_like_a_file, read_rows, read_text
from llmprune_cli.text.names import PYTHON_DOCS, SELF, USUAL_TEXT, WIKITEXT2, parts_of

WIKITEXT2_ON_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")
NO_DATASET = (
    "Give a file, a folder, a hub dataset, or python-docs, which is always there; LLMPRUNE_WIKITEXT2 names a local "
    "folder for wikitext2."
)
NO_SPLIT = "Name one of these with --calibration-split (of recover --text-split, of eval --split)."
SPELLER = Speller(None)  # of a model without a chat template
LEAST_LETTERS = 10  # of a text for each token of a window, so that there are two windows


@dataclass(frozen=True)
class Corpus:
    """Text to evaluate on."""

    name: str  # what the user asked for
    text: str
    origin: str  # where it came from, for the report
    answers: tuple[Range, ...] | None = None  # what an assistant says in it, see `Spelled`


def load_corpus(dataset: str, split: str, column: str | None = None, speller: Speller = SPELLER) -> Corpus:
    """Read a corpus: the rows of a dataset joined by two newlines, conversations by nothing, or a text file as it is.

    Args:
        dataset: `wikitext2` (the folder named by LLMPRUNE_WIKITEXT2, else the hub), `python-docs` (its splits are
            halves, see `_documentation`), a file (see `text.files`), a dataset folder, or a hub dataset with an
            optional configuration after a colon (`org/name:config`).
        column: that holds the text, where that is not plain.
        speller: of conversations.

    Raises:
        CheckpointError: unknown, unreadable, or without text.
    """
    if dataset == SELF:
        raise CheckpointError(f"{SELF!r} is text that a model writes itself, by which it is not judged. Give a text.")
    found, origin = _read(dataset, split, column, speller)
    return Corpus(dataset, found.text, origin, found.answers)


def _read(dataset: str, split: str, column: str | None, speller: Speller) -> tuple[Spelled, str]:
    """The text of a corpus, see `load_corpus`, and where it came from."""
    path = Path(dataset)
    if dataset == WIKITEXT2:
        local = os.environ.get("LLMPRUNE_WIKITEXT2")
        rows = _load(local, None, split) if local else _load(*WIKITEXT2_ON_HUB, split)
        return _joined(dataset, rows, None, speller), local or "/".join(WIKITEXT2_ON_HUB)
    if dataset == PYTHON_DOCS:
        return Spelled(_documentation(split)), "the documentation in pydoc_data.topics"
    if is_there(path) and path.is_dir():
        return _joined(dataset, _load(dataset, None, split), column, speller), dataset
    if is_there(path) or looks_like_a_file(dataset):
        check_file(path)
        if kind_of(path) in PLAIN:
            return Spelled(read_text(path)), str(path)
        if kind_of(path) in COLUMNS:
            rows = _load("parquet", None, split, data_files={split: str(path)})
            return _joined(dataset, rows, column, speller), dataset
        return _joined_rows(str(path), read_rows(path), column, speller), str(path)
    name, _, configuration = dataset.partition(":")
    return _joined(dataset, _load(name, configuration or None, split), column, speller), dataset


def load_usual_corpora(
    split: str, usual_split: str, length: int, warn: Callable[[str], None], option: str
) -> list[tuple[Corpus, float]]:
    """What is learned from where nobody has named a text, each with its share of the tokens.

    A model that was fitted on WikiText-2 alone is worse on all other text, and most of that comes back with some
    documentation (`make bench-texts`). Of documentation there is too little for very long windows.

    Args:
        length: tokens in a window.

    Raises:
        CheckpointError: see `load_usual_corpus`.
    """
    corpus = load_usual_corpus(split, usual_split, warn, option)
    if corpus.name == PYTHON_DOCS or split != usual_split:
        return [(corpus, 1.0)]
    own, others = parts_of(USUAL_TEXT)
    documentation = load_corpus(others.name, split)
    if len(documentation.text) <= LEAST_LETTERS * length:
        return [(corpus, 1.0)]
    return [(corpus, own.share), (documentation, others.share)]


def load_usual_corpus(split: str, usual_split: str, warn: Callable[[str], None], option: str) -> Corpus:
    """The text where nobody has named one: WikiText-2, or else Python's documentation.

    Args:
        split: of WikiText-2.
        usual_split: the one that nobody has asked for.
        option: that names a text.

    Raises:
        CheckpointError: WikiText-2 was asked for by its split or by its folder, and cannot be read.
    """
    try:
        return load_corpus(WIKITEXT2, split)
    except CheckpointError:
        if split != usual_split or "LLMPRUNE_WIKITEXT2" in os.environ:
            raise
        warn(f"WikiText-2 is out of reach, so Python's own documentation is read. {option} names better text.")
        return load_corpus(PYTHON_DOCS, split)


def _documentation(split: str) -> str:
    """Half of Python's documentation: `test` is the first half, and every other split is what else there is.

    Topics repeat each other, so paragraphs of the first half are left out of the other one.
    """
    from pydoc_data.topics import topics

    texts = [*topics.values()]
    half = sum(map(len, texts)) / 2
    first = next(count for count, end in enumerate(accumulate(map(len, texts)), 1) if end >= half)
    judged = BETWEEN.join(texts[:first])
    if split == "test":
        return judged
    repeated = set(judged.split(BETWEEN))
    return BETWEEN.join(part for part in BETWEEN.join(texts[first:]).split(BETWEEN) if part not in repeated)


def own_corpus(written: Spelled, source: str) -> Corpus:
    """What a model wrote itself."""
    return Corpus(SELF, written.text, f"text that {source} wrote itself", written.answers)


def _load(name: str, configuration: str | None, split: str, **options: Any) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        return load_dataset(name, configuration, split=split, **options)
    except Exception as error:  # builders raise every kind
        shown = options.get("data_files", {}).get(split, name)
        reasons = [first_line(each).rstrip(".") for each in (error, error.__cause__) if each is not None]
        advice = NO_SPLIT if "Unknown split" in reasons[0] else NO_DATASET
        raise CheckpointError(
            f"No dataset {shown!r} with a split {split!r} could be read: {': '.join(reasons)}. {advice}"
        ) from error


def _joined(where: str, rows: Any, column: str | None, speller: Speller) -> Spelled:
    """The text of a dataset of `datasets`."""
    named = list(rows.column_names)
    strings = [name for name in named if getattr(rows.features[name], "dtype", "") in ("string", "large_string")]
    columns = find_columns(where, named, strings, column, speller.tells_answers)
    if len(columns) == 1 and columns[0] in strings:
        return Spelled(BETWEEN.join(value or "" for value in rows[columns[0]]))
    return _spelled(where, rows, columns, speller)


def _joined_rows(where: str, rows: Iterable[Row], column: str | None, speller: Speller) -> Spelled:
    """The text of the rows of a file; the first ones say which columns there are."""
    rows, ahead = tee(rows)
    shown = columns_in(ahead)
    del ahead  # which would keep all rows
    strings = [name for name, value in shown.items() if isinstance(value, str)]
    columns = find_columns(where, list(shown), strings, column, speller.tells_answers)
    return _spelled(where, rows, columns, speller)


def _spelled(where: str, rows: Iterable[Row], columns: tuple[str, ...], speller: Speller) -> Spelled:
    texts, is_chat = texts_in(where, rows, columns, speller.spell)
    if is_chat and not speller.has_template:
        LOGGER.warning(f"The tokenizer has no chat template, so the turns of {where} are read as plain text.")
    return joined(texts, "" if is_chat else BETWEEN)
