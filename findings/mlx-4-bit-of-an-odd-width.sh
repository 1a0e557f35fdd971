#!/usr/bin/env bash
# mlx-lm 0.32.2: quantizing to 4 bits, in groups of 64, a Llama whose MLP has 1,083 neurons, beside one that has 1,088.
#
# Bet: 1,083, which 64 does not divide, is refused, or padded, or at least said to be left whole.
# Seen: every `down_proj` stays in 16 bits while `config.json` says 4 for all of the model, so that the narrower model's file
# is the larger one.
#
#   1088 neurons: down_proj U32, configuration says 4 bits
#   1083 neurons: down_proj BF16, configuration says 4 bits
#   the narrower model is larger: True
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
import torch
from mlx_lm import convert
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, dtype=torch.bfloat16)
lengths = {}
for neurons in (1088, 1083):
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=neurons)).to(torch.bfloat16).save_pretrained(f"{neurons}")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(f"{neurons}")
    convert(f"{neurons}", f"{neurons}-4bit", quantize=True, q_bits=4, q_group_size=64)
    file = Path(f"{neurons}-4bit/model.safetensors")
    kind = safe_open(file, "pt").get_slice("model.layers.0.mlp.down_proj.weight").get_dtype()
    said = json.loads(Path(f"{neurons}-4bit/config.json").read_text())["quantization"]
    print(f"SEEN {neurons} neurons: down_proj {kind}, configuration says {said['bits']} bits" + ("" if len(said) == 3 else " and more"))
    lengths[neurons] = file.stat().st_size
print("SEEN the narrower model is larger:", lengths[1083] > lengths[1088])
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
1088 neurons: down_proj U32, configuration says 4 bits
1083 neurons: down_proj BF16, configuration says 4 bits
the narrower model is larger: True
END
