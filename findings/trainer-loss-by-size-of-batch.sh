#!/usr/bin/env bash
# transformers 5.23.0: `Trainer.evaluate` of one model on the same texts, in batches of 1, 2, 4 and 12.
#
# Bet: `eval_loss` is the mean over the tokens, whatever the size of a batch, as the loss of training is since 4.46.
# Seen: it is the mean over batches of the mean over tokens. Where texts differ in length it depends on the size of the batch,
# so that perplexities of two models compare only if both were measured in the same batches.
#
#   batch of 1: not the mean over tokens
#   batch of 2: not the mean over tokens
#   batch of 4: not the mean over tokens
#   batch of 12: the mean over tokens
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
texts = []
for length in [4] * 4 + [64] * 4 + [4, 64] * 2:
    tokens, rest = torch.randint(96, (length,)), 64 - length
    pad = torch.nn.functional.pad
    texts.append(dict(input_ids=pad(tokens, (0, rest)), attention_mask=pad(torch.ones_like(tokens), (0, rest)), labels=pad(tokens, (0, rest), value=-100)))
with torch.no_grad():
    counts = torch.tensor([float((text["labels"][1:] != -100).sum()) for text in texts])
    losses = torch.tensor([float(model(**{name: value[None] for name, value in text.items()}).loss) for text in texts])
over_tokens = float((losses * counts).sum() / counts.sum())
for size in (1, 2, 4, 12):
    settings = TrainingArguments("out", per_device_eval_batch_size=size, report_to=[], use_cpu=True, disable_tqdm=True)
    found = Trainer(model=model, args=settings, eval_dataset=texts).evaluate()["eval_loss"]
    print(f"SEEN batch of {size}:", "the mean over tokens" if abs(found - over_tokens) < 1e-3 else "not the mean over tokens")
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
batch of 1: not the mean over tokens
batch of 2: not the mean over tokens
batch of 4: not the mean over tokens
batch of 12: the mean over tokens
END
