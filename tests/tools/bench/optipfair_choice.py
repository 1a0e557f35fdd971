"""optipfair's data-driven choice of MLP neurons on llmprune's calibration text, in a process of its own."""

from __future__ import annotations

import sys

import optipfair
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune_cli.options import Text
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.text.windows import Reader


def main(folder: str, output: str, neurons: int, corpus: str, tokens: int, seq_len: int) -> None:
    """Keep so many neurons of each layer and write the model; the hybrid of weight ranges and activation norms."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prepare_calibration(
        Text(corpus, calibration_tokens=tokens, calibration_seq_len=seq_len),
        Reader(tokenizer, len(tokenizer)),
        0,
        sys.exit,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    whole = model.config.intermediate_size
    optipfair.prune_model(
        model,
        neuron_selection_method="MAW",  # with text, its hybrid of weight ranges and activation norms
        pruning_percentage=100 * (whole - neurons + 0.5) / whole,  # it rounds the number that goes down
        dataloader=[{"input_ids": window.unsqueeze(0)} for window in text.fitted],
        show_progress=False,
    )
    model.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
