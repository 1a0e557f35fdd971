"""Folders in which a target is made before it takes its place, and what dead runs left in them.

A target `out` is made in `.out.llmprune-work` beside it, which one process has at a time: the one that holds the lock
`.out.llmprune-work.lock`. Whoever has it next finds out how far the last one came, and clears away what is of no more
use.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmprune_cli.errors import CheckpointError, OutputError
from llmprune_cli.folder.documents import fsync, missing_parents, read_json, remove_empty
from llmprune_cli.folder.manifest import MANIFEST_NAME

NEW, OLD, DONE = "new", "old", "done"
SWEEP = "sweep.json"  # in a folder of plans and figures
UNLISTED = (MANIFEST_NAME, "README.md", "LICENSE", "LICENCE", "NOTICE")  # how names begin that no manifest lists


def hidden_folder(target: Path) -> Path:
    """Where a target is made."""
    return target.with_name(f".{target.name}.llmprune-work")


@contextmanager
def locked_folder(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """A folder that no other process has, made where it is missing. It goes again if nothing is left in it.

    Who has it holds the lock file beside it, which goes with the lock; after a dead process the next one removes it.

    Raises:
        Timeout: another process has it.
        OSError: it cannot be made.
    """
    if folder.is_symlink():  # what is left in it would be removed, wherever it leads
        raise OSError(errno.ELOOP, "its hidden folder is a link", str(folder))
    missing, lock = missing_parents(folder), lock_file(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with acquired(lock, wait_s):
            try:
                folder.mkdir(exist_ok=True)
                yield
            finally:
                remove_empty([folder])
                with suppress(OSError):
                    lock.unlink()  # while it is held: whoever waits for it finds it gone, and makes another
    finally:
        remove_empty(missing)


@contextmanager
def acquired(lock: Path, wait_s: float) -> Iterator[None]:
    """A lock that no other process has; where none can be made, filelock says the same as where one is taken."""
    from filelock import FileLock, Timeout

    own = FileLock(lock, timeout=wait_s)
    try:
        own.acquire()
    except Timeout:
        if lock.exists():
            raise
        try:
            own.acquire()  # the process that had it may have gone just now
        except Timeout:
            if lock.exists():
                raise
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(lock)) from None
    try:
        yield
    finally:
        own.release()


def lock_file(folder: Path) -> Path:
    """The lock of a folder that one process has at a time."""
    return folder.with_name(f"{folder.name}.lock")


@dataclass(frozen=True)
class Claim:
    """A target that is this process's to write."""

    target: Path  # absolute
    overwrite: bool  # what is there

    @property
    def folder(self) -> Path:
        """The hidden folder beside the target."""
        return hidden_folder(self.target)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder that becomes the target when the block ends without an error, and vanishes otherwise.

        With that, everything else in the hidden folder has had its use and goes.

        Raises:
            OutputError: it cannot be written, or there is something by now that was not to be replaced.
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
        _check_place(self.target, None)
        _check_free(self.target, self.overwrite)  # others may have put something there meanwhile
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
    claim = Claim(Path(os.path.abspath(output)), overwrite)
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
    """Refuse a target that holds something or that overlaps the input, before anything is claimed.

    Where a run has died, what the target holds is only known when that is finished or undone: see `claimed`.

    Args:
        forbidden: the input.

    Raises:
        OutputError: see above.
    """
    try:
        _check_place(target, forbidden)
        hidden = hidden_folder(target)
        if not (lock_file(hidden).exists() or hidden.exists()):
            _check_free(target, overwrite)
        parent = target.absolute().parent
        while not parent.exists():
            parent = parent.parent
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no name may
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{target} cannot be written: {reason}. Choose another --output.") from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable. Choose another --output.")


def check_room(target: Path, size_bytes: int) -> None:
    """Make sure that as many bytes fit on the disk of a target before they are made.

    Raises:
        OutputError: they do not.
    """
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        raise OutputError(
            f"{target} will take {size_bytes:,} bytes, and its disk has room for {free:,}. Make room, or choose "
            "another --output."
        )


def _check_place(target: Path, forbidden: Path | None) -> None:
    if target.name in ("", ".."):
        raise OutputError(f"{target} is no name of a folder to write. Choose an --output such as pruned.")
    if target.suffix == ".gguf":
        raise OutputError(f"A folder is written, and {target} is called as a file is. Choose another --output.")
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
    if not ((target / SWEEP).exists() or _is_model(target) or _is_export(target)):
        raise OutputError(f"{target} is not a model folder, so --overwrite leaves it alone. Empty it yourself.")


def _is_model(folder: Path) -> bool:
    """Whether a folder's configuration is one of a model: files of that name are in many projects."""
    try:
        return bool({"model_type", "architectures"} & read_json(folder / "config.json").keys())
    except CheckpointError:
        return False


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


def empty(folder: Path) -> None:
    """Remove everything in a locked folder, and last what says that all of it may go."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == DONE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
