"""Text files: which kinds there are, and the rows in them, read with a place for every fault."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any

from llmprune_cli.errors import CheckpointError, MissingPackageError
from llmprune_cli.folder.documents import check_regular, is_there

PLAIN, LINES, TABLES, COLUMNS = (".txt", ".md"), (".jsonl", ".json", ".ndjson"), (".csv", ".tsv"), (".parquet",)
PACKED = (".gz", ".zst")
KINDS = (*PLAIN, *LINES, *TABLES, *COLUMNS)
IN_WORDS = (
    "a text (.txt, .md), JSON Lines (.jsonl), CSV (.csv) or Parquet (.parquet) file; all but the last may be packed "
    "(.gz, .zst)"
)
SAMPLE_BYTES = 2**23  # that are looked at before a run begins
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # how text of other encodings begins
OFTEN = "WINDOWS-1252"  # what other text mostly is

Row = dict[str, Any]


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, packed or not; empty where it is of no kind that is read."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    suffix = name.suffix.lower()
    return "" if suffix not in KINDS or (name is not path and suffix in COLUMNS) else suffix


def looks_like_a_file(name: str) -> bool:
    """Whether a name that is no path here was surely meant as one, and not as a dataset of the hub."""
    return bool(kind_of(Path(name))) or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_file(path: Path) -> None:
    """Look at the kind of a file, and at all of it or at its beginning.

    Raises:
        CheckpointError: it is missing, of another kind, or broken at its beginning.
        MissingPackageError: what unpacks it is not installed.
    """
    if not is_there(path):
        raise CheckpointError(f"{path} does not exist. Give a file, a folder, or a dataset of the hub (ORG/NAME).")
    check_regular(path)
    kind = kind_of(path)
    if not kind:
        raise CheckpointError(f"{path} is not {IN_WORDS}.")
    if kind in PLAIN:
        with _opened(path) as file:
            _decoded(path, file.read(SAMPLE_BYTES), is_cut=True)
    elif kind not in COLUMNS and not _rows_at_hand(path):
        raise CheckpointError(f"{path} holds no rows.")


def _rows_at_hand(path: Path) -> int:
    """How many rows a file has; of one that takes long to read, whether it has any."""
    is_long = path.suffix.lower() in PACKED or path.stat().st_size > SAMPLE_BYTES
    return len(first_rows(path)) if is_long else sum(1 for _ in read_rows(path))


def first_rows(path: Path) -> list[Row]:
    """The first row of a JSON Lines or CSV file, or none."""
    return list(islice(read_rows(path), 1))


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        CheckpointError: it cannot be read as UTF-8.
    """
    with _opened(path) as file:
        return _decoded(path, file.read())


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON Lines file, or of a JSON file with a list, or of a CSV file with a header.

    Raises:
        CheckpointError: one of them is broken; its line is named.
    """
    if kind_of(path) in TABLES:
        text = io.StringIO(read_text(path), newline="")
        yield from _csv_rows(path, text)
        return
    with _opened(path) as file:
        buffered = io.BufferedReader(file)  # type: ignore[type-var]
        if buffered.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _listed_rows(path, _decoded(path, buffered.read()))
            return
        for number, line in enumerate(buffered, 1):
            if line.strip():
                yield _row(path, number, _decoded(path, line, number))


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise CheckpointError(
            f"{path}, line {number} is not JSON ({reason}): {line.strip()[:60]!r}. Mend or remove that line."
        ) from error
    if not isinstance(row, dict):
        raise CheckpointError(f"{path}, line {number} holds a JSON {type(row).__name__}, not an object with columns.")
    return row


def _listed_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise CheckpointError(f"{path}, line {line} is not JSON ({getattr(error, 'msg', error)}).") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise CheckpointError(f"{path}: entry {number} is a JSON {type(row).__name__}, not an object with columns.")
        yield row


def _csv_rows(path: Path, text: IO[str]) -> Iterator[Row]:
    csv.field_size_limit(2**30)
    reader = csv.DictReader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise CheckpointError(
                    f"{path}, line {reader.line_num} has another number of columns than the first line, which names "
                    f"{', '.join(reader.fieldnames or ())}."
                )
            yield row
    except csv.Error as error:
        raise CheckpointError(f"{path}, line {reader.line_num} is not CSV ({error}).") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked.

    Raises:
        CheckpointError: it cannot be read, or is not packed as its name says.
    """
    kind = path.suffix.lower()
    unpacker = _zstd(path) if kind == ".zst" else gzip
    damaged = (OSError, EOFError, zlib.error, *([unpacker.ZstdError] if kind == ".zst" else []))
    try:
        with unpacker.open(path, "rb") if kind in PACKED else path.open("rb") as file:
            yield file
    except damaged as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {str(reason).rstrip('.')}.") from error


def _zstd(path: Path) -> Any:
    """The module that unpacks zstd."""
    if find_spec("compression") is not None:
        from compression import zstd

        return zstd
    if find_spec("zstandard") is None:
        raise MissingPackageError(f"{path} is packed with zstd, and unpacking that needs: pip install zstandard.")
    import zstandard

    return zstandard


def _decoded(path: Path, content: bytes, line: int | None = None, is_cut: bool = False) -> str:
    """Bytes as UTF-8; what a cut left of a last character is no fault.

    Raises:
        CheckpointError: they are something else; how to convert it is said.
    """
    try:
        return content.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        if is_cut and len(content) == SAMPLE_BYTES and error.reason == "unexpected end of data":
            return content[: error.start].decode()
        place = f", line {line}" if line is not None else ""
        encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), OFTEN)
        advice = f"Convert it: iconv -f {encoding} -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
        raise CheckpointError(
            f"{path}{place} is not UTF-8 text: byte 0x{content[error.start]:02x} at {error.start:,}. {advice}"
        ) from error
