"""A dataset or a text file becomes windows of tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PYTHON_DOCS = "python-docs"  # English that every CPython carries
WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text"}


@dataclass(frozen=True)
class Corpus:
    """Text to evaluate on."""

    name: str  # what the user asked for
    text: str
    origin: str  # where it came from, for the report


def load_corpus(dataset: str, split: str) -> Corpus:
    """Read a corpus: the rows of a dataset joined by two newlines, or a text file as it is.

    Args:
        dataset: `wikitext2` (the folder named by LLMPRUNE_WIKITEXT2, else the hub), `python-docs`, a text, Parquet or
            JSON Lines file, a dataset folder, or a hub dataset with an optional configuration after a colon
            (`org/name:config`).

    Raises:
        CheckpointError: unknown, unreadable, or without text.
    """
    origin = dataset
    path = Path(dataset)
    if dataset == "wikitext2":
        local = os.environ.get("LLMPRUNE_WIKITEXT2")
        origin = local or "/".join(WIKITEXT2)
        rows = _load(local, None, split) if local else _load(*WIKITEXT2, split)
    elif dataset == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return Corpus(dataset, "\n\n".join(topics.values()), "the documentation in pydoc_data.topics")
    elif path.suffix in (".txt", ".md") and path.is_file():
        return Corpus(dataset, _read_text(path), str(path))
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise CheckpointError(f"{path} is not a text (.txt), Parquet (.parquet) or JSON Lines (.jsonl) file.")
        rows = _load(BUILDERS[path.suffix], None, split, data_files={split: str(path)})
    elif path.is_dir():
        rows = _load(dataset, None, split)
    else:
        name, _, configuration = dataset.partition(":")
        rows = _load(name, configuration or None, split)
    return Corpus(dataset, "\n\n".join(_texts(rows, dataset)), origin)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable UTF-8 text ({error}).") from error


def _load(name: str, configuration: str | None, split: str, **options: Any) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        return load_dataset(name, configuration, split=split, **options)
    except Exception as error:  # builders raise every kind
        reason = first_line(error)
        shown = options.get("data_files", {}).get(split, name)
        raise CheckpointError(
            f"No dataset {shown!r} with a split {split!r} could be read: {reason} "
            "Give a file, a folder, or a hub dataset; LLMPRUNE_WIKITEXT2 names a local folder for wikitext2."
        ) from error


def _texts(rows: Any, dataset: str) -> list[str]:
    """The column `text`, or the only column of strings."""
    columns = list(rows.column_names)
    strings = [name for name in columns if getattr(rows.features[name], "dtype", "") in ("string", "large_string")]
    column = "text" if "text" in columns else strings[0] if len(strings) == 1 else None
    if column is None:
        raise CheckpointError(f"{dataset} has no column 'text' (it has {', '.join(columns)}).")
    return [value or "" for value in rows[column]]


def cut_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocabulary: int, window_tokens: int, limit: int | None
) -> torch.Tensor:
    """Tokenize once, with the tokenizer's default special tokens, and cut; the tail is dropped.

    Args:
        vocabulary: token ids that the model knows.

    Returns:
        Token ids, [windows, window_tokens].

    Raises:
        CheckpointError: the text is shorter than one window, or the tokenizer is that of another model.
    """
    tokens = torch.tensor(tokenizer(corpus.text, verbose=False)["input_ids"], dtype=torch.long)
    windows = len(tokens) // window_tokens
    if windows == 0:
        raise CheckpointError(
            f"{corpus.origin} has {len(tokens)} tokens, less than one window of {window_tokens}. "
            "Give more text, or ask for shorter windows (--max-seq-len, --calibration-seq-len, --seq-len)."
        )
    if int(tokens.max()) >= vocabulary:
        raise CheckpointError(
            f"The tokenizer gives token {int(tokens.max())}, but the model knows {vocabulary} tokens, so it is the "
            "tokenizer of another model. Put the right one beside the weights."
        )
    kept = windows if limit is None else min(limit, windows)
    return tokens[: kept * window_tokens].view(kept, window_tokens)
