#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.23.0: weights of a model changed where `device_map` left one layer in memory and put one on disk.
#
# Bet: a change of a weight that is not in memory raises an error, as arithmetic on the `meta` device does elsewhere, or takes
# effect; a new `Parameter` put in its place certainly takes effect.
# Seen: of eight ways to change a weight, seven change nothing in the layer on disk, six of them without a word (`load_state_dict`
# warns): each call of the layer takes its weight from the disk once more, in place of the new `Parameter` too. Only an assignment
# to `.data` is refused. `save_pretrained` then writes the layer in memory changed, and the one on disk as it was: a model that
# was pruned in half of its layers.
#
#   way: in memory, on disk
#   weight.zero_(): changed, not changed
#   weight[:, columns] = 0: changed, not changed
#   weight.mul_(mask): changed, not changed
#   weight.data.mul_(mask): changed, not changed
#   weight.copy_(new): changed, not changed
#   weight = Parameter(new): changed, not changed
#   load_state_dict(new): changed, not changed with a warning
#   weight.data = new: changed, RuntimeError
#   saved after weight.zero_(): zeros in memory True, zeros on disk False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=packages python3 - > seen.txt 2> log.txt <<'END' || { cat log.txt; exit 1; }
import warnings
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("whole")
places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")}
places["model.layers.1"] = "disk"
text, zeros, columns = torch.arange(32)[None], torch.zeros(64, 96), torch.arange(0, 96, 2)

def read():
    return AutoModelForCausalLM.from_pretrained("whole", device_map=places, offload_folder="offloaded").eval()

def indexed(layer):
    layer.weight[:, columns] = 0

def renewed(layer):
    layer.weight = torch.nn.Parameter(zeros.clone())

def data(layer):
    layer.weight.data = zeros.clone()

ways = {
    "weight.zero_()": lambda layer: layer.weight.zero_(),
    "weight[:, columns] = 0": indexed,
    "weight.mul_(mask)": lambda layer: layer.weight.mul_(zeros),
    "weight.data.mul_(mask)": lambda layer: layer.weight.data.mul_(zeros),
    "weight.copy_(new)": lambda layer: layer.weight.copy_(zeros),
    "weight = Parameter(new)": renewed,
    "load_state_dict(new)": lambda layer: layer.load_state_dict({"weight": zeros}),
    "weight.data = new": data,
}
print("way: in memory, on disk")
with torch.no_grad():
    for name, way in ways.items():
        model, seen = read(), []
        for layer in model.model.layers:
            before = model(text).logits
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    way(layer.mlp.down_proj)
                except RuntimeError as error:
                    seen.append(type(error).__name__)
                    continue
            change = "not changed" if torch.equal(model(text).logits, before) else "changed"
            seen.append(change + " with a warning" * bool(caught))
        print(f"{name}: {', '.join(seen)}")
    model = read()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
    model.save_pretrained("changed")
    layers = AutoModelForCausalLM.from_pretrained("changed").model.layers
    first, second = [not layer.mlp.down_proj.weight.any() for layer in layers]
    print(f"saved after weight.zero_(): zeros in memory {first}, zeros on disk {second}")
END
cat seen.txt
diff seen.txt - <<'END'
way: in memory, on disk
weight.zero_(): changed, not changed
weight[:, columns] = 0: changed, not changed
weight.mul_(mask): changed, not changed
weight.data.mul_(mask): changed, not changed
weight.copy_(new): changed, not changed
weight = Parameter(new): changed, not changed
load_state_dict(new): changed, not changed with a warning
weight.data = new: changed, RuntimeError
saved after weight.zero_(): zeros in memory True, zeros on disk False
END
