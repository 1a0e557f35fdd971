"""Small files: JSON that is read within bounds, and what is written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_JSON_BYTES = 32 * 2**20  # the index of 150,000 tensors has half of that
ANEW = "Mend it, or get it anew from where it came."
MOST_CONTAINERS = 10**6  # lists and objects of a document, which take much more memory than their brackets
UNFINISHED = ".{}.llmprune-new-{}"  # a file that is being written: its name to be, and what tells it from others
DEAD_S = 86_400  # after which nobody is writing an unfinished file any more


def read_json(path: Path, most_bytes: int | None = MOST_JSON_BYTES, advice: str = ANEW) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        most_bytes: of a file of this kind; None for one that this program wrote for itself.
        advice: what to do where it cannot be read.

    Raises:
        CheckpointError: the file is missing, too large, not JSON, or not an object.
    """
    try:
        check_regular(path)
        size_bytes = path.stat().st_size
        if most_bytes is not None and size_bytes > most_bytes:
            raise CheckpointError(f"{path} has {size_bytes:,} bytes, and files of its kind at most {most_bytes:,}.")
        text = path.read_text(encoding="utf-8")
        if most_bytes is not None and text.count("[") + text.count("{") > MOST_CONTAINERS:
            raise CheckpointError(f"{path} holds more than {MOST_CONTAINERS:,} lists and objects.")
        value = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). {advice}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object. {advice}")
    return value


def first_fault(error: ValidationError) -> str:
    """The first field of a document that is not as it should be, and what is the matter with it."""
    first = error.errors(include_url=False, include_input=False)[0]
    where, what = place_of(*(part for part in first["loc"] if part != "[key]")), first["msg"]
    return f"{where}: {what.removeprefix('Value error, ')}" if where else what


def place_of(*parts: str | int) -> str:
    """How a field of a document is spelled: `keep.num_experts["3"][0]`."""
    spelled = [f".{p}" if isinstance(p, str) and p.isidentifier() else f"[{json.dumps(p)}]" for p in parts]
    return "".join(spelled).removeprefix(".")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON that ends in a newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def replace_file(path: Path, parts: Iterable[Any], advice: str = "Make room, or choose another place.") -> None:
    """Write buffers into a file that gets its name when all of it is on disk.

    Args:
        advice: what to do where it cannot be written.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(os.path.abspath(path))
    new = path.with_name(UNFINISHED.format(path.name, uuid.uuid4().hex[:12]))
    missing = missing_parents(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            remove_empty(missing)
            raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. {advice}") from error
    with suppress(OSError):
        for other in path.parent.glob(UNFINISHED.format(escape(path.name), "*")):
            if time.time() - other.stat().st_mtime > DEAD_S:
                other.unlink()


def check_replaceable(path: Path, option: str) -> None:
    """Make sure that a file can be written or replaced, before any work is done; see `replace_file`.

    Args:
        option: that names it.

    Raises:
        OutputError: it cannot.
    """
    try:
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if path.is_dir():
            raise OutputError(f"{path} is a folder. Choose another {option}.")
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise OutputError(f"{path} cannot be written: {folder} is no folder to write in. Choose another {option}.")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}. Choose another {option}.") from error


def check_own_folder(folder: Path, option: str, models: Iterable[Path | None]) -> None:
    """Make sure that the folder of a run's own work, or what is to become one, is no file and in no model's folder.

    Args:
        option: that names it.
        models: folders that are read, which stay as they are, and one that is replaced.

    Raises:
        OutputError: it is, or lies there.
    """
    if is_there(folder) and not folder.is_dir():
        raise OutputError(f"{folder} is not a writable folder, but a file. Choose another {option}.")
    for model in models:
        if model is not None and model.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise OutputError(f"{folder} lies in the model's folder {model}. Choose another {option}, beside it.")


def check_apart(path: Path, option: str, files: Iterable[Path]) -> None:
    """Make sure that a file that is written is none of those that are read, or written as well.

    Args:
        option: that names it.

    Raises:
        OutputError: it is.
    """
    for own in files:
        if path.resolve() == own.resolve():
            raise OutputError(f"{path} is another file of this run, which {option} would replace. Choose another.")


def check_regular(path: Path) -> None:
    """Make sure that a file has an end: a pipe waits for whoever writes into it, and a device may give bytes for ever.

    Raises:
        CheckpointError: it is something else.
        OSError: it is not there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path} is not a regular file.")


def is_there(path: Path) -> bool:
    """Whether a path exists; one that no file system can have does not."""
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def missing_parents(path: Path) -> list[Path]:
    """The folders above a path that have yet to be made, the innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, each within the next, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
