#!/usr/bin/env bash
# mlx-lm 0.32.2: families with a sliding window, here of 8 tokens, on 30 tokens, beside transformers 5.23.0.
#
# Bet: it has the windows of the families that it has, as it has Gemma 3's.
# Seen: every layer of Mistral, Mixtral, Phi-3 and Gemma 2 sees all of the text, without a word: from the token on that is
# first outside the window, the numbers are others. The same weights without a window are what it computes.
#
#   mistral: first other logits at token 8, without a window: equal
#   mixtral: first other logits at token 8, without a window: equal
#   phi3: first other logits at token 8, without a window: equal
#   gemma2: first other logits at token 8, without a window: equal
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
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, num_hidden_layers=2,
             max_position_embeddings=256, original_max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
for kind in ("mistral", "mixtral", "phi3", "gemma2"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, head_dim=16, sliding_window=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(kind)
    file = Path(kind, "config.json")
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "rope_theta": config.rope_parameters["rope_theta"]}))
    found = torch.tensor(np.array(load_model(Path(kind))[0](mx.array([text])).astype(mx.float32)))[0]
    gaps = {}
    for window in (8, 256):
        model = AutoModelForCausalLM.from_pretrained(kind, sliding_window=window).eval()
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0]
        gaps[window] = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().amax(-1)
    first = int((gaps[8] > 1e-2).nonzero()[0]) if (gaps[8] > 1e-2).any() else None
    print(f"SEEN {kind}: first other logits at token {first}, without a window: {'equal' if gaps[256].max() < 2e-3 else 'differs'}")
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
mistral: first other logits at token 8, without a window: equal
mixtral: first other logits at token 8, without a window: equal
phi3: first other logits at token 8, without a window: equal
gemma2: first other logits at token 8, without a window: equal
END
