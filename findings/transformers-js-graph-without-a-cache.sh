#!/usr/bin/env bash
# transformers.js 4.3.2 (onnxruntime-node 1.30.0), transformers 5.23.0: a random Llama, exported to ONNX without a key-value cache
# (token ids in, logits out), goes on greedily with a text of 9 tokens.
#
# Bet: every step reads the whole text, as `use_cache=False` does in transformers, or such a graph is refused.
# Seen: it loads, and reads a whole text right when it is called; `generate` gives it the whole text once, and from then on nothing
# but the newest token, without a word: from the second new token on, each is what follows the one before as if nothing had been said.
#
#   called with the text: the next token is that of transformers: True
#   generate, transformers: 67 87 45 85 87 20 85 49
#   generate, transformers.js: 67 94 56 20 3 20 3 20
#   each of these but the first follows the one before it alone: True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2
cd "$place"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/transformers@4.3.2 > npm.txt 2>&1 || { cat npm.txt; exit 1; }
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import json, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class Graph(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits

torch.manual_seed(1)
sizes = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96, initializer_range=0.15, max_position_embeddings=128)).eval()
model.save_pretrained("models/llama")
Path("models/llama/onnx").mkdir()
free = torch.export.Dim.DYNAMIC
program = torch.onnx.export(
    Graph(model).eval(), (torch.zeros(2, 4, dtype=torch.long),), dynamo=True, verbose=False, external_data=False,
    dynamic_shapes={"input_ids": {0: free, 1: free}}, input_names=["input_ids"], output_names=["logits"],
)
program.save("models/llama/onnx/model.onnx")
text = torch.randint(4, 90, (1, 9), generator=torch.Generator().manual_seed(3))
settings = dict(max_new_tokens=8, do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=0)
new = model.generate(text, attention_mask=torch.ones_like(text), **settings)[0, 9:].tolist()
with torch.inference_mode():
    after = model(torch.arange(96)[:, None]).logits[:, -1].argmax(-1).tolist()  # what follows each token alone
print(json.dumps({"text": text.tolist()[0], "new": new, "after": after}))
END
cat > look.mjs <<'END'
import { readFileSync } from "node:fs";
import { AutoModelForCausalLM, env, Tensor } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "models/";
env.useFSCache = false;
const { text, new: expected, after } = JSON.parse(readFileSync("seen.json"));
const said = (what) => (what ? "True" : "False");
const model = await AutoModelForCausalLM.from_pretrained("llama", { dtype: "fp32" });
const inputs = new Tensor("int64", BigInt64Array.from(text.map(BigInt)), [1, text.length]);
const last = Array.from((await model({ input_ids: inputs })).logits.data).slice(-96);
console.log(`called with the text: the next token is that of transformers: ${said(last.indexOf(Math.max(...last)) === expected[0])}`);
const output = await model.generate({ inputs, max_new_tokens: 8, do_sample: false, eos_token_id: null });
const seen = output.tolist()[0].slice(text.length).map(Number);
console.log(`generate, transformers: ${expected.join(" ")}`);
console.log(`generate, transformers.js: ${seen.join(" ")}`);
const alone = seen.slice(1).every((token, at) => token === after[seen[at]]);
console.log(`each of these but the first follows the one before it alone: ${said(alone)}`);
END
PYTHONPATH=packages python3 look.py > seen.json 2> warnings.txt || { cat warnings.txt; exit 1; }
node look.mjs > seen.txt 2> warnings.txt || { cat seen.txt warnings.txt; exit 1; }
cat seen.txt
diff seen.txt - <<'END'
called with the text: the next token is that of transformers: True
generate, transformers: 67 87 45 85 87 20 85 49
generate, transformers.js: 67 94 56 20 3 20 3 20
each of these but the first follows the one before it alone: True
END
