#!/usr/bin/env bash
# mlx-lm 0.32.2: Llamas with Llama 3's rotary base (500,000) and with Llama 3.1's scaling, as transformers 5.23.0 saves them.
#
# Bet: mlx-lm reads `rope_parameters`, all that there is in such a `config.json`, or wants what it misses.
# Seen: Llama, Qwen2 and SmolLM3 turn with the base of 10,000 that stands in its code, without a word.
# With `rope_theta` and `rope_scaling` beside it all is well.
#
#   llama, base 500000: differs; with the older names: equal
#   llama, scaled: differs; with the older names: equal
#   qwen2, base 500000: differs; with the older names: equal
#   smollm3, base 500000: differs; with the older names: equal
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > log.txt <<'END'
import json
from pathlib import Path
import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM
mx.set_default_device(mx.cpu)
text = [3 + 7 * n % 90 for n in range(30)]
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, num_hidden_layers=4,
             max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
base = dict(rope_type="default", rope_theta=500000.0)
scaled = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

def compare(kind, expected):
    found = torch.tensor(np.array(load_model(Path(kind))[0](mx.array([text])).astype(mx.float32)))[0]
    gap = float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max())
    return "equal" if gap < 1e-3 else "differs" if gap > 0.05 else f"gap {gap}"

for kind, what, rope in (("llama", "base 500000", base), ("llama", "scaled", scaled), ("qwen2", "base 500000", base), ("smollm3", "base 500000", base)):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, rope_parameters=rope)).eval()
    model.save_pretrained(kind)
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0]
    seen = [compare(kind, expected)]
    file = Path(kind, "config.json")
    settings = json.loads(file.read_text())
    settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope is base else rope}
    file.write_text(json.dumps(settings))
    seen.append(compare(kind, expected))
    print(f"SEEN {kind}, {what}: {seen[0]}; with the older names: {seen[1]}")
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
llama, base 500000: differs; with the older names: equal
llama, scaled: differs; with the older names: equal
qwen2, base 500000: differs; with the older names: equal
smollm3, base 500000: differs; with the older names: equal
END
