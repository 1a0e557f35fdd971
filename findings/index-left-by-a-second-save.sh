#!/usr/bin/env bash
# transformers 5.23.0: `save_pretrained` into a folder that it saved in shards before leaves the index of those shards.
#
# Bet: the second save leaves nothing of the first.
# Seen: the shards are removed, and the index that names them stays beside the one file.
#
#   first save: ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
#   second save: ['model.safetensors', 'model.safetensors.index.json']
#   named by the index and missing: 2
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" transformers==5.23.0 torch==2.13.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt <<'END'
import json
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))
folder = Path("model")
def names():
    return sorted(path.name for path in folder.glob("model*"))
model.save_pretrained(folder, max_shard_size="250KB")
print("first save:", names())
model.save_pretrained(folder)
print("second save:", names())
named = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
print("named by the index and missing:", sum(not (folder / name).exists() for name in named))
END
cat seen.txt
diff seen.txt - <<'END'
first save: ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
second save: ['model.safetensors', 'model.safetensors.index.json']
named by the index and missing: 2
END
