"""Temporary files: a folder for each run that needs one, those of dead runs, and disks without room."""

from __future__ import annotations

import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmprune_cli.errors import OutputError
from llmprune_cli.folder.staging import acquired, empty, lock_file, locked_folder

SCRATCH = "llmprune-"
LOCK = "filling.lock"
PATIENCE_S = 10.0  # for others, who may be clearing away the lock of a folder that is just being made


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder on the system's temporary disk, which vanishes when the block ends; those of dead runs vanish now.

    Raises:
        OutputError: it cannot be made.
    """
    with ExitStack() as stack:
        with scratch_space():
            place = Path(tempfile.gettempdir())
            folder = place / f"{SCRATCH}{uuid.uuid4().hex[:12]}"
            stack.enter_context(locked_folder(folder, PATIENCE_S))  # others may be clearing it away just now
            folder.chmod(stat.S_IRWXU)
        for lock in place.glob(lock_file(Path(f"{SCRATCH}*")).name):
            if lock != lock_file(folder):
                _remove_unused(lock.with_suffix(""), owner=folder.stat().st_uid)
        try:
            yield folder
        finally:
            with suppress(OSError):  # the next run does it; what ended this one is worth more
                empty(folder)


@contextmanager
def scratch_space() -> Iterator[None]:
    """Where temporary files are written.

    Raises:
        OutputError: there is no room for them.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"Temporary files cannot be written: {reason}. Make room on their disk, or name another folder in TMPDIR."
        ) from error


def _remove_unused(folder: Path, owner: int) -> None:
    from filelock import Timeout

    with suppress(OSError, Timeout):
        own = [path.lstat().st_uid == owner for path in (lock_file(folder), folder) if path.exists()]
        if all(own):
            with locked_folder(folder):
                empty(folder)


def check_folder(folder: Path, option: str) -> None:
    """Make a folder where it is missing, and make sure that it can be written.

    Raises:
        OutputError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} is not a writable folder ({error.strerror}). Choose another {option}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} is not a writable folder. Choose another {option}.")


def bytes_in(folder: Path, pattern: str) -> int:
    """Bytes that the files in a folder take whose names, or those of their folders, match a pattern."""
    files = (file for path in folder.glob(pattern) for file in (path, *path.rglob("*")) if file.is_file())
    return sum(file.stat().st_size for file in files)


@contextmanager
def filled_alone(folder: Path, option: str) -> Iterator[None]:
    """While a folder of the user's is filled, which no other run does meanwhile.

    Raises:
        OutputError: another one does, or it cannot be written.
    """
    from filelock import Timeout

    lock = folder.resolve() / LOCK  # in it: what lies beside may not be the user's to write
    with ExitStack() as stack:
        try:
            stack.enter_context(acquired(lock, 0.0))
        except Timeout:
            raise OutputError(f"Another run is filling {folder}. Wait for it, or choose another {option}.") from None
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}. Choose another {option}.") from error
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()  # while it is held
