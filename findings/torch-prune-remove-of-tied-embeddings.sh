#!/usr/bin/env bash
# torch 2.13.0: `torch.nn.utils.prune` on the head of a Llama of transformers 5.23.0 that ties it to its embeddings.
#
# Bet: `prune.remove` "makes the pruning permanent" and changes no output, as it does in any other layer. Whether the embeddings
# lose the same weights is settled when the mask is put on.
# Seen: with the mask on, the head has zeros and the embeddings have none. `prune.remove` writes the masked weights into the
# parameter that both share: the embeddings lose theirs only then, and the model is another one than what was measured, without
# a word.
#
#   down_proj: remove changes the answer False
#   tied lm_head: with the mask, zeros in head 0.30, in embeddings 0.00; after remove 0.30 and 0.30, still tied True
#   tied lm_head: remove changes the answer True
#   untied lm_head: remove changes the answer False
#   warnings: 0
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import warnings
import torch
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
text = torch.arange(32)[None]

def zeros(model):
    head, embeddings = [float((part.weight == 0).float().mean()) for part in (model.lm_head, model.model.embed_tokens)]
    return head, embeddings

with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, tied in (("down_proj", True), ("tied lm_head", True), ("untied lm_head", False)):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
        layer = model.model.layers[0].mlp.down_proj if name == "down_proj" else model.lm_head
        prune.l1_unstructured(layer, "weight", 0.3)
        masked, before = model(text).logits, zeros(model)
        prune.remove(layer, "weight")
        if name == "tied lm_head":
            after, still = zeros(model), model.lm_head.weight is model.model.embed_tokens.weight
            print(f"{name}: with the mask, zeros in head {before[0]:.2f}, in embeddings {before[1]:.2f};", end=" ")
            print(f"after remove {after[0]:.2f} and {after[1]:.2f}, still tied {still}")
        changes = float((model(text).logits - masked).abs().max()) > 1e-3
        print(f"{name}: remove changes the answer {changes}")
print("warnings:", len(caught))
END
cat seen.txt
diff seen.txt - <<'END'
down_proj: remove changes the answer False
tied lm_head: with the mask, zeros in head 0.30, in embeddings 0.00; after remove 0.30 and 0.30, still tied True
tied lm_head: remove changes the answer True
untied lm_head: remove changes the answer False
warnings: 0
END
