#!/usr/bin/env bash
# litgpt 0.5.13, transformers 5.23.0: litgpt converts a GPT-NeoX as large as Pythia-14M, whose MLP has 384 neurons instead of 512.
#
# Bet: the sizes come from config.json, or a folder that is not as large as its name says is refused.
# Seen: config.json is never opened. A folder of another name is refused; one that has the name of the whole model is converted
# without a word, and model_config.yaml beside the weights has the whole model's neurons, so that the weights do not load. With
# the right number written into that file they do, and the logits are those of transformers.
#
#   pythia-14m-pruned: ValueError
#   pythia-14m: converted, neurons 512, loads: RuntimeError
#   pythia-14m, neurons corrected: loads, largest difference of logits below 1e-4: True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/own"
"$place/own/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 litgpt==0.5.13
python3 -m venv "$place/other"
"$place/other/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$place"
export HF_HUB_OFFLINE=1
cat > make.py <<'END'
import shutil, torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=50304, max_position_embeddings=512)
model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=384, rotary_pct=0.25)).eval()
with torch.no_grad():
    for own in model.parameters():
        own.add_(0.02 * torch.randn_like(own))
model.save_pretrained("pythia-14m")
shutil.copytree("pythia-14m", "pythia-14m-pruned")
with torch.inference_mode():
    torch.save(model(torch.arange(100, 132)[None]).logits, "logits.pt")
END
cat > look.py <<'END'
import contextlib, io, torch, yaml
from pathlib import Path
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

def converted(name):
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            convert_hf_checkpoint(Path(name))
        return "converted"
    except ValueError as error:
        return type(error).__name__

def loaded():
    model = GPT(Config.from_file("pythia-14m/model_config.yaml")).eval()
    model.load_state_dict(torch.load("pythia-14m/lit_model.pth", weights_only=True))
    return model

print("pythia-14m-pruned:", converted("pythia-14m-pruned"))
said, file = converted("pythia-14m"), Path("pythia-14m/model_config.yaml")
written = yaml.safe_load(file.read_text())
try:
    loaded()
    outcome = "yes"
except RuntimeError as error:
    outcome = type(error).__name__
print(f"pythia-14m: {said}, neurons {written['intermediate_size']}, loads: {outcome}")
file.write_text(yaml.safe_dump({**written, "intermediate_size": 384}))
with torch.inference_mode():
    apart = (loaded()(torch.arange(100, 132)[None]) - torch.load("logits.pt", weights_only=True)).abs().max()
print("pythia-14m, neurons corrected: loads, largest difference of logits below 1e-4:", bool(apart < 1e-4))
END
other/bin/python make.py 2> warnings.txt || { cat warnings.txt; exit 1; }
own/bin/python look.py > seen.txt 2> warnings.txt || { cat seen.txt warnings.txt; exit 1; }
cat seen.txt
diff seen.txt - <<'END'
pythia-14m-pruned: ValueError
pythia-14m: converted, neurons 512, loads: RuntimeError
pythia-14m, neurons corrected: loads, largest difference of logits below 1e-4: True
END
