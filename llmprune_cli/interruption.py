"""What stops a run: Ctrl-C, a polite kill and a terminal that goes away all end it alike, so that it can tidy up."""

from __future__ import annotations

import os
import signal
import sys
from threading import Event
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit code
_ASKED = Event()  # libraries in C may lose an interruption that comes while they call Python, and fail otherwise


def end_tidily() -> None:
    """Let SIGTERM and SIGHUP interrupt this process as Ctrl-C does."""
    _ASKED.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_again)
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup asks for
        signal.signal(signal.SIGHUP, _hang_up)


def was_interrupted() -> bool:
    """Whether this process was asked to end, whatever became of that."""
    return _ASKED.is_set()


def exit_interrupted() -> NoReturn:
    """Say that a run was stopped, and leave."""
    print("Interrupted: what was not finished is not kept.", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _interrupt_again(_number: int, _frame: FrameType | None) -> None:
    """End, and once more where somebody presses Ctrl-C while this tidies up."""
    _ASKED.set()
    raise KeyboardInterrupt


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """End once: a terminal that closes may say so twice, and what tidies up is not to be stopped by the second."""
    signal.signal(number, signal.SIG_IGN)
    _ASKED.set()
    raise KeyboardInterrupt


def _hang_up(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C, without a terminal to write to."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    _interrupt(number, frame)
