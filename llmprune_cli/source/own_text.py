"""Text that a model writes itself, where nobody has any that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.progress import Listener
from llmprune_cli.source.full_model import load_model, pick_device
from llmprune_cli.text.names import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOGETHER = 32  # documents that are written at a time
LENGTH = 512  # tokens of a document, at most


@dataclass(frozen=True)
class Place:
    """Where a model writes."""

    device: str
    dtype: torch.dtype


def write_text(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, place: Place, tokens: int, seed: int, listener: Listener
) -> list[str]:
    """Sample documents from the model's own start token, at temperature 1, until there are so many tokens.

    After Williams et al., "Self-calibration for Language Model Quantization and Pruning", arXiv 2410.17170: text is
    x ~ p_θ(· | BOS).

    Raises:
        CheckpointError: the model does not fit into memory, or writes nothing.
    """
    size_bytes = checkpoint.parameter_count * place.dtype.itemsize
    if pick_device(place.device) == "cpu" and size_bytes > psutil.virtual_memory().available:
        raise CheckpointError(
            f"{checkpoint.source} takes {size_bytes:,} bytes, which memory has no room for, and it has to be there to "
            f"write text itself. Give text in the place of {SELF!r}."
        )
    model = load_model(checkpoint, place.device, str(place.dtype).removeprefix("torch."))
    listener.stage("Writing text", tokens)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        return _documents(model, tokenizer, tokens, listener)


def _documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, listener: Listener
) -> list[str]:
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH) - 1
    start = _start_token(model, tokenizer)
    together = min(TOGETHER, -(-tokens // length))
    begun = torch.full((together, 1), start, device=model.device)
    found: list[str] = []
    written = 0
    generate: Any = model.generate
    while written < tokens:
        rows = generate(
            input_ids=begun,
            attention_mask=torch.ones_like(begun),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=1,
            max_new_tokens=length,
            pad_token_id=start if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True)
        counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        if not any(counts):
            raise CheckpointError("The model ends every document before it begins, so it cannot write text itself.")
        found += [text for text in texts if text]
        written += sum(counts)
        listener.stand_at(min(written, tokens), "")
    return found


def _start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """What documents begin with: the token for that, else the one that ends them."""
    ends = model.config.get_text_config().eos_token_id
    last = ends[0] if isinstance(ends, list) else ends
    known = (tokenizer.bos_token_id, model.config.get_text_config().bos_token_id, tokenizer.eos_token_id, last)
    return next((int(token) for token in known if token is not None), 0)
