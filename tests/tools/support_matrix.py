"""The docs' tables of families, export formats and methods, made of what `llmprune inspect` says and of the registries.

`make matrix` writes them; a test holds the pages to them, and others try every cell.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmprune_cli.choose.importances import IMPORTANCES, LAYER_IMPORTANCES
from llmprune_cli.options import DEFAULT_IMPORTANCE, DEFAULT_REFIT
from llmprune_cli.repair import REFITS
from support import ROOT
from support.cli import run_cli
from support.families import EXPORTED, FAMILIES, HEADS_OF_16, SIZES, model_type
from support.tiny import tiny_config

DOCS = ROOT / "docs"
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


def inspect(family: str, settings: dict[str, Any], *options: str) -> dict[str, Any]:
    """What `llmprune inspect` says of a family's smallest configuration."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(model_type(family), **{**SIZES, **FAMILIES[family], **settings})
        config.save_pretrained(folder)  # type: ignore[attr-defined]
        document: dict[str, Any] = json.loads(run_cli("inspect", folder, *options, "--json").stdout)
    return document


def as_markdown(rows: list[list[str]]) -> str:
    """A table, the names of its columns first."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def family_table() -> str:
    """Family by width, and the reasons of the refusals below it."""
    reasons: dict[str, int] = {}
    rows = [["family", *COLUMNS.values()]]
    for family in FAMILIES:
        prunable = inspect(family, {})["prunable"]
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
    notes = [f"({number}) {reason}." for reason, number in reasons.items()]
    return as_markdown(rows) + "\n" + "  \n".join(notes) + "\n"


def format_table() -> str:
    """Architecture by export format, whole and with half of the query heads; for genai with heads of 16."""
    rows = [["architecture", "GGUF", "GGUF, fewer heads", "ONNX", "torch-export", "genai"]]
    for family, settings in EXPORTED.items():
        whole = inspect(family, settings)
        narrow = inspect(family, settings, "--head-pruning-ratio", "0.5")
        tied = narrow["after"]["widths"]["hidden_size"] != narrow["before"]["widths"]["hidden_size"]
        fewer = "heads fill it" if tied else takes(narrow, "llama.cpp")
        graphs = (takes(whole, "ONNX Runtime"), takes(whole, "torch.export"))
        genai = takes(inspect(family, {**settings, **HEADS_OF_16}), "onnxruntime-genai")
        rows.append([family, takes(whole, "llama.cpp"), fewer, *graphs, genai])
    return as_markdown(rows)


def takes(said: dict[str, Any], runtime: str) -> str:
    """One cell: whether a runtime takes a model."""
    fit = next(fit for fit in said["runtimes"] if fit["runtime"] == runtime)
    return "no" if not fit["loads"] else "as `llama`" if "as llama.cpp's llama" in fit["note"] else "yes"


def method_table(heads: list[str], methods: dict[str, str], default: str) -> str:
    """Methods by name, with what each does."""
    named = [[f"`{name}`{' (default)' if name == default else ''}", about] for name, about in methods.items()]
    return as_markdown([heads, *named])


def importance_table() -> str:
    """Importances of units."""
    abouts = {name: own.about for name, own in IMPORTANCES.items()}
    return method_table(["value", "how units are ranked"], abouts, DEFAULT_IMPORTANCE)


def layer_importance_table() -> str:
    """Importances of layers."""
    abouts = {name: own.about for name, own in LAYER_IMPORTANCES.items()}
    return method_table(["value", "which layers are removed"], abouts, "influence")


def refit_table() -> str:
    """Refits."""
    return method_table(["`--refit`", "what is solved again"], REFITS, DEFAULT_REFIT)


# The page of each table, and what makes it.
TABLES = {
    "matrix": ("families.md", family_table),
    "formats": ("exports.md", format_table),
    "importances": ("calibration.md", importance_table),
    "layer importances": ("calibration.md", layer_importance_table),
    "refits": ("calibration.md", refit_table),
}


def marks(name: str) -> tuple[str, str]:
    """The lines around a table in its page."""
    return f"<!-- {name}: made by `make matrix` -->\n", f"<!-- end of {name} -->"


def main() -> None:
    """Write the tables into their pages."""
    for name, (page, make) in TABLES.items():
        path, (start, end) = DOCS / page, marks(name)
        before, rest = path.read_text(encoding="utf-8").split(start)
        path.write_text(before + start + make() + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
