#!/usr/bin/env bash
# transformers 5.23.0 reading GGUF (gguf 0.19.0): Llama 3.1's scaling, which GGUF stores as the tensor `rope_freqs.weight`, YaRN's,
# and the rotary base of StarCoder 2.
#
# Bet: it reads what llama.cpp reads, or says what it leaves out.
# Seen: it passes over the tensor, so that the same Llama with and without scaling gives the same logits, over `rope.scaling.…` of
# Qwen2, and over `rope.freq_base` of StarCoder 2, which is a million in the published models. Not a word of it.
#
#   llama, rope_freqs.weight up to 8: the logits of the file without it, warnings: 0
#   llama: rope_type default
#   qwen2, YaRN by 4: rope_type default
#   starcoder2, base 1000000: base 10000
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
cd "$place"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 - > seen.txt 2> warnings.txt <<'END'
import logging
import numpy as np
import torch
import transformers
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoConfig, AutoModelForCausalLM
hidden, heads, kv_heads, head_dim, neurons, words, layers = 128, 4, 2, 32, 128, 96, 2

def matrix(rows, columns):
    return np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32) / columns**0.5

def write(name, kind, base, tensors):
    file = GGUFWriter(name, kind)
    file.add_context_length(256)
    file.add_embedding_length(hidden)
    file.add_block_count(layers)
    file.add_feed_forward_length(neurons)
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_layer_norm_eps(1e-5)
    file.add_vocab_size(words)
    file.add_rope_dimension_count(head_dim)
    file.add_rope_freq_base(base)
    if kind == "qwen2":
        file.add_rope_scaling_type(RopeScalingType.YARN)
        file.add_rope_scaling_factor(4.0)
        file.add_rope_scaling_orig_ctx_len(64)
    file.add_tokenizer_model("llama")
    file.add_token_list([f"w{n}" for n in range(words)])
    file.add_token_scores([0.0] * words)
    file.add_token_types([1] * words)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    for tensor, values in tensors.items():
        file.add_tensor(tensor, values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()

shapes = {"attn_q": (heads * head_dim, hidden), "attn_k": (kv_heads * head_dim, hidden), "attn_v": (kv_heads * head_dim, hidden),
          "attn_output": (hidden, heads * head_dim), "ffn_gate": (neurons, hidden), "ffn_up": (neurons, hidden), "ffn_down": (hidden, neurons)}
weights = {"token_embd.weight": matrix(words, hidden), "output.weight": matrix(words, hidden), "output_norm.weight": np.ones(hidden, np.float32)}
for layer in range(layers):
    weights |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    weights |= {f"blk.{layer}.{name}.weight": np.ones(hidden, np.float32) for name in ("attn_norm", "ffn_norm")}
write("plain.gguf", "llama", 500000.0, weights)
write("scaled.gguf", "llama", 500000.0, {**weights, "rope_freqs.weight": np.array([1.0] * 8 + [8.0] * 8, np.float32)})

class Counted(logging.Handler):
    records = []
    def emit(self, record):
        self.records.append(record)

transformers.logging.get_logger().addHandler(Counted(logging.WARNING))
text = torch.arange(40)[None] * 7 % 90
logits = {}
for name in ("plain", "scaled"):
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf").eval()
    with torch.no_grad():
        logits[name] = model(text).logits
same = torch.equal(logits["plain"], logits["scaled"])
of_rope = [record for record in Counted.records if "rope" in record.getMessage()]
print(f"llama, rope_freqs.weight up to 8: {'the' if same else 'not the'} logits of the file without it, warnings: {len(of_rope)}")
print("llama: rope_type", model.config.rope_parameters["rope_type"])
write("model.gguf", "qwen2", 10000.0, {"token_embd.weight": matrix(words, hidden)})
print("qwen2, YaRN by 4: rope_type", AutoConfig.from_pretrained(".", gguf_file="model.gguf").rope_parameters["rope_type"])
write("model.gguf", "starcoder2", 1000000.0, {"token_embd.weight": matrix(words, hidden)})
base = AutoConfig.from_pretrained(".", gguf_file="model.gguf").rope_parameters["rope_theta"]
print("starcoder2, base 1000000: base", int(base))
END
cat seen.txt
diff seen.txt - <<'END'
llama, rope_freqs.weight up to 8: the logits of the file without it, warnings: 0
llama: rope_type default
qwen2, YaRN by 4: rope_type default
starcoder2, base 1000000: base 10000
END
