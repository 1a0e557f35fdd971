#!/usr/bin/env bash
# peft 0.21.2: a LoRA adapter begun with `init_lora_weights="pissa_niter_16"`, saved and put on the model that it was made of.
#
# Bet: the same logits, as with "pissa" and "olora": what was taken out of the weights is found again from them.
# Seen: the fast decomposition is random, and is made anew when the adapter is read. It takes something else out of the weights
# than was put into the adapter, which is another model each time, and no word is said: it is further from the model in memory
# than that is from the one before training.
#
#   pissa: reads back the same True
#   olora: reads back the same True
#   pissa_niter_16: reads back the same False, read twice the same False, warnings 0
#   further off than before training: True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import copy
import warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
whole = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
text = torch.arange(32)[None]

def divergence(one, other):
    logs = [model(text).logits.log_softmax(-1) for model in (one, other)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())

with torch.no_grad():
    for way in ("pissa", "olora", "pissa_niter_16"):
        places = ["q_proj", "v_proj", "down_proj"]
        trained = get_peft_model(copy.deepcopy(whole), LoraConfig(r=8, lora_alpha=8, target_modules=places, init_lora_weights=way)).eval()
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))  # in place of training
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained.save_pretrained(way)
            reads = [PeftModel.from_pretrained(copy.deepcopy(whole), way).eval() for _ in range(2)]
        same = divergence(trained, reads[0]) < 1e-5
        if way != "pissa_niter_16":
            print(f"{way}: reads back the same {same}")
            continue
        twice, told = divergence(*reads) < 1e-5, [one for one in caught if "pissa" in str(one.message).lower()]
        print(f"{way}: reads back the same {same}, read twice the same {twice}, warnings {len(told)}")
        print("further off than before training:", divergence(trained, reads[0]) > divergence(trained, whole))
END
cat seen.txt
diff seen.txt - <<'END'
pissa: reads back the same True
olora: reads back the same True
pissa_niter_16: reads back the same False, read twice the same False, warnings 0
further off than before training: True
END
