#!/usr/bin/env bash
# transformers.js 4.3.2 (onnxruntime-node 1.30.0), transformers 5.23.0: a random Llama, exported to ONNX, goes on greedily with two
# prompts for up to 24 tokens, alone and in one batch, until a token that ends texts.
#
# Bet: in a batch each text ends where it ends alone, and is filled up with `pad_token_id`, as in transformers.
# Seen: a text that has ended goes on with whatever the model says next, since only the newest token of each is looked at, and the
# batch stops where all of them end in the same step: with two texts, hardly ever. `pad_token_id` is not read. What is decoded with
# `skip_special_tokens` has the rest in it.
#
#   alone: 7 and 4 tokens, as transformers: True
#   a batch, transformers: 7 tokens, of the second text behind its end: 0 0 0
#   a batch, transformers.js: 24 tokens, of the second text behind its end: 33 49 49
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2
cd "$place"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/transformers@4.3.2 > npm.txt 2>&1 || { cat npm.txt; exit 1; }
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import json, onnx, torch
from pathlib import Path
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

class Graph(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]

torch.manual_seed(1)
sizes = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96, initializer_range=0.15, max_position_embeddings=128)).eval()
model.save_pretrained("models/llama")
past = [(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)) for _ in range(2)]
given = (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.arange(3, 7).expand(2, 4), past)
free, names = torch.export.Dim.DYNAMIC, [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
both = {0: free, 1: free}
program = torch.onnx.export(
    Graph(model).eval(), given, dynamo=True, verbose=False, external_data=False,
    dynamic_shapes={"input_ids": both, "attention_mask": both, "position_ids": both, "past": [({0: free, 2: free},) * 2] * 2},
    input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
    output_names=["logits", *(f"present.{name}" for name in names)],
)
graph = program.model_proto
axis = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
for value in graph.graph.input:
    for size in value.type.tensor_type.shape.dim:
        if size.dim_param == axis:
            size.dim_param = "batch_size"  # the name that transformers.js looks for
Path("models/llama/onnx").mkdir()
onnx.save(graph, "models/llama/onnx/model.onnx")

prompts = torch.randint(4, 90, (2, 6), generator=torch.Generator().manual_seed(3))
settings = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
def answers(ids, ends):
    return model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=ends, **settings)[:, 6:].tolist()
whole = answers(prompts, None)
ends = [whole[0][6], whole[1][3]]
alone = [answers(prompts[row : row + 1], ends)[0] for row in range(2)]
print(json.dumps({"prompts": prompts.tolist(), "ends": ends, "alone": alone, "batch": answers(prompts, ends)}))
END
cat > look.mjs <<'END'
import { readFileSync } from "node:fs";
import { AutoModelForCausalLM, env, Tensor } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "models/";
env.useFSCache = false;
const { prompts, ends, alone, batch } = JSON.parse(readFileSync("seen.json"));
const model = await AutoModelForCausalLM.from_pretrained("llama", { dtype: "fp32" });
const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const settings = { max_new_tokens: 24, do_sample: false, pad_token_id: 0, eos_token_id: ends };
async function answers(rows) {
    const given = { inputs: tensor(rows), attention_mask: tensor(rows.map((row) => row.map(() => 1))) };
    const output = await model.generate({ ...given, ...settings });
    return output.tolist().map((row) => row.slice(6).map(Number));
}
const same = JSON.stringify([...(await answers([prompts[0]])), ...(await answers([prompts[1]]))]) === JSON.stringify(alone);
console.log(`alone: ${alone[0].length} and ${alone[1].length} tokens, as transformers: ${same ? "True" : "False"}`);
for (const [name, [first, second]] of [["transformers", batch], ["transformers.js", await answers(prompts)]]) {
    const behind = second.slice(alone[1].length, alone[1].length + 3).join(" ");
    console.log(`a batch, ${name}: ${first.length} tokens, of the second text behind its end: ${behind}`);
}
END
PYTHONPATH=packages python3 look.py > seen.json 2> warnings.txt || { cat warnings.txt; exit 1; }
node look.mjs > seen.txt 2> warnings.txt || { cat seen.txt warnings.txt; exit 1; }
cat seen.txt
diff seen.txt - <<'END'
alone: 7 and 4 tokens, as transformers: True
a batch, transformers: 7 tokens, of the second text behind its end: 0 0 0
a batch, transformers.js: 24 tokens, of the second text behind its end: 33 49 49
END
