#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: a Llama whose configuration says `pad_token_id: -1`, as early ones do for "none".
#
# Bet: no token is special to the embedding, as with `null`.
# Seen: torch counts from the end, so that the last token of the vocabulary is the padding token. It starts as zeros, and no
# training moves its row; after a cut of the vocabulary it is another token. A warning says that the number is not within the
# vocabulary and that this "may result in unexpected behavior", not which.
#
#   pad_token_id None: padding_idx None, gradient of the last token: yes
#   pad_token_id -1: padding_idx 95, gradient of the last token: no
#   after resize_token_embeddings(64): gradient of the last token: no
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def gradient(model):
    last = model.config.vocab_size - 1
    text = torch.tensor([[5, last, 7, last, 9]])
    model(text, labels=text).loss.backward()
    return "yes" if model.get_input_embeddings().weight.grad[last].any() else "no"

sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=96, num_hidden_layers=2)
for number in (None, -1):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=number))
    print(f"pad_token_id {number}: padding_idx {model.get_input_embeddings().padding_idx}, gradient of the last token: {gradient(model)}")
model.resize_token_embeddings(64)
model.save_pretrained("smaller")
print("after resize_token_embeddings(64): gradient of the last token:", gradient(LlamaForCausalLM.from_pretrained("smaller")))
END
cat seen.txt
diff seen.txt - <<'END'
pad_token_id None: padding_idx None, gradient of the last token: yes
pad_token_id -1: padding_idx 95, gradient of the last token: no
after resize_token_embeddings(64): gradient of the last token: no
END
