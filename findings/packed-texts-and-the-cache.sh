#!/usr/bin/env bash
# transformers 5.23.0: texts put one after another by `DataCollatorWithFlattening`, read by a Llama with `sdpa` or `eager` attention.
#
# Bet: each text sees itself alone, or all before it; a cache that nothing reads afterwards changes no loss.
# Seen: positions that begin anew part the texts only where no cache is made. A model makes one unless told otherwise, so that
# the loss of `model(**batch)` is that of joined texts. Gradient checkpointing makes none while it trains and has one in `eval()`:
# the model that trains on parted texts is measured on joined ones. `Trainer` turns the cache off, and is right.
#
#   sdpa: as called joined, use_cache=False apart
#   sdpa with gradient checkpointing: train() apart, eval() joined
#   eager: as called joined, use_cache=False apart
#   eager with gradient checkpointing: train() apart, eval() joined
#   Trainer.evaluate: apart
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, initializer_range=0.2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
texts = [dict(input_ids=torch.randint(96, (length,)).tolist()) for length in (7, 11, 5)]
batch = DataCollatorWithFlattening()(texts)
with torch.no_grad():
    each = [(torch.tensor([text["input_ids"]]), len(text["input_ids"]) - 1) for text in texts]
    alone = sum(float(model(input_ids=ids, labels=ids).loss) * count for ids, count in each) / sum(count for _, count in each)

def seen(loss):
    return "apart" if abs(float(loss) - alone) < 1e-4 else "joined"

for attention in ("sdpa", "eager"):
    model.set_attn_implementation(attention)
    print(f"SEEN {attention}: as called {seen(model(**batch).loss)}, use_cache=False {seen(model(**batch, use_cache=False).loss)}")
    model.gradient_checkpointing_enable()
    trains, measures = seen(model.train()(**batch).loss), seen(model.eval()(**batch).loss)
    model.gradient_checkpointing_disable()
    print(f"SEEN {attention} with gradient checkpointing: train() {trains}, eval() {measures}")
settings = TrainingArguments("out", per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(model=model, args=settings, eval_dataset=texts, data_collator=DataCollatorWithFlattening())
print("SEEN Trainer.evaluate:", seen(trainer.evaluate()["eval_loss"]))
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
sdpa: as called joined, use_cache=False apart
sdpa with gradient checkpointing: train() apart, eval() joined
eager: as called joined, use_cache=False apart
eager with gradient checkpointing: train() apart, eval() joined
Trainer.evaluate: apart
END
