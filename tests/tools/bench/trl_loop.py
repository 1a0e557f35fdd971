"""Distillation by trl's GKDTrainer, both models in memory; run with the python of an environment of its own.

It is given the dense model, the pruned one, a folder to write, the windows of text in their order, the dtype that the
machine multiplies fast, and the learning rate.
"""

import sys

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

dense, pruned, output, text, dtype, rate, batch = sys.argv[1:]
windows = load_file(text)["windows"]
together = int(batch) // windows.shape[1]
steps = len(windows) // together
tokenizer = AutoTokenizer.from_pretrained(dense)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
arguments = GKDConfig(
    output_dir=output,
    max_steps=steps,
    per_device_train_batch_size=together,
    train_sampling_strategy="sequential",
    learning_rate=float(rate),
    lr_scheduler_type="cosine",
    warmup_steps=-(-steps // 10),
    adam_beta2=0.95,
    max_grad_norm=1.0,
    lmbda=0.0,  # of the text that is given alone, none that the student writes
    beta=0.0,  # the divergence from the teacher
    temperature=1.0,
    gradient_checkpointing=False,
    bf16=dtype == "bfloat16",
    use_cpu=True,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = GKDTrainer(
    AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32),
    AutoModelForCausalLM.from_pretrained(dense, dtype=dtype),
    arguments,
    DataCollatorForLanguageModeling(tokenizer.pad_token_id),
    Dataset.from_dict({"input_ids": windows.tolist(), "labels": windows.tolist()}),
    processing_class=tokenizer,
)
trainer.train()
trainer.model.to(torch.bfloat16).save_pretrained(output)
tokenizer.save_pretrained(output)
