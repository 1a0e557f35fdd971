"""What fewer tokens cost a real model: SmolLM2 with ever smaller vocabularies.

`make bench-vocab` runs it: parameters, tokens per byte, tokens per second, and bits per byte of WikiText-2's test split
and of the half of Python's documentation that no token was ranked by, of the whole model and of what
`llmprune prune --vocab-size N` makes of it; with `--recover N`, healed too; with `--target 60%`, that target of widths
alone and with `--vocab auto`. Finished rows are kept in `bench-vocab-output/`, which also gets a chart. Exit
status 1 means that a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import make_whole
from tools.bench.prune_1b import Bound, print_bounds, print_table, say
from tools.bench.recover import fast_dtype, llmprune

OUTPUT = Path("bench-vocab-output")
WINDOW = 1024  # tokens that bits per byte are measured in
SIZES = (32768, 24576, 16384)
WORST = {  # by which bits per byte of the two texts may grow
    "32,768": (0.05, 0.02),
    "24,576": (0.10, 0.04),
    "24,576, healed": (0.02, 0.02),
}


def halves_of_the_documentation() -> tuple[Path, Path]:
    """Every second topic, and the others."""
    from pydoc_data.topics import topics

    paths = OUTPUT / "documentation-read.txt", OUTPUT / "documentation-held-out.txt"
    for number, path in enumerate(paths):
        path.write_text("\n\n".join([*topics.values()][number::2]), encoding="utf-8")
    return paths


def measure(folder: Path, whole: Path, texts: tuple[str, ...], windows: int) -> dict[str, Any]:
    """Figures of a model on all texts, the same part of which the whole model would read."""
    dtype = str(fast_dtype()).removeprefix("torch.")
    options = ("--max-seq-len", str(WINDOW), "--limit", str(windows), "--dtype", dtype)
    models = (whole, folder) if folder != whole else (whole,)
    rows = [llmprune("eval", *models, "--dataset", text, *options)["results"][-1] for text in texts]
    return {
        "parameters": rows[0]["parameters"],
        "bits": [row["bits_per_byte"] for row in rows],
        "tokens": [row["tokens"] / row["bytes"] for row in rows],
        "speed": rows[0]["tokens_per_second"],
    }


def kept(name: str, make: Any) -> dict[str, Any]:
    """A row, made once."""
    record = OUTPUT / f"{name}.json"
    if not record.exists():
        record.write_text(json.dumps(make()))
    row: dict[str, Any] = json.loads(record.read_text())
    return row


def draw(rows: dict[str, dict[str, Any]], names: tuple[str, ...]) -> None:
    """Parameters against bits per byte."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for place, name in enumerate(names):
        points = sorted((row["parameters"] / 1e6, row["bits"][place]) for row in rows.values())
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("million parameters")
    axes.set_ylabel("bits per byte")
    axes.legend(frameon=False)
    figure.savefig(OUTPUT / "vocabulary.svg")
    say(f"Drawn: {OUTPUT / 'vocabulary.svg'}")


def aim(target: str, tokens: int, whole: Path, text: str, measured: Any) -> dict[str, dict[str, Any]]:
    """Rows of a target of widths alone, and of one that may take from the vocabulary."""
    rows = {}
    for vocabulary in ("keep", "auto"):
        folder = OUTPUT / f"{target}-{vocabulary}"
        options = ("--calibration", text, "--calibration-tokens", str(tokens), "--vocab", vocabulary)
        if not folder.exists():
            llmprune("prune", whole, "--target-params", target, *options, "--output", folder)
        rows[f"{target}, --vocab {vocabulary}"] = kept(f"{folder.name}-row", partial(measured, folder))
    return rows


def main() -> int:
    """Measure, print, draw and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="vocabularies that are tried")
    parser.add_argument("--windows", type=int, default=12, help="of 1,024 tokens that each text is measured on")
    parser.add_argument("--recover", help="tokens to heal each model with, such as 65k")
    parser.add_argument(
        "--target", help="size of the model that is reached with and without fewer tokens, such as 60%%"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate that on")
    parser.add_argument("--model", type=Path, help="the whole model (default: SmolLM2 from its wheel)")
    asked = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    whole = asked.model or OUTPUT / "whole"
    if not whole.exists():
        make_whole(whole)
    read, held_out = halves_of_the_documentation()
    texts, names = ("wikitext2", str(held_out)), ("WikiText-2", "Python's documentation")
    text = f"wikitext2:0.8,{read}:0.2"
    rows = {"whole": kept("whole-row", lambda: measure(whole, whole, texts, asked.windows))}
    for size in asked.sizes:
        folder = OUTPUT / f"{size}"
        if not folder.exists():
            llmprune("prune", whole, "--vocab-size", str(size), "--vocab-text", text, "--output", folder)
        rows[f"{size:,}"] = kept(f"{size}-row", lambda folder=folder: measure(folder, whole, texts, asked.windows))
        if asked.recover:
            healed = OUTPUT / f"{size}-healed-{asked.recover}"
            if not healed.exists():
                llmprune("recover", folder, "--text", text, "--tokens", asked.recover, "--output", healed)
            rows[f"{size:,}, healed"] = kept(
                f"{healed.name}-row", lambda healed=healed: measure(healed, whole, texts, asked.windows)
            )
    first, table, bounds = rows["whole"], [], []
    if asked.target:
        aimed = aim(asked.target, asked.tokens, whole, text, lambda own: measure(own, whole, texts, asked.windows))
        rows |= aimed
        without, fewer = (row["bits"] for row in aimed.values())
        for name, old, new in zip(names, without, fewer, strict=True):
            bounds.append(
                Bound(f"{asked.target}, {name}: bits per byte with --vocab auto over those without", new / old, 1)
            )
    for name, row in rows.items():
        growth = [bits / base - 1 for bits, base in zip(row["bits"], first["bits"], strict=True)]
        cells = [f"{bits:.3f} ({grown:+.1%})" for bits, grown in zip(row["bits"], growth, strict=True)]
        count = f"{row['parameters'] / 1e6:.1f}M ({row['parameters'] / first['parameters'] - 1:+.1%})"
        table.append([name, count, *cells, f"{row['tokens'][0]:.3f}", f"{row['speed']:,.0f}"])
        for read_in, grown, worst in zip(names, growth, WORST.get(name, ()), strict=False):
            bounds.append(Bound(f"{name}: bits per byte of {read_in} over the whole model's", 1 + grown, 1 + worst))
    print_table("Fewer tokens", ["tokens", "parameters", *names, "tokens/byte", "tokens/s"], table)
    draw(rows, names)
    print_bounds(bounds)
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
