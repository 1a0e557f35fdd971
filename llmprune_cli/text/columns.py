"""Which columns of a dataset hold its text, or its conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from llmprune_cli.errors import CheckpointError
from llmprune_cli.text.conversations import ASSISTANT, Message, Spelled
from llmprune_cli.text.files import Row

TEXT_COLUMN = "text"
OTHER_NAMES = ("gpt", "chatgpt", "bot", "model")  # of an assistant, in ShareGPT's data and Gemma's
ROLES = {"human": "user", **dict.fromkeys(OTHER_NAMES, ASSISTANT)}
# Columns that together are a conversation, the most telling first.
CHATS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))

MOST_LOOKED_AT = 1000  # rows, for one that has a value in every column

Spell = Callable[[list[Message]], Spelled]


def columns_in(rows: Iterable[Row]) -> Row:
    """The columns of a table, each with the first value that is not null, as the first rows tell."""
    found: Row = {}
    for row in islice(rows, MOST_LOOKED_AT):
        found |= {name: value for name, value in row.items() if found.get(name) is None}
        if None not in found.values() and any(isinstance(value, str | list) for value in found.values()):
            break
    return found


def find_columns(
    where: str, columns: Sequence[str], strings: Sequence[str], wanted: str | None, chats_first: bool = False
) -> tuple[str, ...]:
    """The columns that the text is in: one, or those of a conversation.

    Args:
        where: what has these columns, for messages.
        strings: those of the columns that hold text.
        wanted: what the user asked for.
        chats_first: whether conversations count more than a column of text beside them.

    Raises:
        CheckpointError: there is no such column, or nobody can tell which one it is.
    """
    listed = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise CheckpointError(
                f"{where} has no column {wanted!r}. It has {listed}: choose --text-column among these."
            )
        return (wanted,)
    for known in (*CHATS, (TEXT_COLUMN,)) if chats_first else ((TEXT_COLUMN,), *CHATS):
        if all(column in columns for column in known):
            return known
    if len(strings) == 1:
        return (strings[0],)
    raise CheckpointError(f"{where} has no column 'text' (it has {listed}). Name one with --text-column.")


def texts_in(where: str, rows: Iterable[Row], columns: tuple[str, ...], spell: Spell) -> tuple[list[Spelled], bool]:
    """The text of each row, and whether these are conversations, of which empty ones have none.

    Raises:
        CheckpointError: a row holds neither text nor a conversation, or one that cannot be spelled; the row is named.
    """
    texts, is_chat = list[Spelled](), len(columns) > 1
    for number, row in enumerate(rows, 1):
        first = row.get(columns[0])
        if len(columns) == 1 and (first is None or isinstance(first, str)):
            texts.append(Spelled(first or ""))
            continue
        is_chat = True
        try:
            turns = _conversation(row, columns)
            texts.append(spell(turns) if turns else Spelled(""))
        except CheckpointError as error:
            raise CheckpointError(f"{where}, row {number}: {error}") from error
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{where}, row {number}: {' and '.join(columns)} hold no conversation (turns with role and content, "
                "from and value, or plain text)."
            ) from error
    return texts, is_chat


def _conversation(row: Row, columns: tuple[str, ...]) -> list[Message]:
    if len(columns) == 1:
        return [_message(turn) for turn in row[columns[0]]]
    asked, answered = row[columns[0]], row[columns[1]]
    if columns[0] == "instruction" and asked is not None and row.get("input"):
        asked = f"{asked}\n\n{row['input']}"
    system = (
        [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []
    )
    turns = [*_turns("user", asked), *_turns(ASSISTANT, answered)]
    return [*system, *turns] if turns else []


def _turns(role: str, said: Any) -> list[Message]:
    if said is None:
        return []
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return [_message(turn) for turn in said]


def _message(turn: Any) -> Message:
    role, said = ("role", "content") if "role" in turn else ("from", "value")
    role, content = turn[role], turn.get(said) if turn.get("tool_calls") else turn[said]
    if content is None:
        content = ""
    if not isinstance(content, str):  # parts of several kinds
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    return {"role": ROLES.get(role, role), "content": content}
