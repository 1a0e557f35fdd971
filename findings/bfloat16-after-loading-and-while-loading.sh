#!/usr/bin/env bash
# transformers 5.23.0: a Llama turned to bfloat16 with `model.to(torch.bfloat16)`, and the same saved and loaded again.
#
# Bet: the weights are the same, and so are the logits.
# Seen: `.to` rounds the rotary frequencies too, which no file has and which stay in float32 when a model is loaded in bfloat16.
# What that changes grows with the position: what one measures before saving is the quality of another model, and a worse one.
#
#   rotary frequencies: torch.bfloat16 after .to, torch.float32 after loading
#   all weights the same: True
#   KL divergence from float32 over 2,048 tokens, more than 10 times larger after .to: True
#   over the first 16 tokens: False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
turned = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096)).eval().to(torch.bfloat16)
turned.save_pretrained("saved")
loaded = AutoModelForCausalLM.from_pretrained("saved", dtype=torch.bfloat16).eval()
kinds = [model.model.rotary_emb.inv_freq.dtype for model in (turned, loaded)]
print(f"rotary frequencies: {kinds[0]} after .to, {kinds[1]} after loading")
print("all weights the same:", all(torch.equal(a, b) for a, b in zip(turned.parameters(), loaded.parameters(), strict=True)))
text = torch.randint(96, (1, 2048))
with torch.no_grad():
    in_float32 = AutoModelForCausalLM.from_pretrained("saved", dtype=torch.float32).eval()(text).logits[0].log_softmax(-1)
    gaps = []
    for model in (turned, loaded):
        logs = model(text).logits[0].float().log_softmax(-1)
        gaps.append((in_float32.exp() * (in_float32 - logs)).sum(-1))
for said, tokens in (("KL divergence from float32 over 2,048 tokens, more than 10 times larger after .to", 2048), ("over the first 16 tokens", 16)):
    print(f"{said}:", bool(gaps[0][:tokens].mean() > 10 * gaps[1][:tokens].mean()))
END
cat seen.txt
diff seen.txt - <<'END'
rotary frequencies: torch.bfloat16 after .to, torch.float32 after loading
all weights the same: True
KL divergence from float32 over 2,048 tokens, more than 10 times larger after .to: True
over the first 16 tokens: False
END
