#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: `Perplexity` of a text's logits in float32 and in the 16 bits that models answer in.
#
# Bet: exp of torch's `cross_entropy` of the same logits to a few per mille; 16 bits cost what rounding the logits costs, which
# here is nothing, as `cross_entropy` shows.
# Seen: torchmetrics takes the softmax in the dtype of the logits, its logarithm after that, and sums a batch in the same dtype. In
# float16 a token less likely than 3e-8 has a probability of 0, and one of them among 512 makes the perplexity infinite. In float32
# that takes a token 104 nats off, which damaged models reach. In bfloat16 the sum over a batch has three digits, so that texts of
# different perplexity have the same one.
#
#   worst token 10 nats: cross_entropy 12.3, float32 the same, float16 the same, bfloat16 12.37
#   worst token 14 nats: cross_entropy 12.4, float32 the same, float16 the same, bfloat16 12.37
#   worst token 20 nats: cross_entropy 12.5, float32 the same, float16 infinite, bfloat16 12.57
#   worst token 110 nats: cross_entropy 14.9, float32 infinite, float16 infinite, bfloat16 infinite
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 torchmetrics==1.9.0
cd "$place"
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import torch
from torchmetrics.text import Perplexity

def text(worst):
    # 511 tokens that cost about as much as in a real text, and one that costs `worst` nats
    logits = torch.zeros(1, 512, 1000)
    tokens = torch.arange(512)[None]
    logits[0, torch.arange(512), tokens[0]] = 4.5
    logits[0, 0] = -30.0
    logits[0, 0, 900], logits[0, 0, 0] = 50.0, 50.0 - worst
    return logits, tokens

def shown(got, want):
    if got == float("inf"):
        return "infinite"
    return "the same" if abs(got / want - 1) < 3e-3 else f"{got:.2f}"

for worst in (10, 14, 20, 110):
    logits, tokens = text(worst)
    want = float(torch.nn.functional.cross_entropy(logits[0], tokens[0]).exp())
    line = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = logits.to(dtype)
        assert float(torch.nn.functional.cross_entropy(given.float()[0], tokens[0]).exp()) == want  # these numbers are exact in 16 bits
        metric = Perplexity()
        metric.update(given, tokens)
        got = float(metric.compute())
        word = f"{got:.2f}" if dtype == torch.bfloat16 and got < 1e9 else shown(got, want)
        line.append(f"{str(dtype).removeprefix('torch.')} {word}")
    print(f"worst token {worst} nats: cross_entropy {want:.1f}, {', '.join(line)}")
END
cat seen.txt
diff seen.txt - <<'END'
worst token 10 nats: cross_entropy 12.3, float32 the same, float16 the same, bfloat16 12.37
worst token 14 nats: cross_entropy 12.4, float32 the same, float16 the same, bfloat16 12.37
worst token 20 nats: cross_entropy 12.5, float32 the same, float16 infinite, bfloat16 12.57
worst token 110 nats: cross_entropy 14.9, float32 infinite, float16 infinite, bfloat16 infinite
END
