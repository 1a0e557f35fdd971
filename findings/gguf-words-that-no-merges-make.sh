#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, xllamacpp 2026.10.11549: the tokenizer of Llama 3 out of a GGUF file.
#
# Bet: transformers and llama.cpp read the words of a byte-level vocabulary alike, since all of its tokens can be made by
# its merges.
# Seen: not all of them can. 588 of Llama 3's 128,000 tokens are words that no chain of its merges reaches;
# its tokenizer.json says `ignore_merges`, and llama.cpp knows by the name `llama-bpe` that a word which is a token is that
# one. transformers forgets it when it reads the file: here " việc" and "даже" come out in pieces that the model has hardly
# seen, without a word. 588 is counted by `tokenizer.model` of the package llama-models.
#
#   tokens that no merges make: 588 of 128000
#   ' việc': llama.cpp 1 token, transformers 3
#   ' nhiều': llama.cpp 1 token, transformers 4
#   ' даже': llama.cpp 1 token, transformers 3
#   ' kırmızı': llama.cpp 1 token, transformers 3
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
pip="$place/env/bin/pip"
"$pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 xllamacpp==2026.10.11549
"$pip" install --quiet --disable-pip-version-check --no-deps llama-models==0.3.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
env/bin/python - > seen.txt 2> said.txt <<'END' || { cat said.txt; exit 1; }
import base64
import importlib.util
import json
import urllib.request
from pathlib import Path

import gguf
import numpy
import xllamacpp
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

spelling = bytes_to_unicode()
package = Path(importlib.util.find_spec("llama_models").submodule_search_locations[0])
lines = (package / "llama3" / "tokenizer.model").read_text().splitlines()
tokens = ["".join(spelling[byte] for byte in base64.b64decode(line.split()[0])) for line in lines]
numbers = {token: number for number, token in enumerate(tokens)}
merges = []  # as transformers' own converter makes them: every cut of a token into two others, by the token's number
for token in tokens:
    cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
    cuts = [cut for cut in cuts if cut[0] in numbers and cut[1] in numbers]
    merges += sorted(cuts, key=lambda cut: (numbers[cut[0]], numbers[cut[1]]))
ranks = {pair: rank for rank, pair in enumerate(merges)}


def is_made(token):
    """Whether the merges make it of its characters."""
    parts = list(token)
    while len(parts) > 1:
        known = [(ranks[pair], place) for place, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
        if not known:
            return False
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return True


print("tokens that no merges make:", sum(not is_made(token) for token in tokens), "of", len(tokens))
rows, kinds = [*tokens, "<|begin_of_text|>", "<|end_of_text|>"], gguf.TokenType
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_vocab_size(len(rows))
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_feed_forward_length(64)
writer.add_block_count(1)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(rows)
writer.add_token_types([kinds.NORMAL] * len(tokens) + [kinds.CONTROL] * 2)
writer.add_token_merges([" ".join(pair) for pair in merges])
writer.add_bos_token_id(len(tokens))
writer.add_eos_token_id(len(tokens) + 1)
zeros, ones = (lambda *shape: numpy.zeros(shape, numpy.float32)), numpy.ones(32, numpy.float32)
writer.add_tensor("token_embd.weight", zeros(len(rows), 32))
writer.add_tensor("output_norm.weight", ones)
for name in ("attn_norm", "ffn_norm"):
    writer.add_tensor(f"blk.0.{name}.weight", ones)
for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
    writer.add_tensor(f"blk.0.{name}.weight", zeros(32, 32))
for name, shape in (("ffn_gate", (64, 32)), ("ffn_up", (64, 32)), ("ffn_down", (32, 64))):
    writer.add_tensor(f"blk.0.{name}.weight", zeros(*shape))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
parameters = xllamacpp.CommonParams()
parameters.model.path = "model.gguf"
parameters.n_ctx = 64
server = xllamacpp.Server(parameters)
for word in (" việc", " nhiều", " даже", " kırmızı"):
    asked = json.dumps({"content": word, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
    theirs = json.load(urllib.request.urlopen(request))["tokens"]
    ours = tokenizer(word, add_special_tokens=False)["input_ids"]
    print(f"{word!r}: llama.cpp {len(theirs)} token, transformers {len(ours)}")
END
cat seen.txt
diff seen.txt - <<'END'
tokens that no merges make: 588 of 128000
' việc': llama.cpp 1 token, transformers 3
' nhiều': llama.cpp 1 token, transformers 4
' даже': llama.cpp 1 token, transformers 3
' kırmızı': llama.cpp 1 token, transformers 3
END
