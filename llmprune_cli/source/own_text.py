"""Text that a model writes itself, where nobody has any that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
from llmprune_cli.text.conversations import BETWEEN, Spelled, joined
from llmprune_cli.text.names import SELF, WITH_CONVERSATIONS
from llmprune_cli.text.reading import spelled
from llmprune_cli.text.windows import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOGETHER = 32  # documents that are written at a time
LENGTH = 512  # tokens of a document, at most
QUESTION_SHARE = 4  # one token in so many of a conversation, at most, is the user's
ASKED, ANSWERED = "what a user says", "what a model answers"
MOST_BARREN = 3  # batches without text, after which a model is taken to write none


@dataclass(frozen=True)
class Place:
    """Where a model writes."""

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around the first thing that a user says, and around the answer."""

    before: str
    between: str
    end: str

    def filled(self, begun: str, answer: str, is_ended: bool) -> Spelled:
        """A conversation up to an answer, with that."""
        end = self.end if is_ended else ""
        return Spelled(begun + answer + end, ((len(begun), len(begun + answer + end.rstrip())),))


def write_text(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, place: Place, tokens: int, seed: int, listener: Listener
) -> Spelled:
    """Let a model write so many tokens at temperature 1: documents, or conversations if it has a template for these.

    Documents are x ~ p_θ(· | BOS), after Williams et al., "Self-calibration for Language Model Quantization and
    Pruning", arXiv 2410.17170. Of conversations, the user's part is what the model writes after the beginning of the
    template, after Xu et al., "Magpie", arXiv 2406.08464, section 2; they are as the model wrote them, since
    templates leave out parts of what was answered, such as thoughts.

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
            return joined(chats, "")
        if documents := writer.fill(tokens, writer.documents, listener):
            return joined(documents, BETWEEN)
    raise CheckpointError("The model ends every document before it begins, so it cannot write text itself.")


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame | None:
    """What stands around a user's words; None where there is no template, or one that adds nothing, or refuses them."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    asked = [{"role": "user", "content": ASKED}]
    answered = [*asked, {"role": "assistant", "content": ANSWERED}]
    try:
        begun = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    except Exception:  # templates raise every kind
        return None
    before, found, between = begun.partition(ASKED)
    if not (found and before.strip() and between.strip()):
        return None
    return Frame(before, between, whole.partition(ANSWERED)[2])


def warn_of_no_conversations(text: str | None, tokenizer: PreTrainedTokenizerBase, warn: Callable[[str], None]) -> None:
    """Say what keeps the answers of a model that chats, where nobody has named a text (`make bench-texts`)."""
    if text is None and chat_frame(tokenizer) is not None:
        warn(
            "This model has a chat template, and the text that is read by default has no conversations, so that its "
            f"answers lose more than they need to. Where all of it fits into memory, the text {WITH_CONVERSATIONS} "
            "lets it write some."
        )


class _Writer:
    """A model that samples from what it predicts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """In memory, with its tokenizer."""
        self._model, self._tokenizer = model, tokenizer
        self._start = _start_token(model, tokenizer)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._length = min(LENGTH, longest or LENGTH) - 1
        ends = model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self._added = tokenizer.added_tokens_decoder
        special = {number for number, token in self._added.items() if token.special}
        self._special = special | {*tokenizer.all_special_ids} | self._ends

    def fill(self, tokens: int, write: Callable[[int], list[Spelled]], listener: Listener) -> list[Spelled]:
        """Texts that hold so many tokens together; none where the model does not get as far.

        Args:
            write: what makes at most so many of them at a time.
        """
        found, written, barren = list[Spelled](), 0, 0
        while written < tokens and barren < MOST_BARREN:
            texts = write(min(TOGETHER, -(-tokens // self._length)))
            more = sum(len(self._tokenizer.encode(own.text, add_special_tokens=False)) for own in texts)
            found, written, barren = [*found, *texts], written + more, 0 if more else barren + 1
            listener.stand_at(min(written, tokens), "")
        return found if written >= tokens else []

    def documents(self, count: int) -> list[Spelled]:
        """What the model writes after its start token."""
        rows = self._sampled([[self._start]] * count, self._length, self._ends)
        return [Spelled(text) for text in self._tokenizer.batch_decode(rows, skip_special_tokens=True) if text]

    def conversations(self, frame: Frame, count: int) -> list[Spelled]:
        """What a user might ask the model, and what it answers, thoughts and all."""
        tokenizer = self._tokenizer
        before = tokenizer.encode(frame.before, add_special_tokens=False)
        room = self._length - len(before) - len(tokenizer.encode(frame.between + frame.end, add_special_tokens=False))
        if room < 2 * QUESTION_SHARE:
            return []
        marks = self._special | self._added_in(frame.before + frame.between + frame.end)
        questions = (_until(marks, row) for row in self._sampled([before] * count, room // QUESTION_SHARE, marks))
        parts = (self._spelled(row).partition(frame.between.strip())[0].strip() for row in questions)
        begun = [frame.before + asked + frame.between for asked in parts if asked]
        if not begun:
            return []
        ids = [tokenizer.encode(own, add_special_tokens=False) for own in begun]
        ends = self._ends | self._added_in(frame.end)
        rows = self._sampled(ids, self._length - max(map(len, ids)), ends)
        answers = [self._spelled_after(own, _until(ends, row)) for own, row in zip(ids, rows, strict=True)]
        return [
            frame.filled(own, answer, bool(ends & {*row}))
            for own, answer, row in zip(begun, answers, rows, strict=True)
            if answer.strip()
        ]

    def _added_in(self, text: str) -> set[int]:
        """The added tokens in a text, which a tokenizer need not call special to end turns by them."""
        return {*self._tokenizer.encode(text, add_special_tokens=False)} & self._added.keys()

    def _spelled(self, row: list[int]) -> str:
        return spelled(self._tokenizer, torch.tensor(row, dtype=torch.long))

    def _spelled_after(self, before: list[int], row: list[int]) -> str:
        """What tokens add to the text of others; alone, they may lose a space."""
        whole, begun = self._spelled([*before, *row]), self._spelled(before)
        return whole.removeprefix(begun) if whole.startswith(begun) else self._spelled(row)

    def _sampled(self, begun: list[list[int]], most: int, ends: set[int]) -> list[list[int]]:
        """The tokens that follow some others, so many at most, up to one that ends them."""
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
            eos_token_id=sorted(ends) or None,
            pad_token_id=self._start if padding is None else padding,
        )
        found: list[list[int]] = rows[:, ids.shape[1] :].tolist()
        return found


def _until(ends: Collection[int], row: list[int]) -> list[int]:
    """The tokens before the first of some others."""
    return [*takewhile(lambda number: number not in ends, row)]


def _start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """What documents begin with: the token for that, else the one that ends them."""
    ends = model.config.get_text_config().eos_token_id
    last = ends[0] if isinstance(ends, list) else ends
    known = (tokenizer.bos_token_id, model.config.get_text_config().bos_token_id, tokenizer.eos_token_id, last)
    return next((int(token) for token in known if token is not None), 0)
