"""GGUF files in mixes of blocks, beside those that llama.cpp's own quantizer makes of the same model.

`make bench-quantized` runs it. SmolLM2-135M in bf16 is exported in every mix and run by llama.cpp (`--verify`); its
bf16 file goes through `llama_model_quantize`, which the cyllama package brings, in an environment of its own. The two
files are compared tensor by tensor, and by the divergence from the model in bf16 that `llmprune eval` measures on text.
Two mixes are written with `--imatrix` as well. Exit status 1 means that a file differs in kinds or size, or diverges by
over a twentieth more than llama.cpp's own, or that an importance matrix makes it diverge more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.exports import llmprune, make_whole
from tools.bench.prune_1b import Bound, print_bounds, print_table, say

MIXES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_m")
WEIGHTED = ("q4_k_m", "q3_k_m")  # that are written with an importance matrix as well
MOST_RATIO = 1.05  # of the divergences
QUANTIZE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
params = LlamaModelQuantizeParams()
params.ftype = int(sys.argv[3])
sys.exit(model_quantize(sys.argv[1], sys.argv[2], params))
"""


@dataclass(frozen=True)
class Pair:
    """One mix, written by llmprune and by llama.cpp."""

    mix: str
    ours: Path
    theirs: Path
    verified: float  # KL(transformers in float32 ‖ llama.cpp) of the next token, nats
    seconds: float  # that the export took, verification aside
    tensors: int
    alike: int  # tensors of the same kind
    equal: int  # tensors that are the same bit for bit

    @property
    def sizes(self) -> list[int]:
        """Bytes of the two files."""
        return [path.stat().st_size for path in (self.ours, self.theirs)]

    def row(self, own: float, other: float) -> list[str]:
        """Its line in the table."""
        sizes = [f"{size / 1e6:.1f}" for size in self.sizes]
        figures = [f"{own:.4f}", f"{other:.4f}", f"{self.verified:.4f}", f"{self.equal} of {self.tensors}"]
        return [self.mix, *sizes, *figures, f"{self.seconds:.0f}"]

    def bounds(self, kl: dict[Path, float]) -> list[Bound]:
        """What must hold of it."""
        own, (ours, theirs) = kl[self.ours], self.sizes
        return [
            Bound(f"{self.mix}: KL / KL of llama.cpp's own file", own / kl.get(self.theirs, own), MOST_RATIO),
            Bound(f"{self.mix}: tensors of another kind", self.tensors - self.alike, 0),
            Bound(f"{self.mix}: difference in size, per mille", 1000 * abs(ours / theirs - 1), 1),
        ]


def make_pair(mix: str, whole: Path, work: Path, python: str) -> Pair:
    """Write a mix in both ways."""
    say(f"Exporting SmolLM2 in {mix} …")
    words = ("export", whole, "--format", "gguf", "--dtype", mix)
    started = time.perf_counter()
    llmprune(*words, "--no-verify", "--output", work / mix)
    seconds = time.perf_counter() - started
    document = llmprune(*words, "--verify", "--output", work / mix, "--overwrite")
    ours = work / mix / f"model-{mix}.gguf"
    theirs = quantize(python, work / "bf16" / "model-bf16.gguf", work / f"theirs-{mix}.gguf", mix)
    say(f"  {kinds_of(ours)}")
    return Pair(mix, ours, theirs, document["verification"]["kl"], seconds, *same_tensors(ours, theirs))


def weigh(mix: str, whole: Path, work: Path) -> Path:
    """Write a mix with what the validation split of WikiText-2 says of each input's importance."""
    say(f"Exporting SmolLM2 in {mix} by importance …")
    words = ("--format", "gguf", "--dtype", mix, "--imatrix", "wikitext2", "--no-verify")
    llmprune("export", whole, *words, "--output", work / f"weighted-{mix}")
    return work / f"weighted-{mix}" / f"model-{mix}.gguf"


def quantize(python: str, source: Path, target: Path, mix: str) -> Path:
    """Let llama.cpp make its file.

    Raises:
        SystemExit: it failed.
    """
    from gguf import LlamaFileType

    number = str(int(LlamaFileType[f"MOSTLY_{mix.upper()}"]))
    done = subprocess.run([python, "-c", QUANTIZE, source, target, number], capture_output=True, text=True)
    if not target.is_file():
        sys.exit(f"llama.cpp did not quantize {source} as {mix}: {(done.stderr or done.stdout)[-2000:]}")
    return target


def same_tensors(ours: Path, theirs: Path) -> tuple[int, int, int]:
    """How many tensors there are, are of the same kind, and the same bit for bit."""
    from gguf import GGUFReader

    sides = [{tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (ours, theirs)]
    if sides[0].keys() != sides[1].keys():
        return len(sides[1]), 0, 0
    pairs = [(tensor, sides[1][name]) for name, tensor in sides[0].items()]
    alike = [(one, other) for one, other in pairs if one.tensor_type == other.tensor_type]
    return len(pairs), len(alike), sum(one.data.tobytes() == other.data.tobytes() for one, other in alike)


def divergences(whole: Path, files: list[Path], text: list[str]) -> dict[Path, float]:
    """Mean KL(whole ‖ file) of the next token, nats."""
    found: dict[str, Any] = llmprune("eval", whole, *files, "--dtype", "float32", *text)
    return {path: float(result["kl"]) for path, result in zip(files, found["results"][1:], strict=True)}


def kinds_of(path: Path) -> str:
    """The matrices of a file, counted by kind."""
    from gguf import GGUFReader

    counted = Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{number} {kind}" for kind, number in counted.most_common())


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cyllama", help="a Python that has cyllama")
    parser.add_argument("--windows", default="8", help="of 512 tokens that are evaluated")
    parser.add_argument("--mixes", default=",".join(MIXES))
    asked = parser.parse_args()
    text = ["--dataset", "wikitext2", "--max-seq-len", "512", "--limit", asked.windows]
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as name:
        work = Path(name)
        whole = make_whole(work / "whole")
        llmprune("export", whole, "--format", "gguf", "--dtype", "bf16", "--no-verify", "--output", work / "bf16")
        pairs = [make_pair(mix, whole, work, asked.cyllama) for mix in asked.mixes.split(",")]
        ours = [pair.ours for pair in pairs]
        other = [pair.theirs for pair in pairs if pair.equal < pair.tensors]  # the same bytes diverge as far
        weighted = {pair.mix: weigh(pair.mix, whole, work) for pair in pairs if pair.mix in WEIGHTED}
        kl = divergences(whole, [*ours, *other, *weighted.values()], text)
        rows = [pair.row(kl[pair.ours], kl.get(pair.theirs, kl[pair.ours])) for pair in pairs]
        bounds = [bound for pair in pairs for bound in pair.bounds(kl)]
        for pair in pairs:
            if pair.mix in weighted:
                own, plain = kl[weighted[pair.mix]], kl[pair.ours]
                rows.append([f"{pair.mix} --imatrix", "", "", f"{own:.4f}", "", "", "", ""])
                bounds.append(Bound(f"{pair.mix}: KL with --imatrix / KL without", own / plain, 1))
    header = ["mix", "MB", "MB of llama.cpp's", "KL", "KL of llama.cpp's", "KL in llama.cpp", "same tensors", "s"]
    print_table("SmolLM2-135M, divergence from bf16 in nats per token", header, rows)
    print_bounds(bounds)
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
