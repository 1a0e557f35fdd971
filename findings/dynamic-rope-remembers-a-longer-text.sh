#!/usr/bin/env bash
# transformers 5.23.0: a Llama with dynamic NTK scaling (`rope_type: dynamic`) made for 32 tokens, in `eval()`, without a cache.
#
# Bet: the loss of a text depends on the text. The base grows with its length, so that only texts over 32 tokens are turned
# otherwise, and each by its own length.
# Seen: the model keeps the base of the longest text that it has read, and goes back only at one that fits into 32 tokens. A
# text of 48 has another loss after one of 96 than before it, with the same call: what is measured depends on the order of the
# texts. And text made with a cache holds keys of several bases: greedy generation gives other tokens with it than without it.
#
#   48 tokens: again after 16 the same True, after 96 the same False, after 96 and 16 the same True
#   losses of 48 and 96 tokens read in one order and in the other, the same: False
#   the same from a base that grows no more (`linear`): True
#   generated with a cache as without one: dynamic False, linear True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0
cd "$place"
export HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def build(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
    rope = dict(rope_type=kind, factor=4.0, rope_theta=10000.0)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, rope_parameters=rope)).eval()

def loss(model, length):
    with torch.no_grad():
        return float(model(texts[length], labels=texts[length], use_cache=False).loss)

def generated(model, cache):
    loss(model, 16)
    return model.generate(texts[28], max_new_tokens=24, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0).tolist()

def order(kind):
    one, other = build(kind), build(kind)
    first = {length: loss(one, length) for length in (48, 96)}
    second = {length: loss(other, length) for length in (96, 48)}
    return all(abs(first[length] - second[length]) < 1e-5 for length in first)

texts = {length: torch.randint(96, (1, length), generator=torch.Generator().manual_seed(length)) for length in (16, 28, 48, 96)}
model = build("dynamic")
alone, same = loss(model, 48), []
for before in ((16,), (96,), (96, 16)):
    for length in before:
        loss(model, length)
    same.append(abs(loss(model, 48) - alone) < 1e-5)
print(f"48 tokens: again after 16 the same {same[0]}, after 96 the same {same[1]}, after 96 and 16 the same {same[2]}")
print("losses of 48 and 96 tokens read in one order and in the other, the same:", order("dynamic"))
print("the same from a base that grows no more (`linear`):", order("linear"))
results = [generated(build(kind), True) == generated(build(kind), False) for kind in ("dynamic", "linear")]
print(f"generated with a cache as without one: dynamic {results[0]}, linear {results[1]}")
END
cat seen.txt
diff seen.txt - <<'END'
48 tokens: again after 16 the same True, after 96 the same False, after 96 and 16 the same True
losses of 48 and 96 tokens read in one order and in the other, the same: False
the same from a base that grows no more (`linear`): True
generated with a cache as without one: dynamic False, linear True
END
