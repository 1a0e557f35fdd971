#!/usr/bin/env bash
# mergekit 0.1.5, transformers 5.23.0: models whose configuration asks for biases, copied (`passthrough` of all layers) and merged.
#
# Bet: what goes through all layers of one model is a copy of it, and of two the mean. A matrix that mergekit knows nothing of is
# refused, as where one is missing.
# Seen: its lists of what a Llama, a Qwen3, a Gemma 3 or an OLMo 2 holds have no biases, which `attention_bias` and `mlp_bias` put
# there. mergekit leaves them out without a word, exits with 0, and writes a configuration that asks for them. Only transformers
# says, when it reads the folder, that they are missing; it starts them at zero, which is another model. A Qwen2, whose biases are
# listed, is copied whole.
#
#   llama attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
#   llama mlp_bias: passthrough rc 0, biases 6 -> 0, asked for True, the same model False
#   qwen3 attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
#   gemma3 attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
#   olmo2 attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
#   qwen2: passthrough rc 0, biases 6 -> 6, the same model True
#   llama attention_bias: linear rc 0, biases 8 -> 0
#   mergekit speaks of biases: 0 times
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 mergekit==0.1.5
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import json
import pathlib
import subprocess
import sys
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(0)
words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")))
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
sizes |= dict(head_dim=16, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
said = 0

def save(kind, folder, flags):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **flags))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)

def biases(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sum(name.endswith(".bias") for name in file.keys())

def merge(recipe, folder):
    global said
    pathlib.Path(f"{folder}.yml").write_text(json.dumps(recipe | {"dtype": "float32"}))
    arguments = [f"{folder}.yml", folder, "--no-copy-tokenizer", "--no-write-model-card"]
    done = subprocess.run([sys.executable, "-m", "mergekit.scripts.run_yaml", *arguments], capture_output=True, text=True)
    said += (done.stdout + done.stderr).lower().count("bias")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    for shard in pathlib.Path(folder).glob("model-00001-of-00001.safetensors"):
        shard.rename(f"{folder}/model.safetensors")
        pathlib.Path(folder, "model.safetensors.index.json").unlink(missing_ok=True)
    return done.returncode

flags = ("attention_bias", "mlp_bias", "attention_bias", "attention_bias", "attention_bias", None)
for kind, flag in zip(("llama", "llama", "qwen3", "gemma3_text", "olmo2", "qwen2"), flags):
    whole = f"whole-{len(list(pathlib.Path().glob('whole-*-copy.yml')))}"
    save(kind, whole, {flag: True} if flag else {})
    code = merge({"slices": [{"sources": [{"model": whole, "layer_range": [0, 2]}]}], "merge_method": "passthrough"}, whole + "-copy")
    with torch.no_grad():
        one, other = [AutoModelForCausalLM.from_pretrained(name).eval()(torch.arange(32)[None]).logits for name in (whole, whole + "-copy")]
    line = f"{kind.removesuffix('_text')} {flag or ''}".strip() + f": passthrough rc {code}, biases {biases(whole)} -> {biases(whole + '-copy')}"
    if flag:
        line += f", asked for {json.loads(pathlib.Path(whole + '-copy', 'config.json').read_text())[flag]}"
    print(f"{line}, the same model {torch.allclose(one, other, atol=1e-4)}")
save("llama", "second", {"attention_bias": True})
halves = [{"model": name, "parameters": {"weight": 0.5}} for name in ("whole-0", "second")]
code = merge({"models": halves, "merge_method": "linear"}, "mean")
print(f"llama attention_bias: linear rc {code}, biases {biases('second')} -> {biases('mean')}")
print(f"mergekit speaks of biases: {said} times")
END
cat seen.txt
diff seen.txt - <<'END'
llama attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
llama mlp_bias: passthrough rc 0, biases 6 -> 0, asked for True, the same model False
qwen3 attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
gemma3 attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
olmo2 attention_bias: passthrough rc 0, biases 8 -> 0, asked for True, the same model False
qwen2: passthrough rc 0, biases 6 -> 6, the same model True
llama attention_bias: linear rc 0, biases 8 -> 0
mergekit speaks of biases: 0 times
END
