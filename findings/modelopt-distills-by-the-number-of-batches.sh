#!/usr/bin/env bash
# nvidia-modelopt 0.47.0 (torch 2.13.0, transformers 5.14.1): `KDTrainer`, its trainer for healing a pruned model, for one step
# on the same eight texts of the same length, together or in batches whose gradients are accumulated.
#
# Bet: the same loss and the same gradient, as with transformers' `Trainer`.
# Seen: both are multiplied by the number of batches that are accumulated: a run that takes one text at a time shows eight times
# the loss, and gradients that are clipped at an eighth of what they would be.
#
#   Trainer: 8 at a time: loss 6.7; 2: 6.7; 1: 6.7
#   Trainer: norm of the gradient 3.6; 3.6; 3.6
#   KDTrainer: 8 at a time: loss 2.5; 2: 10.1; 1: 20.1
#   KDTrainer: norm of the gradient 1.0; 4.1; 8.1
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.14.1 accelerate==1.15.0 nvidia-modelopt==0.47.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import copy
import torch
from modelopt.torch.distill.plugins.huggingface import KDTrainer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
student, teacher = (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.2)) for _ in range(2))
texts = [{"input_ids": own, "labels": own} for own in torch.randint(0, 256, (8, 32))]
for kind, given in ((Trainer, {}), (KDTrainer, {"distill_args": {"teacher_model": teacher}})):
    seen = []
    for size in (8, 2, 1):
        how = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1, logging_steps=1)
        arguments = TrainingArguments("out", **how, learning_rate=1e-5, report_to="none", use_cpu=True, save_strategy="no")
        trainer = kind(model=copy.deepcopy(student), args=arguments, train_dataset=texts, **given)
        trainer.train()
        seen.append(trainer.state.log_history[0])
    losses, norms = ([f"{own[name]:.1f}" for own in seen] for name in ("loss", "grad_norm"))
    print(f"seen: {kind.__name__}: 8 at a time: loss {losses[0]}; 2: {losses[1]}; 1: {losses[2]}")
    print(f"seen: {kind.__name__}: norm of the gradient {'; '.join(norms)}")
END
grep "^seen: " log.txt | cut -c7- | tee seen.txt
diff seen.txt - <<'END'
Trainer: 8 at a time: loss 6.7; 2: 6.7; 1: 6.7
Trainer: norm of the gradient 3.6; 3.6; 3.6
KDTrainer: 8 at a time: loss 2.5; 2: 10.1; 1: 20.1
KDTrainer: norm of the gradient 1.0; 4.1; 8.1
END
