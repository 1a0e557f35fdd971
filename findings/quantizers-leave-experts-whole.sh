#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2, torchao 0.18.0 and optimum-quanto 0.2.7: a Qwen3-MoE quantized as it is loaded.
#
# Bet: experts are quantized, as they were when each was three Linear layers, or it is said that they are not.
# Seen: experts are stacked parameters now, not Linear layers, and stay in bfloat16 in all four, without a word; of a real model
# of this kind they are nine tenths of the parameters and more. Attention alone shrinks.
#
#   before: experts are 92% of the bytes
#   bitsandbytes, 4 bits: attention quantized, experts whole, size 96%
#   bitsandbytes, 8 bits: attention quantized, experts whole, size 97%
#   torchao, 8 bits: attention quantized, experts whole, size 97%
#   quanto, 4 bits: attention quantized, experts whole, size 96%
#   lines of the log about experts: 0
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
python3 -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --target "$place/packages" \
    torchao==0.18.0 optimum-quanto==0.2.7
cd "$place"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=warning
PYTHONPATH=packages python3 - > log.txt 2> warnings.txt <<'END'
import sys
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM, TorchAoConfig
sizes = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=96, num_hidden_layers=2)
moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128))
moe.to(torch.bfloat16).save_pretrained("moe")
def size(model):  # of what is stored, in bytes
    parts = (part for tensor in model.state_dict().values() for part in stored(tensor))
    return sum(part.numel() * part.element_size() for part in parts)
def stored(tensor):
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]
before = size(moe)
experts = sum(2 * parameter.numel() for name, parameter in moe.named_parameters() if ".experts." in name)
print(f"SEEN before: experts are {experts / before:.0%} of the bytes")
for name, wanted in {
    "bitsandbytes, 4 bits": BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes, 8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "torchao, 8 bits": TorchAoConfig(Int8WeightOnlyConfig()), "quanto, 4 bits": QuantoConfig(weights="int4")}.items():
    model = AutoModelForCausalLM.from_pretrained("moe", quantization_config=wanted)
    layer = model.model.layers[0]
    whole = all(type(p) is torch.nn.Parameter and p.dtype == torch.bfloat16 for p in layer.mlp.experts.parameters())
    smaller = sum(part.numel() * part.element_size() for part in stored(layer.self_attn.q_proj.weight)) <= 0.6 * 2 * 128 * 128
    print(f"SEEN {name}: attention {'quantized' if smaller else 'whole'}, experts {'whole' if whole else 'quantized'}, size {size(model) / before:.0%}")
END
sed -n 's/^SEEN //p' log.txt > seen.txt
grep -ci expert warnings.txt | sed 's/^/lines of the log about experts: /' >> seen.txt || true
cat seen.txt
diff seen.txt - <<'END'
before: experts are 92% of the bytes
bitsandbytes, 4 bits: attention quantized, experts whole, size 96%
bitsandbytes, 8 bits: attention quantized, experts whole, size 97%
torchao, 8 bits: attention quantized, experts whole, size 97%
quanto, 4 bits: attention quantized, experts whole, size 96%
lines of the log about experts: 0
END
