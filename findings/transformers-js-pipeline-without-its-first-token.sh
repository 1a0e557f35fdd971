#!/usr/bin/env bash
# transformers.js 4.3.2 (onnxruntime-node 1.30.0), transformers 5.23.0: the pipeline "text-generation" of both goes on with a text,
# given as a string, with a random Llama whose tokenizer begins every text with <s>.
#
# Bet: the pipeline reads a text as the tokenizer does.
# Seen: the tokenizer of transformers.js puts <s> before it, its pipeline does not, without a word, unless tokenizer_config.json
# says `add_bos_token`, which transformers 5 does not write, not even where it was asked for: it says so in tokenizer.json. So a
# model that transformers 5 saved goes on with another text than it is given. With the key written in by hand, both agree.
#
#   LlamaTokenizer with add_bos_token, saved: add_bos_token absent
#   tokens of the text: transformers 1 3 12 13, transformers.js 1 3 12 13
#   next token: transformers 11, transformers.js 21, transformers without <s> 21
#   next token, with add_bos_token in the file: transformers.js 11
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2
cd "$place"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/transformers@4.3.2 > npm.txt 2>&1 || { cat npm.txt; exit 1; }
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import json, shutil, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, pipeline

class Graph(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits

pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz"]
tokenizer = LlamaTokenizer(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[], add_bos_token=True)
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(pieces), initializer_range=0.3)).eval()
model.save_pretrained("models/saved")
tokenizer.save_pretrained("models/saved")
free = torch.export.Dim.DYNAMIC
program = torch.onnx.export(
    Graph(model).eval(), (torch.zeros(2, 4, dtype=torch.long),), dynamo=True, verbose=False, external_data=False,
    dynamic_shapes={"input_ids": {0: free, 1: free}}, input_names=["input_ids"], output_names=["logits"],
)
Path("models/saved/onnx").mkdir()
program.save("models/saved/onnx/model.onnx")
shutil.copytree("models/saved", "models/written")
config = json.loads(Path("models/saved/tokenizer_config.json").read_text())
Path("models/written/tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))

text, goes_on = "hi", pipeline("text-generation", model="models/saved", device="cpu")
def following(**settings):
    return goes_on(text, max_new_tokens=1, do_sample=False, return_tensors=True, **settings)[0]["generated_token_ids"][-1]
ids = goes_on.tokenizer(text)["input_ids"]
seen = {"text": text, "ids": ids, "next": following(), "without": following(add_special_tokens=False)}
print(json.dumps({**seen, "key": config.get("add_bos_token", "absent")}))
END
cat > look.mjs <<'END'
import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "models/";
env.useFSCache = false;
const { text, ids, next, without, key } = JSON.parse(readFileSync("seen.json"));
async function following(name) {
    const goesOn = await pipeline("text-generation", name, { dtype: "fp32" });
    const [{ generated_text: whole }] = await goesOn(text, { max_new_tokens: 1, do_sample: false, return_full_text: false });
    return [goesOn.tokenizer.encode(text).join(" "), goesOn.tokenizer.convert_tokens_to_ids(whole.trim())];
}
const [read, seen] = await following("saved");
console.log(`LlamaTokenizer with add_bos_token, saved: add_bos_token ${key}`);
console.log(`tokens of the text: transformers ${ids.join(" ")}, transformers.js ${read}`);
console.log(`next token: transformers ${next}, transformers.js ${seen}, transformers without <s> ${without}`);
console.log(`next token, with add_bos_token in the file: transformers.js ${(await following("written"))[1]}`);
END
PYTHONPATH=packages python3 look.py > seen.json 2> warnings.txt || { cat warnings.txt; exit 1; }
node look.mjs > seen.txt 2> warnings.txt || { cat seen.txt warnings.txt; exit 1; }
cat seen.txt
diff seen.txt - <<'END'
LlamaTokenizer with add_bos_token, saved: add_bos_token absent
tokens of the text: transformers 1 3 12 13, transformers.js 1 3 12 13
next token: transformers 11, transformers.js 21, transformers without <s> 21
next token, with add_bos_token in the file: transformers.js 11
END
