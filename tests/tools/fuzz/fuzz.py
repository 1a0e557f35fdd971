"""Fuzz the readers with atheris, each in a process of its own.

`make fuzz` runs it, 10 minutes for each reader unless MINUTES says otherwise, and prints how many inputs were tried and
how many kinds of uncaught exceptions came of them. Exit status 1 means that there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

DOCUMENT = b"\1"  # begins an input that says how to change a good document; any other is the file itself


def fuzz(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one reader; this process ends with it. Each kind of finding gets a file."""
    import atheris

    with atheris.instrument_imports(include=["llmprune_cli"]):
        import llmprune_cli.commands.export
        import llmprune_cli.family.architecture
        import llmprune_cli.folder.integrity
        import llmprune_cli.plan.requested_widths
        import llmprune_cli.report.model_card
        import llmprune_cli.source.opening  # noqa: F401
    from tools.fuzz.readers import attempt, model_folder, reader

    with model_folder() as folder:
        chosen = reader(name, folder)
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(chosen.seeds):
            (corpus / str(number)).write_bytes(seed)

        holds_document = chosen.seeds[0][:1] == b"{"
        if holds_document:
            (corpus / "document").write_bytes(DOCUMENT + bytes(range(40)))

        def try_input(data: bytes) -> None:
            if holds_document and data.startswith(DOCUMENT):
                data = changed_document(chosen.seeds[0], atheris.FuzzedDataProvider(data[1:]))
            error = attempt(chosen, folder, data)
            if error is None:
                return
            kind = re.sub(r"\W+", "-", f"{name}-{type(error).__name__}-{traceback.extract_tb(error.__traceback__)[-1]}")
            if not (findings / kind[:150]).exists():
                trace = "".join(traceback.format_exception(error))
                (findings / kind[:150]).write_text(f"{data!r}\n{trace}")

        limits = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=20", "-rss_limit_mb=4096", "-verbosity=1"]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={findings}/", str(corpus)], try_input)
        atheris.Fuzz()


def changed_document(good: bytes, provider: Any) -> bytes:
    """A good JSON document with other values at up to three places."""
    from tools.fuzz.readers import mutated

    document = json.loads(good)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        path = [provider.ConsumeIntInRange(0, 60) for _ in range(provider.ConsumeIntInRange(1, 5))]
        text, number = provider.ConsumeUnicode(8), provider.ConsumeInt(8)
        values = [None, True, number, -number, provider.ConsumeRegularFloat(), text, [number], [text], {text: number}]
        document = mutated(document, path, provider.PickValueInList(values))
    return json.dumps(document).encode()


def run(name: str, seconds: int, findings: Path) -> int:
    """Fuzz one reader in a process of its own: how many inputs it tried."""
    command = [sys.executable, __file__, "--reader", name, "--seconds", str(seconds), "--findings", str(findings)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    ended = re.search(r"Done (\d+) runs", done.stderr)
    if ended is None or done.returncode:
        (findings / f"{name}-ended").write_text(done.stderr[-5000:])
    return int(ended[1]) if ended else 0


def main() -> None:
    """Fuzz all readers and print what came of it."""
    from tools.fuzz.readers import READS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each reader (default: 10)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="readers at a time")
    parser.add_argument("--reader", choices=READS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        fuzz(arguments.reader, arguments.seconds, arguments.findings)
        return
    with tempfile.TemporaryDirectory(prefix="findings-") as place, ThreadPoolExecutor(arguments.jobs) as pool:
        findings = Path(place)
        counts = pool.map(lambda name: run(name, int(60 * arguments.minutes), findings), READS)
        for name, count in zip(READS, counts, strict=True):
            found = sorted(findings.glob(f"{name}-*"))
            print(f"{name}: {count:,} inputs tried, {len(found)} uncaught exceptions", flush=True)
            for path in found:
                print(path.read_text(errors="replace")[-3000:])
        sys.exit(1 if any(findings.iterdir()) else 0)


if __name__ == "__main__":
    main()
