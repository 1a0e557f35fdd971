#!/usr/bin/env bash
# torchao 0.18.0, transformers 5.23.0, on a CPU: a Llama as wide as SmolLM2-135M (hidden size 576, 9 heads), whose MLP has 1,088
# neurons instead of 1,536, quantized to 4 bits in groups of 128, which is the default of Int4WeightOnlyConfig.
#
# Bet: groups that divide no width are an error, as in IntxWeightOnlyConfig, or torchao takes smaller ones.
# Seen: nothing is quantized, without a word (the message is for logging.INFO). All matrices stay in bfloat16, transformers saves a
# file as large as before, and its config.json says that it has 4 bits in groups of 128; it loads again, as exact as the model. With
# groups of 64, torchao goes to work (on a CPU it then misses a package for GPUs). The two other configurations refuse 128.
#
#   Int4WeightOnlyConfig, groups of 128: quantized 0 of 14, size of file 1.00, the same logits: True
#   config.json: torchao, Int4WeightOnlyConfig, group_size 128
#   messages about what was left out: 0
#   Int4WeightOnlyConfig, groups of 64: ImportError
#   IntxWeightOnlyConfig, groups of 128: AssertionError
#   Int8WeightOnlyConfig, groups of 128: AssertionError
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 torchao==0.18.0 accelerate==1.15.0
cd "$place"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cat > look.py <<'END'
import copy, json, os, torch
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

torch.manual_seed(0)
sizes = dict(hidden_size=576, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3, vocab_size=256)
llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=1088, tie_word_embeddings=True)).to(torch.bfloat16).eval()
llama.save_pretrained("whole")

def logits(model):
    with torch.inference_mode():
        return model(torch.arange(32)[None]).logits

four = TorchAoConfig(Int4WeightOnlyConfig())
model = AutoModelForCausalLM.from_pretrained("whole", dtype="auto", quantization_config=four)
matrices = [own for name, own in model.named_parameters() if name.endswith("_proj.weight")]
quantized = sum(type(own) is not torch.nn.Parameter for own in matrices)
model.save_pretrained("four")
size = os.path.getsize("four/model.safetensors") / os.path.getsize("whole/model.safetensors")
whole, again = (AutoModelForCausalLM.from_pretrained(name, dtype="auto") for name in ("whole", "four"))
print(f"Int4WeightOnlyConfig, groups of 128: quantized {quantized} of {len(matrices)}, size of file {size:.2f}, "
      f"the same logits: {torch.equal(logits(again), logits(whole))}")
said = json.load(open("four/config.json"))["quantization_config"]
kind = said["quant_type"]["default"]
print(f"config.json: {said['quant_method']}, {kind['_type']}, group_size {kind['_data']['group_size']}")
print("messages about what was left out:", open("warnings.txt").read().count("Skipping quantizing"))
others = {
    "Int4WeightOnlyConfig, groups of 64": Int4WeightOnlyConfig(group_size=64),
    "IntxWeightOnlyConfig, groups of 128": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)),
    "Int8WeightOnlyConfig, groups of 128": Int8WeightOnlyConfig(granularity=PerGroup(128)),
}
for name, kind in others.items():
    try:
        quantize_(copy.deepcopy(llama), kind)
        print(f"{name}: quantized")
    except (AssertionError, ImportError) as error:
        print(f"{name}: {type(error).__name__}")
END
PYTHONPATH=packages python3 look.py > seen.txt 2> warnings.txt || { cat seen.txt warnings.txt; exit 1; }
cat seen.txt
diff seen.txt - <<'END'
Int4WeightOnlyConfig, groups of 128: quantized 0 of 14, size of file 1.00, the same logits: True
config.json: torchao, Int4WeightOnlyConfig, group_size 128
messages about what was left out: 0
Int4WeightOnlyConfig, groups of 64: ImportError
IntxWeightOnlyConfig, groups of 128: AssertionError
Int8WeightOnlyConfig, groups of 128: AssertionError
END
