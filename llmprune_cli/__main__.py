"""The entry point: the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from llmprune_cli.errors import LlmpruneError, memory_explained

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its documented code.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup asks for
        signal.signal(signal.SIGHUP, _hang_up)
    from llmprune_cli.cli.app import app
    from llmprune_cli.processes import ended_together, only_first_speaks

    with only_first_speaks():
        try:
            with ended_together(), memory_explained():
                app(arguments, prog_name="llmprune")
        except LlmpruneError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("Interrupted: what was not finished is not kept.", file=sys.stderr)
            sys.exit(INTERRUPTED)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _hang_up(_signal: int, _frame: FrameType | None) -> None:
    """End as after Ctrl-C, without a terminal to write to."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        from llmprune_cli.processes import leave

        leave(end.code)
        raise
