#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0, torch-pruning 1.6.1: counting the operations of a Llama and of a Qwen3-MoE on a CPU.
#
# Bet: `FlopCounterMode` counts attention and experts, however they are computed.
# Seen: it counts none of attention as `sdpa` on a CPU, and no expert as transformers computes them by default (grouped_mm), so
# that taking experts away changes no figure. torch-pruning counts no expert either, as they are no modules.
#
#   Llama, eager: attention counted
#   Llama, sdpa: attention not counted
#   experts in use: 16, batched_mm: counted
#   experts in use: 16, as by default: not counted
#   experts in use: 16, torch-pruning: not counted
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 torch-pruning==1.6.1
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import torch
import torch_pruning
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
hidden, width, layers, length = 64, 64, 2, 64
sizes = dict(hidden_size=hidden, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96, num_hidden_layers=layers)
text = torch.arange(length)[None]

def operations(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(text, use_cache=False)
    return counter.get_total_flops()

def said(counted, without, of_part):
    return {without + of_part: "counted", without: "not counted"}.get(counted, f"{counted} of {without} + {of_part}")

matrices = 2 * length * (layers * (2 * hidden * width + 2 * hidden * width // 2 + 3 * hidden * 96) + hidden * 96)
attention = layers * 2 * 2 * length * length * width
for kind in ("eager", "sdpa"):
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    llama.set_attn_implementation(kind)
    print(f"Llama, {kind}: attention", said(operations(llama), matrices, attention))
moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=32, num_experts_per_tok=16, moe_intermediate_size=32)).eval()
dense = 2 * length * (layers * (3 * hidden * width + hidden * 32) + hidden * 96)  # the projections, the router, the output
experts = 2 * length * layers * 16 * 3 * hidden * 32
default = operations(moe)
moe.set_experts_implementation("batched_mm")
print("experts in use: 16, batched_mm:", said(operations(moe), dense, experts))
print("experts in use: 16, as by default:", said(default, dense, experts))
macs = torch_pruning.utils.count_ops_and_params(moe, text)[0]
print("experts in use: 16, torch-pruning:", "not counted" if 2 * macs < dense + experts / 2 else "counted")
END
cat seen.txt
diff seen.txt - <<'END'
Llama, eager: attention counted
Llama, sdpa: attention not counted
experts in use: 16, batched_mm: counted
experts in use: 16, as by default: not counted
experts in use: 16, torch-pruning: not counted
END
