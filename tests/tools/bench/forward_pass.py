"""Plain transformers reads llmprune's calibration text, in a process of its own."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune_cli.options import Text
from llmprune_cli.run.calibration import prepare_calibration
from llmprune_cli.text.windows import Reader


def main(folder: str, corpus: str, tokens: int, seq_len: int, part: int) -> None:
    """Run the model, in the checkpoint's dtype, over so many tokens of the text that is drawn for `tokens`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = Text(corpus, calibration_tokens=tokens, calibration_seq_len=seq_len)
    windows = prepare_calibration(options, Reader(tokenizer, len(tokenizer)), 0, sys.exit).fitted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.inference_mode():
        for window in windows[: part // seq_len]:
            model(input_ids=window.unsqueeze(0), use_cache=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
