#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0: `load_state_dict(..., assign=True)`, which fills a model without a second copy of its
# weights, on a Llama whose embeddings are tied.
#
# Bet: they stay tied, as what is loaded was tied.
# Seen: the state names the matrix twice, and each name gets a Parameter of its own over the same memory. The model counts the
# matrix twice, and AdamW takes a step for the embedding's gradient and another for the output's: in the first one, half of the
# numbers move twice as far as any other weight, and the other half not at all. What is saved is one matrix, so that nothing tells.
# `tie_weights()` after loading mends it.
#
#   tied: 76096 parameters, a step of 0.001 moves embeddings by up to 0.0010, 0% by nothing
#   assigned: 82240 parameters, a step of 0.001 moves embeddings by up to 0.0020, 50% by nothing
#   assigned, then tied: 76096 parameters, a step of 0.001 moves embeddings by up to 0.0010, 0% by nothing
#   the assigned one stores ['model.embed_tokens.weight']
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import copy
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
whole = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))

def step(model, label):
    embeddings = model.model.embed_tokens.weight
    before = embeddings.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0)
    tokens = torch.arange(96)[None]
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = (embeddings.detach() - before).abs()
    count = sum(parameter.numel() for parameter in model.parameters())
    still = (moved < 1e-4).float().mean()
    print(f"{label}: {count} parameters, a step of 0.001 moves embeddings by up to {moved.max():.4f}, {still:.0%} by nothing")
    return model

step(copy.deepcopy(whole), "tied")
assigned, tied = LlamaForCausalLM(whole.config), LlamaForCausalLM(whole.config)
assigned.load_state_dict(copy.deepcopy(whole).state_dict(), assign=True)
tied.load_state_dict(copy.deepcopy(whole).state_dict(), assign=True)
tied.tie_weights()
step(assigned, "assigned").save_pretrained("assigned")
step(tied, "assigned, then tied")
with safe_open("assigned/model.safetensors", "pt") as file:
    print("the assigned one stores", [name for name in file.keys() if "embed" in name or "head" in name])
END
cat seen.txt
diff seen.txt - <<'END'
tied: 76096 parameters, a step of 0.001 moves embeddings by up to 0.0010, 0% by nothing
assigned: 82240 parameters, a step of 0.001 moves embeddings by up to 0.0020, 50% by nothing
assigned, then tied: 76096 parameters, a step of 0.001 moves embeddings by up to 0.0010, 0% by nothing
the assigned one stores ['model.embed_tokens.weight']
END
