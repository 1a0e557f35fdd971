"""Text that a model writes itself, where nobody has any that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import psutil
import torch

from llmprune_cli.errors import CheckpointError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.progress import Listener
from llmprune_cli.source.full_model import load_model, pick_device
from llmprune_cli.text.corpus import BETWEEN
from llmprune_cli.text.names import SELF
from llmprune_cli.text.windows import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOGETHER = 32  # documents that are written at a time
LENGTH = 512  # tokens of a document, at most
QUESTION_SHARE = 4  # one token in so many of a conversation, at most, is the user's
PLACEHOLDER = "what a user says"


@dataclass(frozen=True)
class Place:
    """Where a model writes."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around the first thing that a user says, up to where the answer begins."""

    before: str
    after: str


def write_text(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, place: Place, tokens: int, seed: int, listener: Listener
) -> str:
    """Let a model write so many tokens at temperature 1: documents, or conversations if it has a template for these.

    Documents are x ~ p_θ(· | BOS), after Williams et al., "Self-calibration for Language Model Quantization and
    Pruning", arXiv 2410.17170. Of conversations, the user's part is what the model writes after the beginning of the
    template, after Xu et al., "Magpie", arXiv 2406.08464, section 2.

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
    frame = chat_frame(tokenizer)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        writer = _Writer(model, tokenizer)
        if frame is not None and (chats := writer.fill(tokens, partial(writer.conversations, frame), listener)):
            return "".join(chats)
        if documents := writer.fill(tokens, writer.documents, listener):
            return BETWEEN.join(documents)
    raise CheckpointError("The model ends every document before it begins, so it cannot write text itself.")


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame | None:
    """What stands around a user's words; None where there is no template, or one that adds nothing, or refuses them."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turn = [{"role": "user", "content": PLACEHOLDER}]
    try:
        spelled = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception:  # templates raise every kind
        return None
    before, found, after = spelled.partition(PLACEHOLDER)
    return Frame(before, after) if found and before.strip() and after.strip() else None


class _Writer:
    """A model that samples from what it predicts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """In memory, with its tokenizer."""
        self._model, self._tokenizer = model, tokenizer
        self._start = _start_token(model, tokenizer)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._length = min(LENGTH, longest or LENGTH) - 1

    def fill(self, tokens: int, write: Callable[[int], list[str]], listener: Listener) -> list[str]:
        """Texts that hold so many tokens together, or fewer where the model writes no more.

        Args:
            write: what makes at most so many of them at a time.
        """
        found, written = list[str](), 0
        while written < tokens:
            texts = write(min(TOGETHER, -(-tokens // self._length)))
            if not texts:
                break
            found += texts
            written += sum(map(len, self._tokenizer(texts, add_special_tokens=False)["input_ids"]))
            listener.stand_at(min(written, tokens), "")
        return found

    def documents(self, count: int) -> list[str]:
        """What the model writes after its start token."""
        rows = self._sampled([[self._start]] * count, self._length)
        return [text for text in self._tokenizer.batch_decode(rows, skip_special_tokens=True) if text]

    def conversations(self, frame: Frame, count: int) -> list[str]:
        """What a user might ask the model, and its answers, as its template spells them."""
        tokenizer = self._tokenizer
        before = tokenizer.encode(frame.before, add_special_tokens=False)
        room = self._length - len(before) - len(tokenizer.encode(frame.after, add_special_tokens=False))
        if room < 2 * QUESTION_SHARE:
            return []
        written = map(self._said, self._sampled([before] * count, room // QUESTION_SHARE))
        asked = [said for text in written if (said := text.partition(frame.after.strip())[0].strip())]
        if not asked:
            return []
        begun = [tokenizer.encode(frame.before + said + frame.after, add_special_tokens=False) for said in asked]
        answers = map(self._said, self._sampled(begun, self._length - max(map(len, begun))))
        turns = [
            [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            for said, answer in zip(asked, answers, strict=True)
            if answer.strip()
        ]
        return [str(tokenizer.apply_chat_template(turn, tokenize=False)) for turn in turns]

    def _said(self, row: list[int]) -> str:
        """The text of tokens up to the first special one."""
        special = {*self._tokenizer.all_special_ids}
        return str(self._tokenizer.decode([*takewhile(lambda number: number not in special, row)]))

    def _sampled(self, begun: list[list[int]], most: int) -> list[list[int]]:
        """The tokens that follow some others, so many at most."""
        ids, mask = left_padded(begun)
        padding = self._tokenizer.pad_token_id
        generate: Any = self._model.generate
        rows = generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=1,
            max_new_tokens=max(1, most),
            pad_token_id=self._start if padding is None else padding,
        )
        found: list[list[int]] = rows[:, ids.shape[1] :].tolist()
        return found


def _start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """What documents begin with: the token for that, else the one that ends them."""
    ends = model.config.get_text_config().eos_token_id
    last = ends[0] if isinstance(ends, list) else ends
    known = (tokenizer.bos_token_id, model.config.get_text_config().bos_token_id, tokenizer.eos_token_id, last)
    return next((int(token) for token in known if token is not None), 0)
