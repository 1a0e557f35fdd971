#!/usr/bin/env bash
# mergekit 0.1.5, transformers 5.23.0: four of six layers kept (`passthrough`), of families that mergekit knows and of families
# whose matrices it works out by itself.
#
# Bet: the configuration counts four layers, in every family that it writes.
# Seen: of what it works out (SmolLM3, EXAONE 4, Seed-OSS, OLMo 3, Ernie 4.5) it stores four layers, numbered anew, under a
# configuration that counts six, and exits with 0; a warning speaks of a key for the number of layers. transformers makes the two
# that are missing up at random, so that the folder is another model each time. Of a Llama, four are counted.
#
#   llama: rc 0, counted 4, stored 4, the same model twice: True
#   smollm3: rc 0, counted 6, stored 4, the same model twice: False
#   exaone4: rc 0, counted 6, stored 4, the same model twice: False
#   seed_oss: rc 0, counted 6, stored 4, the same model twice: False
#   olmo3: rc 0, counted 6, stored 4, the same model twice: False
#   ernie4_5: rc 0, counted 6, stored 4, the same model twice: False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 mergekit==0.1.5
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import json
import pathlib
import subprocess
import sys
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")))
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
sizes |= dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, initializer_range=0.2)
slices = [{"sources": [{"model": "whole", "layer_range": which}]} for which in ([0, 2], [4, 6])]
pathlib.Path("recipe.yml").write_text(json.dumps({"merge_method": "passthrough", "dtype": "float32", "slices": slices}))

def logits(folder, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(32)[None], use_cache=False).logits

for kind in ("llama", "smollm3", "exaone4", "seed_oss", "olmo3", "ernie4_5"):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained("whole")
    words.save_pretrained("whole")
    arguments = ["recipe.yml", kind, "--no-copy-tokenizer", "--no-write-model-card"]
    done = subprocess.run([sys.executable, "-m", "mergekit.scripts.run_yaml", *arguments], capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    counted = json.loads(pathlib.Path(kind, "config.json").read_text())["num_hidden_layers"]
    stored = set()
    for shard in pathlib.Path(kind).glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored |= {name.split(".")[2] for name in file.keys() if name.startswith("model.layers.")}
    same = torch.allclose(logits(kind, 0), logits(kind, 1), atol=1e-4)
    print(f"{kind}: rc {done.returncode}, counted {counted}, stored {len(stored)}, the same model twice: {same}")
END
cat seen.txt
diff seen.txt - <<'END'
llama: rc 0, counted 4, stored 4, the same model twice: True
smollm3: rc 0, counted 6, stored 4, the same model twice: False
exaone4: rc 0, counted 6, stored 4, the same model twice: False
seed_oss: rc 0, counted 6, stored 4, the same model twice: False
olmo3: rc 0, counted 6, stored 4, the same model twice: False
ernie4_5: rc 0, counted 6, stored 4, the same model twice: False
END
