"""The entry point: the one place where errors become messages and exit codes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmprune_cli.errors import LlmpruneError, ResourceError

INTERRUPTED = 130
NO_MEMORY = ("can't allocate memory", "not enough memory")  # how torch says so on the CPU, on Linux and on Windows


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its documented code.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, _interrupt)
    from llmprune_cli.cli import app
    from llmprune_cli.processes import ended_together, only_first_speaks

    with only_first_speaks():
        try:
            with ended_together(), _memory_explained():
                app(arguments, prog_name="llmprune")
        except LlmpruneError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("Interrupted: what was not finished is not kept.", file=sys.stderr)
            sys.exit(INTERRUPTED)


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Say that memory ran out, also where that was taken for an error of another kind."""
    try:
        yield
    except (MemoryError, RuntimeError, LlmpruneError) as error:
        cause = error.__cause__
        shortage = cause if isinstance(cause, RuntimeError) and _is_shortage(cause) else error
        if not _is_shortage(shortage):
            raise
        reason = (str(shortage).strip().splitlines() or ["no more is to be had"])[0]
        raise ResourceError(
            f"Memory ran out: {reason}. Take a smaller --max-seq-len or --calibration-tokens, keep hidden states in "
            "--offload-dir, or use another --device."
        ) from error


def _is_shortage(error: BaseException) -> bool:
    is_of_device = type(error).__name__ == "OutOfMemoryError"  # torch's, which is slow to import
    return isinstance(error, MemoryError) or is_of_device or any(words in str(error) for words in NO_MEMORY)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        from llmprune_cli.processes import leave

        leave(end.code)
        raise
