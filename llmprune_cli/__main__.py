"""The entry point: the one place where errors become messages and exit codes."""

from __future__ import annotations

import ctypes
import gc
import io
import sys
from contextlib import suppress

from llmprune_cli.errors import LlmpruneError, memory_explained
from llmprune_cli.interruption import end_tidily, exit_interrupted, was_interrupted

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in malloc.h of the GNU C library
KEPT_FREE, MOST_ON_HEAP = 2**27, 2**25  # bytes that stay when they are freed; of one allocation, the most that it takes
COLLECT_AFTER = 20_000  # new objects: importing makes very many that stay, and looking through them took a fifth of it


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its documented code.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    end_tidily()
    _write_what_can_be_written()
    _keep_freed_memory()
    gc.set_threshold(COLLECT_AFTER)
    from llmprune_cli.cli.app import run
    from llmprune_cli.processes import ended_together, only_first_speaks

    with only_first_speaks():
        try:
            with ended_together(), memory_explained():
                run(arguments)
        except KeyboardInterrupt:
            exit_interrupted()
        except Exception as error:
            if was_interrupted():
                exit_interrupted()
            if not isinstance(error, LlmpruneError):
                raise
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


def _keep_freed_memory() -> None:
    """Have the GNU C library keep what is freed for what comes next: each layer needs anew what the last one gave back.

    Otherwise Linux takes it and clears it again for every batch.
    """
    with suppress(AttributeError, OSError, TypeError):  # other libraries have no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)
        mallopt(M_MMAP_THRESHOLD, MOST_ON_HEAP)


def _write_what_can_be_written() -> None:
    """Show a question mark for a character that the terminal or the file cannot hold: no work is lost for that."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # what is written to it already cannot be told from what comes
                stream.reconfigure(errors="replace")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        from llmprune_cli.processes import leave

        leave(end.code)
        raise
