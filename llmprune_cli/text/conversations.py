"""Conversations as a model's chat template spells them, and what of that an assistant says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from llmprune_cli.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # who says what: role and content
Range = tuple[int, int]  # characters from one to before another

BETWEEN = "\n\n"  # documents, and turns without a template; conversations end as their template says
ASSISTANT = "assistant"
THOUGHT = re.compile(r"(</?think>)")  # what templates look for in what an assistant says
BEGUN = re.compile(r"<think>\s*(</think>\s*)?$")  # a thought of nothing, too
ENDED = re.compile(r"^\s*(</?think>\s*)?")
AMONG = re.compile(r"(\s|</?think>)*")  # what is between words of one turn
MARK = "QZ"  # around the number that stands for words of an assistant while it is found where a template puts them


@dataclass(frozen=True)
class Spelled:
    """A document or a conversation as a model reads it."""

    text: str
    answers: tuple[Range, ...] | None = None  # what an assistant says; None where nobody speaks, or nobody has asked


@dataclass(frozen=True)
class _Words:
    """Words of an assistant, in a row."""

    turn: int  # its number
    text: str


@dataclass(frozen=True)
class Speller:
    """How a model spells conversations."""

    tokenizer: PreTrainedTokenizerBase | None
    tells_answers: bool = False

    @property
    def has_template(self) -> bool:
        """Whether the model says how."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def spell(self, conversation: list[Message]) -> Spelled:
        """By the template, or else one turn after the other.

        Raises:
            CheckpointError: the template refuses it, or changes what an assistant says.
        """
        if self.has_template:
            text = self._by_template(conversation)
            return Spelled(text, self._answers(conversation, text) if self.tells_answers else None)
        said = [turn["content"] + BETWEEN for turn in conversation]
        begins = [0, *accumulate(map(len, said))]
        turns = zip(begins, conversation, strict=False)
        answers = ((at, at + len(turn["content"])) for at, turn in turns if _speaks(turn))
        return Spelled("".join(said), (*answers,) if self.tells_answers else None)

    def _by_template(self, conversation: list[Message]) -> str:
        assert self.tokenizer is not None
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False))
        except Exception as error:  # templates raise every kind
            reason = first_line(error).rstrip(".")
            raise CheckpointError(
                f"the model's chat template refuses this conversation: {reason}. Mend or remove that row."
            ) from error

    def _answers(self, conversation: list[Message], text: str) -> tuple[Range, ...]:
        """What an assistant says in a text: its thoughts and words, and what ends its turn."""
        whole, turns = self._placed(conversation, text)
        begins = [0, *accumulate(map(len, whole))]
        answers, before = list[Range](), -1
        for turn, at in zip(turns, range(1, len(whole) - 1, 2), strict=True):
            end = begins[at + 1] + self._ending(whole[at + 1])
            if turn == before and AMONG.fullmatch(whole[at - 1]):
                answers[-1] = (answers[-1][0], end)
                continue
            thinks = BEGUN.search(whole[at - 1])
            answers.append((begins[at] - (len(thinks[0]) if thinks else 0), end))
            before = turn
        return (*answers,)

    def _placed(self, conversation: list[Message], text: str) -> tuple[list[str], list[int]]:
        """A text in parts, of which every second one is an assistant's words, and the turns that these are of.

        Spaces before words are a part of them, unless the template leaves some out.

        Raises:
            CheckpointError: the template changes words.
        """
        mark = next(own for own in (MARK * count for count in range(1, len(text) + 2)) if own not in text)
        for with_spaces in (True, False):
            words = list[_Words]()
            marked = [*_marked(conversation, mark, words, with_spaces)]
            parts = re.split(rf"{mark}(\d+){mark}", self._by_template(marked))
            found = [words[int(number)] for number in parts[1::2]]
            said = [*(own.text for own in found), ""]
            whole = [part for pair in zip(parts[::2], said, strict=True) for part in pair]
            if "".join(whole) == text:
                return whole, [own.turn for own in found]
        raise CheckpointError(
            "the model's chat template changes what an assistant says, so that it cannot be told from the rest. Mend "
            "or remove that row, or leave out --loss-on assistant."
        )

    def _ending(self, after: str) -> int:
        """How many characters behind the words of an assistant end its turn: a thought's end, a token, and spaces.

        Where a template has no such token, the one that begins the next turn is taken, by which models end theirs.
        """
        bare = ENDED.sub("", after)
        longest = max((token for token in self._added if bare.startswith(token)), key=len, default="")
        return len(after) - len(bare) + len(longest) if longest else 0

    @cached_property
    def _added(self) -> list[str]:
        """The tokens that are found before a text is cut, such as those around turns."""
        return [*self.tokenizer.get_added_vocab()] if self.tokenizer is not None else []


def _speaks(turn: Message) -> bool:
    """Whether it is an assistant's, and not empty."""
    return turn["role"] == ASSISTANT and bool(turn["content"])


def _marked(conversation: list[Message], mark: str, words: list[_Words], with_spaces: bool) -> Iterator[Message]:
    """A conversation with marks in the place of an assistant's words.

    Args:
        words: take in those, by the numbers of their marks.
        with_spaces: whether those before words are a part of them.
    """
    for number, turn in enumerate(conversation):
        content = turn["content"]
        if _speaks(turn):
            content = ""
            for part in THOUGHT.split(turn["content"]):
                own = part.rstrip() if with_spaces else part.strip()
                if own.strip() and not THOUGHT.fullmatch(own):
                    part = part.replace(own, f"{mark}{len(words)}{mark}")
                    words.append(_Words(number, own))
                content += part
        yield {**turn, "content": content}


def joined(documents: Iterable[Spelled], between: str) -> Spelled:
    """Several, one after the other; plain text beside conversations counts as what an assistant says."""
    documents = [*documents]
    text = between.join(own.text for own in documents)
    if all(own.answers is None for own in documents):
        return Spelled(text)
    begins = accumulate((len(own.text) + len(between) for own in documents), initial=0)
    told = (own.answers if own.answers is not None else ((0, len(own.text)),) for own in documents)
    each = zip(begins, told, strict=False)
    return Spelled(text, tuple((at + first, at + end) for at, own in each for first, end in own if end > first))
