#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: a checkpoint that holds an output matrix of its own, whose configuration says
# `tie_word_embeddings: true`, as it is where the output matrix alone was trained or refitted after pruning.
#
# Bet: the configuration decides, in both.
# Seen: the older one ties, and the matrix that was stored is gone; the newer one warns, keeps both matrices, and still says
# that they are tied. One folder, two models.
#
#   5.23.0: configuration says tied: True, output is the embedding: False
#   4.57.6: configuration says tied: True, output is the embedding: True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/new" torch==2.13.0 transformers==5.23.0
python3 -m pip install --quiet --disable-pip-version-check --target "$place/old" torch==2.13.0 transformers==4.57.6
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cat > read.py <<'END'
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained("model")
same = bool((model.lm_head.weight == model.model.embed_tokens.weight).all())
print(f"{transformers.__version__}: configuration says tied: {model.config.tie_word_embeddings}, output is the embedding: {same}")
END
PYTHONPATH=new python3 - <<'END'
import json
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained("model")
config = json.load(open("model/config.json")) | {"tie_word_embeddings": True}
json.dump(config, open("model/config.json", "w"))
END
PYTHONPATH=new python3 read.py > seen.txt
PYTHONPATH=old python3 read.py >> seen.txt
cat seen.txt
diff seen.txt - <<'END'
5.23.0: configuration says tied: True, output is the embedding: False
4.57.6: configuration says tied: True, output is the embedding: True
END
