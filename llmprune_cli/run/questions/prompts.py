"""Three prompts to a model that chats, so that people see what it has become."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.progress import Listener
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.tokenizer import load_tokenizer
from llmprune_cli.text.windows import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write one sentence about a dog that finds a ball.",
)
ANSWER_TOKENS = 24  # at most
MOST_OF_MEMORY = 1 / 4  # of what is free: a prune streams, and what it shows at the end shall not need more


def answer_prompts(checkpoint: Checkpoint, device: str, dtype: torch.dtype, listener: Listener) -> tuple[str, ...]:
    """What a model answers to each of `PROMPTS`, taking the likeliest token each time.

    Returns:
        Nothing where it does not chat, or takes much of the memory of the device.
    """
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError:
        return ()
    spelled = _spelled(tokenizer)
    if not spelled or checkpoint.parameter_count * dtype.itemsize > MOST_OF_MEMORY * _free_bytes(device):
        return ()
    listener.stage("Answering prompts", 1)
    model = load_model(checkpoint, device, str(dtype).removeprefix("torch."))
    ids, mask = left_padded([tokenizer.encode(text, add_special_tokens=False) for text in spelled])
    with torch.inference_mode():
        written = model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=_padding(tokenizer),
        )
    listener.advance(1)
    return tuple(str(tokenizer.decode(own, skip_special_tokens=True)).strip() for own in written[:, ids.shape[1] :])


def _spelled(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts as the model's chat template has them; none where that is missing, or adds nothing to them."""
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    spelled = [str(tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)) for t in talks]
    return [] if spelled == list(PROMPTS) else spelled


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """What follows an answer that has ended; it is left out of what is shown where it is a special token."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
