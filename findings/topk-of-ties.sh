#!/usr/bin/env bash
# torch 2.13.0: `torch.topk(scores, k, largest=False)` on a CPU, for scores of which some are the same, as in bfloat16 they are.
#
# Bet: of equal scores the first are taken, so that what goes at 3 of 100 also goes at 10 of 100.
# Seen: which of them are taken depends on k. A unit that is removed at a small ratio is kept at a larger one; `argsort` with
# `stable=True` takes the first ones always.
#
#   100 equal scores: 1 is not within 2
#   4,096 rows in bfloat16, fewer than 300 scores differ: True
#   every choice within the next larger one: topk False, stable argsort True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" torch==2.13.0
cd "$place"
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import torch
torch.manual_seed(0)

def by_topk(scores, count):
    return set(torch.topk(scores, count, largest=False).indices.tolist())

def by_order(scores, count):
    return set(scores.argsort(stable=True)[:count].tolist())

equal = torch.zeros(100)
print("100 equal scores: 1 is", "within 2" if by_topk(equal, 1) <= by_topk(equal, 2) else "not within 2")
rows = torch.randn(4096, 64).to(torch.bfloat16)
scores = rows.abs().pow(2).sum(1)
print("4,096 rows in bfloat16, fewer than 300 scores differ:", len(scores.unique()) < 300)
within = {way: all(way(scores, count) <= way(scores, count + 1) for count in range(1, 4096)) for way in (by_topk, by_order)}
print(f"every choice within the next larger one: topk {within[by_topk]}, stable argsort {within[by_order]}")
END
cat seen.txt
diff seen.txt - <<'END'
100 equal scores: 1 is not within 2
4,096 rows in bfloat16, fewer than 300 scores differ: True
every choice within the next larger one: topk False, stable argsort True
END
