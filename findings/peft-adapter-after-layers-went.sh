#!/usr/bin/env bash
# peft 0.21.2: a LoRA adapter of a model with four layers, put on that model after its second layer was dropped.
#
# Bet: it is refused, or a warning says that one layer of the adapter has no place.
# Seen: `PeftModel.from_pretrained` says nothing. The adapter of layer 3 is left out, and layers 1 and 2, which were 2 and 3,
# get the adapters of the layers before them. (The `load_adapter` of transformers reports the layer that has no place.)
#
#   layers of the adapter: [0, 1, 2, 3]
#   warnings: 0
#   layer 2, which was layer 3, has the adapter of layer 2
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import logging
import warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=96)
whole = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
get_peft_model(whole, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained("adapter")
stored = load_file("adapter/adapter_model.safetensors")
print("layers of the adapter:", sorted({int(name.split("layers.")[1].split(".")[0]) for name in stored}))

class Counted(logging.Handler):
    records = []
    def emit(self, record):
        self.records.append(record)

shallow = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))  # as layers 0, 2 and 3 of the whole one
logging.getLogger().addHandler(Counted(logging.WARNING))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(shallow, "adapter")
of_adapter = [warning for warning in caught if "adapter" in str(warning.message)]
print("warnings:", len(of_adapter) + len(Counted.records))
found = loaded.base_model.model.model.layers[2].self_attn.q_proj.lora_A["default"].weight
for layer in range(4):
    if torch.equal(found, stored[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"]):
        print("layer 2, which was layer 3, has the adapter of layer", layer)
END
cat seen.txt
diff seen.txt - <<'END'
layers of the adapter: [0, 1, 2, 3]
warnings: 0
layer 2, which was layer 3, has the adapter of layer 2
END
