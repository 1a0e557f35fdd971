"""JSON schemas of every document that llmprune prints or writes.

`make schemas` writes them into docs/schemas; a test holds them to what the commands print.
"""

from __future__ import annotations

import json
from pathlib import Path

from llmprune_cli.report.schemas import DOCUMENTS, schema_of

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"


def as_text(name: str) -> str:
    """A schema as it stands in its file."""
    return json.dumps(schema_of(name), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in DOCUMENTS:
        (FOLDER / f"{name}.json").write_text(as_text(name), encoding="utf-8")
