#!/usr/bin/env bash
# accelerate 1.15.0: `Accelerator.save_model` of a Llama whose query, key and value matrices are slices of one fused matrix.
#
# Bet: slices that do not overlap are no shared weights, and all are written, as transformers' `save_pretrained` writes them.
# Seen: of the slices of one storage the first is written. The log says of the others "This should be OK"; read back, they are
# random.
#
#   save_pretrained: 0 matrices missing, the same logits: True
#   save_model: 4 matrices missing, the same logits: False
#   missing: model.layers.0.self_attn.k_proj
#   missing: model.layers.0.self_attn.v_proj
#   missing: model.layers.1.self_attn.k_proj
#   missing: model.layers.1.self_attn.v_proj
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
for layer in model.model.layers:
    queries, keys, values = (0.2 * torch.randn(3 * 64, 64)).split(64)
    layer.self_attn.q_proj.weight = torch.nn.Parameter(queries)
    layer.self_attn.k_proj.weight = torch.nn.Parameter(keys)
    layer.self_attn.v_proj.weight = torch.nn.Parameter(values)
text = torch.arange(40)[None]
model.save_pretrained("save_pretrained")
model.config.save_pretrained("save_model")
Accelerator().save_model(model, "save_model")
for way in ("save_pretrained", "save_model"):
    read, told = AutoModelForCausalLM.from_pretrained(way, output_loading_info=True)
    missing = sorted(told["missing_keys"])
    with torch.no_grad():
        same = torch.allclose(read.eval()(text).logits, model(text).logits, atol=1e-3)
    print(f"SEEN {way}: {len(missing)} matrices missing, the same logits: {same}")
    for name in missing:
        print("SEEN missing:", name.removesuffix(".weight"))
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
save_pretrained: 0 matrices missing, the same logits: True
save_model: 4 matrices missing, the same logits: False
missing: model.layers.0.self_attn.k_proj
missing: model.layers.0.self_attn.v_proj
missing: model.layers.1.self_attn.k_proj
missing: model.layers.1.self_attn.v_proj
END
