"""What an assistant says, found in the chat templates of many families, beside what trl's own copies of these mark.

`make check-chats` runs it. trl carries the templates of the models that it trains, and copies of some in which marks of
transformers ({% generation %}) say what an assistant says. Where a template has them, what we find lies within what
they mark, and what is beyond it has no words. In all of them, every answer is found, and nothing that a user says.
Exit status 1 means that one differs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

from rich.console import Console
from rich.table import Table
from transformers.utils.chat_template_utils import render_jinja_template

from llmprune_cli.errors import CheckpointError
from llmprune_cli.text.conversations import Message, Range, Speller

TRL = "trl==1.16.0"
TEMPLATES = "trl/chat_templates/"
MARKS = "generation %}"
TAG = re.compile(r"<[^<>\s]{1,40}>")  # a special token, as all of these spell them
HEADER = re.compile(r"(?:<[^<>\s]*>|assistant|final|to=user|\s)*")  # what some take for a part of the turn
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ASKED, OTHER = "What is a?", "it is 2."
CHATS: dict[str, list[Message]] = {
    "one turn": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "42"}],
    "several": [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": " It is\n 2.\n"},
        {"role": "user", "content": OTHER},
        {"role": "assistant", "content": "yes"},
    ],
    "thoughts": [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": "<think>\nThey ask.\n</think>\n\nHello!"},
        {"role": "user", "content": OTHER},
        {"role": "assistant", "content": "<think>\nThey leave.\n</think>\n\nSo long."},
    ],
}


@dataclass(frozen=True)
class Templated:
    """What a `Speller` needs of a tokenizer."""

    chat_template: str

    def get_added_vocab(self) -> dict[str, int]:
        """Every tag of the template."""
        return dict.fromkeys((*TAG.findall(self.chat_template), *NAMES.values()), 1)

    def apply_chat_template(self, conversation: list[Message], tokenize: bool) -> str:
        """As tokenizers do."""
        return render_jinja_template([conversation], chat_template=self.chat_template, **NAMES)[0][0]

    def marked(self, conversation: list[Message]) -> list[Range]:
        """What the marks of a template say."""
        how = {"chat_template": self.chat_template, "return_assistant_tokens_mask": True, **NAMES}
        return list(render_jinja_template([conversation], **how)[1][0])


def templates() -> Iterator[tuple[str, str]]:
    """Names and texts of those in the wheel."""
    with tempfile.TemporaryDirectory() as place:
        download = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
        subprocess.run([*download, "--dest", place, TRL], check=True)
        with ZipFile(next(Path(place).glob("trl-*.whl"))) as wheel:
            for name in sorted(wheel.namelist()):
                if name.startswith(TEMPLATES) and name.endswith(".jinja"):
                    yield name.removeprefix(TEMPLATES), wheel.read(name).decode()


def fault(template: Templated, conversation: list[Message]) -> str | None:
    """What is wrong with what is found in a conversation; nothing where the template refuses it."""
    speller = Speller(cast(Any, template), tells_answers=True)
    try:
        found = Speller(cast(Any, template)).spell(conversation)
    except CheckpointError:
        return None
    try:
        answers = speller.spell(conversation).answers or ()
    except CheckpointError as error:
        return str(error)
    words = [turn["content"].split("</think>")[-1].strip() for turn in conversation if turn["role"] == "assistant"]
    said = [found.text[first:end] for first, end in answers]
    if not any(word in found.text for word in words):
        return None  # it wants them as parts of several kinds
    if len(said) != len(words) or not all(word in own for word, own in zip(words, said, strict=True)):
        return f"finds {said}"
    if any(other in own for other in (ASKED, OTHER) for own in said):
        return f"takes what a user says for an answer: {said}"
    if MARKS not in template.chat_template:
        return None
    inside = [False] * len(found.text)
    for first, end in template.marked(conversation):
        inside[first:end] = [True] * (end - first)
    ours = [any(first <= at < end for first, end in answers) for at in range(len(found.text))]
    lacking = "".join(letter for letter, own, its in zip(found.text, ours, inside, strict=True) if own and not its)
    beyond = "".join(letter for letter, own, its in zip(found.text, ours, inside, strict=True) if its and not own)
    if lacking.strip() or not HEADER.fullmatch(beyond):
        return f"has {lacking!r} beside what is marked, and lacks {beyond!r}"
    return None


def main() -> int:
    """Try all, and print what differs."""
    table, count, marked = Table("template", "conversation", "what differs"), 0, 0
    for name, text in templates():
        count, marked = count + 1, marked + (MARKS in text)
        for kind, conversation in CHATS.items():
            differs = fault(Templated(text), conversation)
            if differs:
                table.add_row(name, kind, differs)
    if table.row_count:
        Console().print(table)
    print(f"{count} templates of {TRL}, {marked} with marks, {len(CHATS)} conversations: {table.row_count} differ.")
    return int(bool(table.row_count))


if __name__ == "__main__":
    sys.exit(main())
