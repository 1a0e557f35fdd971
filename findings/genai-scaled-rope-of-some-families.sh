#!/usr/bin/env bash
# onnxruntime-genai 0.18.0 (onnx-ir 1.1.0, onnxruntime 1.32.0): its builder, and models with scaled rotary embeddings as
# transformers 5.23.0 saves them, beside transformers.
#
# Bet: a kind of scaling that it has for one family it has for all, and what it has not it refuses.
# Seen: Mistral's linear scaling is exact; Llama's, by the same numbers, is left out, and so is Llama's YaRN. Qwen3's YaRN as model
# cards tell one to add it (a factor and the context before) ends in a division by zero; with the betas stated, which are the usual
# ones, it is built and computes something else, as the edges of its ramp are not rounded to whole channels. With `truncate: false`,
# which transformers does not say by default, it is exact. Of what it leaves out or gets wrong, nothing is said.
#
#   mistral, linear by 4: equal
#   llama, linear by 4: differs
#   llama, yarn by 4: differs
#   llama, llama3: equal
#   qwen3, yarn by 4: ZeroDivisionError
#   qwen3, yarn by 4 with betas: differs
#   qwen3, yarn by 4 with betas, truncate false: equal
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0 onnx==1.23.2 sentencepiece
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=packages
python3 - > seen.txt <<'END'
import shutil
import subprocess
import sys
import numpy as np
import onnxruntime_genai as genai
import torch
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
tokens = [3 + 7 * n % 90 for n in range(40)]
words = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, 96))])}
sizes = dict(hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=160,
             vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, max_position_embeddings=1024,
             sliding_window=None)

def seen(family, rope):
    """How far the logits are off, or what the builder ends with."""
    torch.manual_seed(0)
    rope = {"rope_theta": 10000.0, **rope}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes, rope_parameters=rope)).eval()
    model.save_pretrained("model")
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
    build = ["-m", "onnxruntime_genai.models.builder", "-i", "model", "-o", "built", "-p", "fp32", "-e", "cpu", "-c", "cache"]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1].partition(":")[0]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    built = genai.Model("built")
    settings = genai.GeneratorParams(built)
    settings.set_search_options(max_length=64)
    generator, found = genai.Generator(built, settings), []
    for token in tokens:
        generator.append_tokens(np.array([[token]], dtype=np.int32))
        found.append(generator.get_logits()[0, -1].copy())
    shutil.rmtree("model"), shutil.rmtree("built")
    gap = np.abs(np.stack(found) - expected).max()
    return "equal" if gap < 1e-2 else "differs" if gap > 0.5 else f"gap {gap}"

linear = dict(rope_type="linear", factor=4.0)
llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)
betas = dict(beta_fast=32.0, beta_slow=1.0)
print("mistral, linear by 4:", seen("mistral", linear))
print("llama, linear by 4:", seen("llama", linear))
print("llama, yarn by 4:", seen("llama", yarn))
print("llama, llama3:", seen("llama", llama3))
print("qwen3, yarn by 4:", seen("qwen3", yarn))
print("qwen3, yarn by 4 with betas:", seen("qwen3", {**yarn, **betas}))
print("qwen3, yarn by 4 with betas, truncate false:", seen("qwen3", {**yarn, **betas, "truncate": False}))
END
cat seen.txt
diff seen.txt - <<'END'
mistral, linear by 4: equal
llama, linear by 4: differs
llama, yarn by 4: differs
llama, llama3: equal
qwen3, yarn by 4: ZeroDivisionError
qwen3, yarn by 4 with betas: differs
qwen3, yarn by 4 with betas, truncate false: equal
END
