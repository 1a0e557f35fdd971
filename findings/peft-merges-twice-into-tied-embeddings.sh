#!/usr/bin/env bash
# peft 0.21.2: LoRA on the embedding and the output matrix of a model that ties them, with `ensure_weight_tying=True`, merged.
#
# Bet: the merged model computes what the model with the adapter does.
# Seen: the one matrix gets the adapter's update twice, once for each name that it has.
#
#   the same logits after merging: False
#   the merged embedding has the update times 2.000
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
before = model.model.embed_tokens.weight.detach().clone()
wanted = LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, init_lora_weights=False)
adapted = get_peft_model(model, wanted).eval()
tokens = torch.arange(20)[None]
with torch.no_grad():
    update = adapted.base_model.model.model.embed_tokens.get_delta_weight("default")
    expected = adapted(tokens).logits
    merged = adapted.merge_and_unload()
    print("the same logits after merging:", torch.allclose(merged(tokens).logits, expected, atol=1e-3))
    added = merged.model.embed_tokens.weight - before
    print(f"the merged embedding has the update times {float((added * update).sum() / update.square().sum()):.3f}")
END
cat seen.txt
diff seen.txt - <<'END'
the same logits after merging: False
the merged embedding has the update times 2.000
END
