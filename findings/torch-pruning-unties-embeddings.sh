#!/usr/bin/env bash
# torch-pruning 1.6.1: a quarter of the hidden size of a Llama with tied embeddings is pruned, as a group that holds all that
# depends on it.
#
# Bet: the embeddings are one matrix before and after, and a quarter of its parameters goes.
# Seen: the group has both uses of the matrix, and each is given a new one. The model has more parameters than before, its
# configuration still says tied, and the first step of training makes the two differ. `tie_weights()` ties them again.
#
#   before: 127,296 parameters, tied True
#   pruned: 144,624 parameters, tied False, the same numbers True, configuration says tied True
#   after one step of training: the same numbers False
#   with tie_weights() instead: 95,472 parameters, tied True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0
python3 -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --target "$place/packages" torch-pruning==1.6.1
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import copy
import torch
import torch_pruning
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False))
text = torch.arange(8)[None]

def parameters(model):
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, tied {tied}"

def same(model):
    return f"the same numbers {torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)}"

print("before:", parameters(model))
graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=text)
group = graph.get_pruning_group(model.model.embed_tokens, torch_pruning.prune_embedding_out_channels, idxs=list(range(0, 64, 4)))
assert graph.check_pruning_group(group)
group.prune()
print(f"pruned: {parameters(model)}, {same(model)}, configuration says tied {model.config.tie_word_embeddings}")
again = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(text, labels=text).loss.backward()
optimizer.step()
print("after one step of training:", same(model))
again.tie_weights()
print("with tie_weights() instead:", parameters(again))
END
cat seen.txt
diff seen.txt - <<'END'
before: 127,296 parameters, tied True
pruned: 144,624 parameters, tied False, the same numbers True, configuration says tied True
after one step of training: the same numbers False
with tie_weights() instead: 95,472 parameters, tied True
END
