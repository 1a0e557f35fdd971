#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0: `head_mask`, by which heads are switched off, and how they are ranked by the gradient of a mask.
#
# Bet: with `eager` attention, what has it in its documentation obeys it: GPT-2, BERT, OPT and GPT-NeoX in 4.57. What has not
# refuses a name that it does not know (a TypeError): Llama in both, and all of them in 5.23.
# Seen: 4.57 obeys it in GPT-2 and BERT; OPT and Llama take it and do nothing with it, and GPT-NeoX answers NaN. 5.23 takes it in
# every model, as it takes any name at all, and does nothing with it: a model whose heads are all masked answers as before, a mask
# gets no gradient, and no word is said. Who ranks heads by what their mask costs reads there that none is worth anything.
# (`prune_heads` is gone as well, and says so by an AttributeError.)
#
#   transformers 4.57.6
#   GPT2LMHeadModel: all heads masked answers otherwise, the mask has a gradient True
#   BertLMHeadModel: all heads masked answers otherwise, the mask has a gradient True
#   OPTForCausalLM: all heads masked answers as before, the mask has a gradient False
#   GPTNeoXForCausalLM: all heads masked answers NaN, the mask has a gradient False
#   LlamaForCausalLM: all heads masked answers as before, the mask has a gradient False
#   transformers 5.23.0
#   GPT2LMHeadModel: all heads masked answers as before, the mask has a gradient False
#   BertLMHeadModel: all heads masked answers as before, the mask has a gradient False
#   OPTForCausalLM: all heads masked answers as before, the mask has a gradient False
#   GPTNeoXForCausalLM: all heads masked answers as before, the mask has a gradient False
#   LlamaForCausalLM: all heads masked answers as before, the mask has a gradient False
#   warnings: 0
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/torch" torch==2.13.0
for version in 4.57.6 5.23.0; do
    python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/$version" transformers==$version
done
cd "$place"
cat > masks.py <<'END'
import io
import logging
import warnings
import torch
import transformers
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
ends = dict(bos_token_id=0, eos_token_id=0)
mlp = dict(intermediate_size=96, initializer_range=0.2)
models = [
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, initializer_range=0.2, **ends)),
    BertLMHeadModel(BertConfig(**sizes, **mlp, is_decoder=True)),
    OPTForCausalLM(OPTConfig(**sizes, ffn_dim=96, word_embed_proj_dim=64, init_std=0.2)),
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **mlp)),
    LlamaForCausalLM(LlamaConfig(**sizes, **mlp)),
]
text = torch.randint(96, (1, 12))
log = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(log))
print("transformers", transformers.__version__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for model in models:
        model.eval().set_attn_implementation("eager")
        with torch.no_grad():
            before, after = model(text).logits, model(text, head_mask=torch.zeros(2, 4)).logits
        answer = "NaN" if after.isnan().any() else "as before" if torch.allclose(before, after, atol=1e-4) else "otherwise"
        mask = torch.ones(2, 4, requires_grad=True)
        model(text, head_mask=mask, labels=text).loss.backward()
        print(f"{type(model).__name__}: all heads masked answers {answer}, the mask has a gradient {mask.grad is not None}")
if transformers.__version__.startswith("5"):
    print("warnings:", sum("mask" in str(one.message) for one in caught) + log.getvalue().count("head_mask"))
END
export HF_HUB_OFFLINE=1
for version in 4.57.6 5.23.0; do
    PYTHONPATH=$version:torch python3 masks.py 2> log.txt >> seen.txt || { cat log.txt; exit 1; }
done
cat seen.txt
diff seen.txt - <<'END'
transformers 4.57.6
GPT2LMHeadModel: all heads masked answers otherwise, the mask has a gradient True
BertLMHeadModel: all heads masked answers otherwise, the mask has a gradient True
OPTForCausalLM: all heads masked answers as before, the mask has a gradient False
GPTNeoXForCausalLM: all heads masked answers NaN, the mask has a gradient False
LlamaForCausalLM: all heads masked answers as before, the mask has a gradient False
transformers 5.23.0
GPT2LMHeadModel: all heads masked answers as before, the mask has a gradient False
BertLMHeadModel: all heads masked answers as before, the mask has a gradient False
OPTForCausalLM: all heads masked answers as before, the mask has a gradient False
GPTNeoXForCausalLM: all heads masked answers as before, the mask has a gradient False
LlamaForCausalLM: all heads masked answers as before, the mask has a gradient False
warnings: 0
END
