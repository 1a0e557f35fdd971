#!/usr/bin/env bash
# optipfair 0.4.2: depth pruning of SmolLM3, one of whose layers in four has no rotary embedding, saved and read back.
#
# Bet: `no_rope_layers` is shortened as `layer_types` is, or the family is refused.
# Seen: `layer_types` is cut to the layers that stay, `no_rope_layers` is not. What was saved loads without a word, and other
# layers of it are without rotary embedding.
#
#   in memory: rotary [1, 0, 1, 1, 1, 0]
#   saved: 6 layer_types, no_rope_layers [1, 1, 1, 0, 1, 1, 1, 0]
#   read back: rotary [1, 1, 1, 0, 1, 1]
#   the same logits: False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$place/packages" optipfair==0.4.2
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import json
import torch
from optipfair import prune_model
from transformers import AutoModelForCausalLM, SmolLM3Config, SmolLM3ForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
model = SmolLM3ForCausalLM(SmolLM3Config(**sizes, **tokens, num_hidden_layers=8, initializer_range=0.2)).eval()
def rotary(model):
    return [int(layer.self_attn.use_rope) for layer in model.model.layers]
pruned = prune_model(model, pruning_type="DEPTH", layer_indices=[1, 2], show_progress=False).eval()
print("in memory: rotary", rotary(pruned))
pruned.save_pretrained("pruned")
saved = json.load(open("pruned/config.json"))
print(f"saved: {len(saved['layer_types'])} layer_types, no_rope_layers {saved['no_rope_layers']}")
read = AutoModelForCausalLM.from_pretrained("pruned").eval()
print("read back: rotary", rotary(read))
text = torch.arange(40)[None]
with torch.no_grad():
    print("the same logits:", torch.allclose(read(text).logits, pruned(text).logits, atol=1e-3))
END
cat seen.txt
diff seen.txt - <<'END'
in memory: rotary [1, 0, 1, 1, 1, 0]
saved: 6 layer_types, no_rope_layers [1, 1, 1, 0, 1, 1, 1, 0]
read back: rotary [1, 1, 1, 0, 1, 1]
the same logits: False
END
