"""Texts that benchmarks judge models by: two that llmprune knows, and two that nothing is fitted on or heals with."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

PARTS = 64  # of so many files a text is made
PART_LENGTH = 4000  # characters
LICENSE_LENGTH = 1500  # before them, as files begin with licences


def write_documentation(path: Path) -> Path:
    """What `python-docs` calibrates on, as a file, for programs and builds that read another part under this name."""
    from llmprune_cli.text.corpus import load_corpus

    path.write_text(load_corpus("python-docs", "validation").text, encoding="utf-8")
    return path


def write_judged_texts(folder: Path) -> dict[str, str]:
    """What `eval` reads, by the name that tables give it; two of these are written into a folder."""
    import torch

    source = _write_parts(folder / "source.txt", Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    headers = _write_parts(folder / "headers.txt", Path(torch.__file__).parent.glob("include/ATen/*.h"))
    own = {"WikiText-2": "wikitext2", "documentation": "python-docs"}
    return {**own, "Python's source": str(source), "C++ headers": str(headers)}


def _write_parts(path: Path, files: Iterable[Path]) -> Path:
    """Parts of files that lie evenly among these."""
    found = sorted(files)
    chosen = found[:: max(1, len(found) // PARTS)]
    texts = (file.read_text(encoding="utf-8", errors="ignore")[LICENSE_LENGTH:][:PART_LENGTH] for file in chosen)
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path
