#!/usr/bin/env bash
# KerasHub 0.32.0 (Keras 3.15.1 on torch): folders that transformers 5.23.0 saves, read with `Backbone.from_preset`.
#
# Bet: it reads a configuration as transformers does, or refuses what it does not know.
# Seen: Llama 3.1's scaling is lost, as it is looked for in `rope_scaling` while the base is found in `rope_parameters`. A kind
# of layers that does not alternate, as after layers were dropped, is lost as well: Gemma 2's `layer_types` are not read, and
# Qwen3's sliding layers get no window. Not a word of it.
#
#   llama: equal
#   llama, scaled: differs
#   llama, scaled, rope_scaling beside it: equal
#   gemma2, layers alternating: equal
#   gemma2, one layer sliding, two full: differs
#   qwen3, window in the last layers: differs
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 keras==3.15.1 kagglehub==1.0.3 absl-py sentencepiece
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$place/packages" keras-hub==0.32.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1 KERAS_BACKEND=torch
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import json
from pathlib import Path
import keras_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM
text = torch.tensor([[3 + 7 * n % 90 for n in range(30)]])
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, num_hidden_layers=3, rms_norm_eps=1e-6,
             max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
scaled = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

def save(kind, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
    model.save_pretrained(kind)
    with torch.no_grad():
        return model.model(text).last_hidden_state

def compare(kind, expected):
    backbone = keras_hub.models.Backbone.from_preset(f"./{kind}", dtype="float32")
    found = backbone({"token_ids": text, "padding_mask": torch.ones_like(text, dtype=torch.bool)}).detach()
    gap = float((found - expected).abs().max())
    return "equal" if gap < 1e-3 else "differs" if gap > 0.1 else f"gap {gap}"

print("SEEN llama:", compare("llama", save("llama")))
expected = save("llama", rope_parameters=scaled)
print("SEEN llama, scaled:", compare("llama", expected))
file = Path("llama/config.json")
file.write_text(json.dumps({**json.loads(file.read_text()), "rope_scaling": scaled}))
print("SEEN llama, scaled, rope_scaling beside it:", compare("llama", expected))
kinds = ["sliding_attention", "full_attention", "full_attention"]
gemma = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=8, attn_logit_softcapping=None)
print("SEEN gemma2, layers alternating:", compare("gemma2", save("gemma2", **gemma)))
print("SEEN gemma2, one layer sliding, two full:", compare("gemma2", save("gemma2", **gemma, layer_types=kinds)))
print("SEEN qwen3, window in the last layers:", compare("qwen3", save("qwen3", head_dim=16, sliding_window=8, use_sliding_window=True, max_window_layers=1)))
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
llama: equal
llama, scaled: differs
llama, scaled, rope_scaling beside it: equal
gemma2, layers alternating: equal
gemma2, one layer sliding, two full: differs
qwen3, window in the last layers: differs
END
