"""A recorded session in a terminal: inspect, prune and evaluate SmolLM2-135M, drawn as an SVG.

`make recording` runs it and writes docs/terminal.svg. Everything in the picture is what the commands print; what they
say of their progress is left out. Exit status 1 means that a command failed.
"""

from __future__ import annotations

import io
import os
import pty
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.demo.demo import OUTPUT, choose_text, find_gguf

TARGET = Path(__file__).parents[3] / "docs" / "terminal.svg"
MODEL = "smollm2.gguf"
COLUMNS = 80
MOST_BYTES = 100_000


def commands(text: str) -> list[str]:
    """What is typed on a text; WikiText-2 is named nowhere, as it is read by default."""
    own, other = ("", "") if text == "wikitext2" else (f" --calibration {text}", f" --dataset {text}")
    return [
        f"llmprune inspect {MODEL} --mlp 25%",
        f"llmprune prune {MODEL} --mlp 25%{own} --calibration-tokens 2048 -o pruned",
        f"llmprune eval {MODEL} pruned{other} --max-seq-len 512 --limit 4",
    ]


def shown(command: str) -> str:
    """What a command writes into a terminal, with its colours.

    Raises:
        CalledProcessError: it failed.
    """
    words = [sys.executable, "-m", "llmprune_cli", *shlex.split(command)[1:]]
    own, theirs = pty.openpty()
    settings = {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[3])}
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(words, stdout=theirs, stderr=told, env={**os.environ, **settings})
        os.close(theirs)
        written = b""
        while part := _read(own):
            written += part
        if process.wait():
            told.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, stderr=told.read().decode())
    return written.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    """What comes next; nothing where the other side is closed, which Linux calls an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def drawn(session: list[tuple[str, str]]) -> str:
    """An SVG of commands and what each printed."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for command, output in session:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=False)
        console.print(Text.from_ansi(output.rstrip("\n")))
        console.print()
    return console.export_svg(title="llmprune", unique_id="terminal")


def main() -> None:
    """Run all commands in a folder of their own, and draw."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        OUTPUT.mkdir()
        Path(MODEL).symlink_to(find_gguf())
        session = []
        for command in commands(choose_text()):
            print(f"$ {command}", flush=True)
            try:
                session.append((command, shown(command)))
            except subprocess.CalledProcessError as error:
                sys.exit(f"The recording failed: {error}\n{error.stderr}")
            print(session[-1][1], flush=True)
        svg = drawn(session)
        if place in svg or len(svg.encode()) > MOST_BYTES:
            sys.exit(f"The recording names a folder of this machine, or is larger than {MOST_BYTES:,} bytes.")
        os.chdir(TARGET.parent)
    TARGET.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
