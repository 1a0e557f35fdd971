"""The support matrix of the README, made from what `llmprune inspect` says of every family that the tests prove.

`make matrix` writes it; a test holds the README to it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from conftest import run_cli, tiny_config
from families import FAMILIES, SIZES, model_type

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- matrix: made by `make matrix` -->\n", "<!-- end of matrix -->"
COLUMNS = {
    "hidden_size": "hidden size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV groups",
    "head_dim": "head dim",
    "intermediate_size": "MLP neurons",
    "moe_intermediate_size": "expert neurons",
    "shared_expert_intermediate_size": "shared expert",
    "num_experts": "experts",
    "num_hidden_layers": "layers",
}


def make_matrix() -> str:
    """A Markdown table, family by width, and the reasons of the refusals below it."""
    reasons: dict[str, int] = {}
    rows = [["family", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    for family, changes in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            tiny_config(model_type(family), **{**SIZES, **changes}).save_pretrained(folder)  # type: ignore[attr-defined]
            run = run_cli("inspect", folder, "--json")
        prunable = json.loads(run.stdout)["prunable"]
        cells = []
        for width in COLUMNS:
            legal = prunable.get(width)
            if legal is None:
                cells.append("")
            elif legal.startswith("no: "):
                reason = legal.removeprefix("no: ").replace(model_type(family), "the model")
                cells.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
            else:
                one = legal.startswith("1 to 1,") or legal == "1 to 1"
                cells.append("with heads" if legal.startswith("query heads") else "one" if one else "yes")
        rows.append([family, *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"({number}) {reason}." for reason, number in reasons.items()]
    return "\n".join(lines) + "\n\n" + "  \n".join(notes) + "\n"


def main() -> None:
    """Write the matrix into the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    README.write_text(before + START + make_matrix() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
