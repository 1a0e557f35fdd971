"""Run several commands one after the other, since processes take seconds to start, and keep how each ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.__main__ import main
from llmprune_cli.errors import OutputError
from llmprune_cli.journal.journal import Journal
from llmprune_cli.processes import leave

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.memory import share_findings


def fill_disk_after(layers: int) -> None:
    """Let writing fail as soon as so many layers are kept; 0 lets it be."""
    kept = 0

    def save_layer(self: Journal, *args: Any) -> None:
        nonlocal kept
        whole(self, *args)
        kept += 1
        if kept == layers:
            raise OutputError("The disk is full.")

    Journal.save_layer = save_layer if layers else whole  # type: ignore[method-assign]


def run(command: dict[str, Any], rank: int) -> list[Any]:
    """Exit code, stdout and stderr of a command: `arguments`, or `second` ones for the second process."""
    fill_disk_after(command.get("layers_until_full", 0))
    arguments = command.get("second", command["arguments"]) if rank == 1 else command["arguments"]
    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    return [code or 0, stdout.getvalue(), stderr.getvalue()]


if __name__ == "__main__":
    whole = Journal.save_layer
    commands, results, own = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patched:
        share_findings(patched)
        ended = [run(command, own) for command in commands]
    (results / f"{own}.json").write_text(json.dumps(ended))
    leave(0)
