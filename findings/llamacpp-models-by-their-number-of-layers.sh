#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549, gguf 0.19.0): files of Gemma 2, Gemma 3 and EXAONE 4 with a layer that does nothing (its
# two output matrices are zero), and the same files without that layer.
#
# Bet: a file says how attention is scaled and which layers have a window, so that leaving out what does nothing changes nothing.
# Seen: what has the number of layers of a published size is taken for it. Gemma 2 of 46 layers and Gemma 3 of 62 (27B) scale
# attention by hidden size / heads, with any other number by the head dim; EXAONE 4 has a sliding window with 64 layers (32B),
# and none with any other number, although the file has one.
#
#   gemma2: 46 layers to 45 differs, 45 to 44 equal
#   gemma3: 62 layers to 61 differs, 61 to 60 equal
#   exaone4: 64 layers to 63 differs, 63 to 62 equal
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" gguf==0.19.0 xllamacpp==2026.10.11549
cd "$place"
cat > serve.py <<'END'
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = "model.gguf"
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.fit_params = 256, 1, 0, False, False
params.ui, params.cache_ram_mib, params.swa_full = False, 0, True
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
END
PYTHONPATH=packages python3 - > seen.txt <<'END'
import json
import subprocess
import sys
from urllib.request import ProxyHandler, Request, build_opener
import numpy as np
from gguf import GGUFWriter
hidden, head_dim, neurons = 128, 32, 64
words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *(f"w{n}" for n in range(41))]
around = ["post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"]
norms = {"gemma2": ["attn_norm", "ffn_norm", *around[:2]], "gemma3": ["attn_norm", "ffn_norm", *around], "exaone4": around}

def write(kind, layers, idle):
    heads = 4 if kind == "exaone4" else 2  # Gemma's need not fill the hidden size
    file = GGUFWriter("model.gguf", kind)
    file.add_context_length(256)
    file.add_embedding_length(hidden)
    file.add_block_count(layers)
    file.add_feed_forward_length(neurons)
    file.add_head_count(heads)
    file.add_head_count_kv(1)
    file.add_key_length(head_dim)
    file.add_value_length(head_dim)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(10000.0)
    file.add_sliding_window(8 if kind == "exaone4" else 256)
    if kind == "gemma2":
        file.add_attn_logit_softcapping(50.0)
        file.add_final_logit_softcapping(30.0)
    file.add_vocab_size(len(words))
    file.add_tokenizer_model("llama")
    file.add_token_list(words)
    file.add_token_scores([0.0] * len(words))
    file.add_token_types([2, 3, 3, *[6] * 256, *[1] * 41])
    numbers = np.random.default_rng(0)
    def add(name, *shape, scale=1.0):
        file.add_tensor(name, (numbers.standard_normal(shape) * scale / shape[-1] ** 0.5).astype(np.float32))
    add("token_embd.weight", len(words), hidden, scale=3)
    file.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        out = 0.0 if layer == idle else 1.0
        for name, rows, columns, scale in (
            ("attn_q", heads * head_dim, hidden, 3), ("attn_k", head_dim, hidden, 3), ("attn_v", head_dim, hidden, 1),
            ("attn_output", hidden, heads * head_dim, out), ("ffn_gate", neurons, hidden, 1), ("ffn_up", neurons, hidden, 1),
            ("ffn_down", hidden, neurons, out)):
            add(f"blk.{layer}.{name}.weight", rows, columns, scale=scale)
        for name in norms[kind]:
            file.add_tensor(f"blk.{layer}.{name}.weight", np.full(head_dim if "_q_" in name or "_k_" in name else hidden, 0.3, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()

def next_token(kind, layers, idle=None):
    """Log-probabilities after 24 tokens."""
    write(kind, layers, idle)
    server = subprocess.Popen([sys.executable, "serve.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        prompt = [260 + 7 * n % 40 for n in range(24)]
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": len(words), "temperature": 0, "logit_bias": [[270, 1e6]]}
        address = server.stdout.readline().strip() + "/completion"
        request = Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        answer = json.load(build_opener(ProxyHandler({})).open(request, timeout=60))
        found = {token["id"]: token["logprob"] for token in answer["completion_probabilities"][0]["top_logprobs"]}
        return np.array([found[token] for token in range(len(words))])
    finally:
        server.kill()
        server.communicate()

for kind, layers in (("gemma2", 46), ("gemma3", 62), ("exaone4", 64)):
    seen = []
    for number in (layers, layers - 1):
        gap = float(abs(next_token(kind, number, idle=number - 1) - next_token(kind, number - 1)).max())
        seen.append("equal" if gap < 1e-3 else "differs" if gap > 0.05 else f"gap {gap}")
    print(f"{kind}: {layers} layers to {layers - 1} {seen[0]}, {layers - 1} to {layers - 2} {seen[1]}")
END
cat seen.txt
diff seen.txt - <<'END'
gemma2: 46 layers to 45 differs, 45 to 44 equal
gemma3: 62 layers to 61 differs, 61 to 60 equal
exaone4: 64 layers to 63 differs, 63 to 62 equal
END
