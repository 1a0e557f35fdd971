"""Folders in which something is made before it takes its place, and what dead runs left in them.

A target `out` is made in `.out.llmprune-work` beside it, which one process has at a time. Whoever has it next finds out
how far the last one came, and clears away what is of no more use.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError, OutputError
from llmprune_cli.folder.checkpoint import MANIFEST_NAME, read_json

LOCK, NEW, OLD, DONE = "lock", "new", "old", "done"
UNLISTED = (MANIFEST_NAME, "README.md", "LICENSE", "LICENCE", "NOTICE")  # how names begin that no manifest lists
SCRATCH = "llmprune-"
PATIENCE_S = 10.0  # for another process that writes the same file


def hidden_folder(target: Path) -> Path:
    """Where a target is made."""
    return target.with_name(f".{target.name}.llmprune-work")


@contextmanager
def locked_folder(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """A folder that no other process has, made where it is missing. It goes again if nothing is left in it.

    Raises:
        Timeout: another process has it.
        OSError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    if folder.is_symlink():  # what is left in it would be removed, wherever it leads
        raise OSError(errno.ELOOP, "its hidden folder is a link", str(folder))
    missing = [parent for parent in folder.parents if not parent.exists()]
    lock, deadline = FileLock(folder / LOCK), time.monotonic() + wait_s
    try:
        while not lock.is_locked:
            folder.mkdir(parents=True, exist_ok=True)  # again: the process that had it may have removed it
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked and [found.name for found in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            folder.rmdir()  # unless it holds something
            for parent in missing:
                parent.rmdir()
        lock.release()


@dataclass(frozen=True)
class Claim:
    """A target that is this process's to write."""

    target: Path  # absolute

    @property
    def folder(self) -> Path:
        """The hidden folder beside the target."""
        return hidden_folder(self.target)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder that becomes the target when the block ends without an error, and vanishes otherwise.

        With that, everything else in the hidden folder has had its use and goes.

        Raises:
            OutputError: it cannot be written.
        """
        new = self.folder / NEW
        try:
            new.mkdir()
            yield new
            for path in [*new.rglob("*"), new]:
                fsync(path)
            self._put_in_place()
        except OSError as error:
            raise OutputError(
                f"Writing {self.target} failed: {error.strerror or error}. Nothing was left there."
            ) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):  # the next run does it
            empty(self.folder)

    def _put_in_place(self) -> None:
        (self.folder / DONE).touch()
        fsync(self.folder)
        try:
            if self.target.exists():
                self.target.rename(self.folder / OLD)
            (self.folder / NEW).rename(self.target)
        except BaseException:
            if not self.target.exists():
                self._take_back()
            raise
        fsync(self.target.parent)

    def recover(self) -> None:
        """Finish or undo what a run did that died in its last steps, and remove what it had staged.

        Raises:
            OutputError: the model that it replaced has no place to go back to.
        """
        if (self.folder / DONE).exists() and not (self.folder / NEW).exists() and self.target.exists():
            empty(self.folder)
        else:
            self._take_back()
            shutil.rmtree(self.folder / NEW, ignore_errors=True)

    def _take_back(self) -> None:
        old = self.folder / OLD
        if old.exists():
            if self.target.exists():
                raise OutputError(f"{old} is the model that was at {self.target} before. Move one of them away first.")
            old.rename(self.target)
        (self.folder / DONE).unlink(missing_ok=True)


@contextmanager
def claimed(output: Path, overwrite: bool, forbidden: Path | None = None) -> Iterator[Claim]:
    """The right to write a target, for one process at a time.

    Raises:
        OutputError: another process has it, or see `check_target`.
    """
    from filelock import Timeout

    _check_place(output, forbidden)
    claim = Claim(Path(os.path.abspath(output)))
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(claim.folder))
            claim.recover()
        except Timeout:
            raise OutputError(f"Another run is writing {output}. Wait for it, or choose another --output.") from None
        except OSError as error:
            raise OutputError(f"Cannot write beside {output}: {error.strerror}. Choose another --output.") from error
        _check_free(output, overwrite)
        yield claim


def check_target(target: Path, overwrite: bool, forbidden: Path | None = None) -> None:
    """Refuse a target that holds something or that overlaps the input, where nothing will be written.

    Args:
        forbidden: the input.

    Raises:
        OutputError: see above.
    """
    _check_place(target, forbidden)
    _check_free(target, overwrite)
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable. Choose another --output.")


def _check_place(target: Path, forbidden: Path | None) -> None:
    resolved = target.resolve()
    if forbidden is not None:
        source = forbidden.resolve()
        if resolved == source or source in resolved.parents or resolved in source.parents:
            raise OutputError(f"The output {target} and the input {forbidden} overlap. Choose a folder beside it.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target} exists and is not a folder. Choose another --output.")


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target} is not empty. Choose another --output, or pass --overwrite to replace it.")
    if not (target / "config.json").exists() and not _is_export(target):
        raise OutputError(f"{target} is not a model folder, so --overwrite leaves it alone. Empty it yourself.")


def _is_export(folder: Path) -> bool:
    """Whether a folder holds what an export wrote and nothing else: other people keep many files together."""
    try:
        listed = read_json(folder / MANIFEST_NAME).get("files")
    except CheckpointError:
        return False
    names = {path.name for path in folder.iterdir() if is_listed(path.name)}
    return isinstance(listed, dict) and names <= {name.partition("/")[0] for name in listed}


def is_listed(name: str) -> bool:
    """Whether the manifest of a folder lists a file: all but itself and what is for people to read, and to edit."""
    return not name.startswith(UNLISTED)


def replace_file(path: Path, parts: Iterable[Any], advice: str = "Make room, or choose another place.") -> None:
    """Write buffers into a file that gets its name when all of it is on disk.

    Args:
        advice: what to do where it cannot be written.

    Raises:
        OutputError: it cannot be written, or another process does not finish writing it.
    """
    from filelock import Timeout

    path = Path(os.path.abspath(path))
    folder = hidden_folder(path)
    try:
        with locked_folder(folder, PATIENCE_S):
            try:
                with (folder / NEW).open("wb") as file:
                    for part in parts:
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                (folder / NEW).replace(path)
            finally:
                (folder / NEW).unlink(missing_ok=True)
    except (OSError, Timeout) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written: {reason}. {advice}") from error


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
        for other in place.glob(f"{SCRATCH}*"):
            if other != folder:
                _remove_unused(other, owner=folder.stat().st_uid)
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
        if (folder / LOCK).exists() and folder.lstat().st_uid == owner:
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


def empty(folder: Path) -> None:
    """Remove everything in a locked folder but its lock, and last what says that all of it may go."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == DONE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
