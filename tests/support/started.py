"""Processes of `llmprune` that start at once: each is forked from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    FORKS.set_forkserver_preload(["llmprune_cli.commands.delivery"])


def start(*arguments: str | Path, said: Path | None = None, errors: Path | None = None) -> BaseProcess:
    """Start `llmprune` in a session of its own.

    Args:
        said: file or terminal that gets standard output; nothing is kept by default.
        errors: the same for standard error.
    """
    places = (str(said or os.devnull), str(errors or os.devnull))
    words = list(map(str, arguments))
    process = FORKS.Process(target=_run, args=(words, places, str(Path.cwd()), dict(os.environ)))
    process.start()
    return process


def _run(words: list[str], places: tuple[str, str], folder: str, environment: dict[str, str]) -> None:
    from llmprune_cli.__main__ import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if sys.platform != "win32":
        os.setsid()  # so that a terminal that it opens is its own
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as where no shell and no nohup ignores them
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, place in enumerate(places, 1):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
    main(words)
