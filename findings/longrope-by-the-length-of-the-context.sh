#!/usr/bin/env bash
# transformers 5.23.0: a text of 64 tokens in a Phi-3 with long rotary embeddings (`longrope`, as in Phi-3-mini-128k), and in the
# same folder with a smaller `max_position_embeddings`.
#
# Bet: it is the longest text that a model takes, and lowering it, to reserve less memory, changes nothing for a short one.
# Seen: attention is scaled by its ratio to the length before extension, so that every text is read otherwise. In a Llama,
# with other kinds of rotary embeddings, nothing changes.
#
#   longrope: 131072 differs from 65536, differs from 4096
#   default: 131072 equals 65536, equals 4096
#   yarn: 131072 equals 65536, equals 4096
#   dynamic: 131072 equals 65536, equals 4096
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import json
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
kinds = {
    "longrope": dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=4096),
    "default": {}, "yarn": dict(factor=32.0, original_max_position_embeddings=4096), "dynamic": dict(factor=32.0)}
text = torch.arange(64)[None]
for kind, fields in kinds.items():
    rope = dict(rope_type=kind, rope_theta=10000.0, **fields)
    if kind == "longrope":
        config = Phi3Config(**sizes, **tokens, max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=rope)
        Phi3ForCausalLM(config).save_pretrained("model")
    else:
        LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=131072, rope_parameters=rope)).save_pretrained("model")
    logits = []
    for length in (131072, 65536, 4096):
        settings = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps({**settings, "max_position_embeddings": length}))
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained("model").eval()(text).logits)
    said = ["equals" if torch.allclose(logits[0], other, atol=1e-4) else "differs from" for other in logits[1:]]
    print(f"{kind}: 131072 {said[0]} 65536, {said[1]} 4096")
END
cat seen.txt
diff seen.txt - <<'END'
longrope: 131072 differs from 65536, differs from 4096
default: 131072 equals 65536, equals 4096
yarn: 131072 equals 65536, equals 4096
dynamic: 131072 equals 65536, equals 4096
END
