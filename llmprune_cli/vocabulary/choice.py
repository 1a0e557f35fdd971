"""Which tokens stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llmprune_cli.errors import CheckpointError, PlanError, UsageError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import read_json
from llmprune_cli.progress import LOGGER
from llmprune_cli.run.divergence import check_loss, predicted
from llmprune_cli.run.layered_model import LayeredModel
from llmprune_cli.sizes import WHOLE
from llmprune_cli.source.tokenizer import MOST_COMPANION_BYTES, PROCESSORS, reader_of
from llmprune_cli.text.windows import spread_windows
from llmprune_cli.vocabulary.numbering import is_naming, named_tokens
from llmprune_cli.vocabulary.request import read_keep_file
from llmprune_cli.vocabulary.tokens import Tokens, is_byte_level

NAMING = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", *PROCESSORS)  # of tokens
ROLES = ("system", "user", "assistant", "tool")  # of turns, which chat templates write as conversations name them
SPACED = tuple(f" {role}" for role in ROLES)


def rank_tokens(
    model: LayeredModel,
    texts: Sequence[tuple[torch.Tensor, float]],
    tokens: int,
    rows: int,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """How much each token is used, [V]: its share of the text plus the mean probability that the model gives it there.

    Args:
        texts: windows of the whole of each text, [N, T], and what it counts for, however long it is.
        tokens: of them that the model is run on.
        progress: told after each layer.

    Raises:
        CheckpointError: see `check_loss`.
    """
    counts, expected = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))
    for windows, share in texts:
        counts += share / windows.numel() * torch.bincount(windows.flatten(), minlength=rows)
    part = torch.cat([spread_windows(windows, int(tokens * share)) for windows, share in texts])
    with torch.inference_mode():
        for states, items in model.walk(part):  # noqa: B007, what is behind the last layer
            progress(1)
        ends = model.load_ends(exact=True)
        for window, places, _ in predicted(ends, part):
            logits = ends.logits(states[window : window + 1, places], items)[0]
            expected += logits.softmax(-1).sum(0).cpu().double()  # which Apple GPUs do not have
    check_loss(float(expected.sum()))
    return counts / counts.sum() + expected / expected.sum()


def must_stay(tokens: Tokens, checkpoint: Checkpoint, rows: int, keep_file: Path | None) -> frozenset[int]:
    """The tokens that stay whatever the text: special ones, those that any text needs, those that settings name.

    Raises:
        UsageError: the file names tokens that there are not.
    """
    found = set(tokens.required) | named_tokens(checkpoint.config.to_dict()) | _of_chats(tokens, checkpoint)
    if checkpoint.whole is not None:
        found |= named_tokens(checkpoint.whole.config.to_dict())
    for settings in _settings_of(checkpoint, *NAMING):
        found |= named_tokens(settings) | {tokens.ids[text] for text in _spelled(settings) if text in tokens.ids}
    if keep_file is not None:
        found |= _read_keep_file(keep_file, tokens)
    return frozenset(number for number in tokens.closed(found) if number < rows)


def check_size(stays: Collection[int], size: int) -> None:
    """Hold that there is room for the tokens that must stay.

    Raises:
        PlanError: there is not.
    """
    if len(stays) > size:
        raise PlanError(
            f"{len(stays):,} tokens must stay (special ones, characters or bytes, those that --keep-tokens names), "
            f"which is more than {size:,}. Give a larger --vocab-size."
        )


def choose_tokens(tokens: Tokens, scores: torch.Tensor, stays: Collection[int], size: int) -> tuple[int, ...]:
    """The most used tokens with all that builds them, up to a number; the rest by the tokenizer's own order.

    Args:
        scores: see `rank_tokens`.
        stays: tokens that stay whatever their score.

    Returns:
        Numbers of tokens, in their order.
    """
    found = set(stays)
    used = scores.argsort(descending=True, stable=True).tolist()
    for number in (*used, *range(len(scores))):
        builders = tokens.builders(number)
        if number in found or builders is None:
            continue
        more = {number, *builders} - found
        if len(found) + len(more) <= size:
            found |= more
        if len(found) == size:
            break
    spare = [number for number in range(len(scores)) if number not in found and number not in tokens.by_id]
    rest = [number for number in range(len(scores)) if number not in found and number in tokens.by_id]
    found.update([*spare, *rest][: size - len(found)])
    return tuple(sorted(found))


def _settings_of(checkpoint: Checkpoint, *names: str) -> list[dict[str, Any]]:
    """What those of some files say that are there."""
    paths = (checkpoint.companions / name for name in names)
    return [read_json(path, MOST_COMPANION_BYTES) for path in paths if path.is_file()]


def _spelled(settings: dict[str, Any]) -> Iterator[str]:
    """The texts of tokens that settings name."""
    for name, value in settings.items():
        if is_naming(name):
            yield from _texts_in(value)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(inner)


def _of_chats(tokens: Tokens, checkpoint: Checkpoint) -> set[int]:
    """The tokens of what chat templates write themselves."""
    paths = (*checkpoint.companions.glob("*.jinja"), *checkpoint.companions.glob("additional_chat_templates/*.jinja"))
    templates = [_read_template(path) for path in paths]
    for settings in _settings_of(checkpoint, "tokenizer_config.json", "chat_template.json"):
        templates += _templates_in(settings.get("chat_template"))
    texts = {text for template in templates for text in (*ROLES, *SPACED, *_texts_of(template))}
    tokenizer = reader_of((checkpoint.companions / "tokenizer.json").read_text(encoding="utf-8"))
    behind = ("",) if is_byte_level(tokens.document) else ("", "\n")  # where a space is put before a text that begins
    read = [tokenizer.encode(before + text, add_special_tokens=False).ids for text in texts for before in behind]
    return {number for ids in read for number in ids}


def _templates_in(value: Any) -> Iterator[str]:
    """Chat templates of settings: one, or several with their names."""
    for own in value if isinstance(value, list) else [value]:
        yield from _texts_in(own.get("template") if isinstance(own, dict) and "template" in own else own)


def _texts_of(template: str) -> Iterator[str]:
    """The texts within a template's expressions and around them; of a faulty one those before the fault."""
    from jinja2 import Environment, TemplateError

    lexer = Environment(trim_blocks=True, lstrip_blocks=True).lexer  # as transformers reads templates
    with suppress(TemplateError, ValueError):
        for token in lexer.tokenize(template):
            if token.type in ("data", "string"):
                yield token.value


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start:,}. Correct it."
        ) from error


def _read_keep_file(path: Path, tokens: Tokens) -> set[int]:
    """The tokens that a file names: by their numbers where every line is one, else by their texts."""
    lines = read_keep_file(path)
    by_number = all(re.fullmatch(WHOLE, line) for line in lines)
    numbers = [int(line) if by_number else tokens.ids.get(line) for line in lines]
    for line, number in zip(lines, numbers, strict=True):
        if number not in tokens.by_id:
            raise UsageError(f"--keep-tokens {path} names {line!r}, which is no {_meant(line, by_number)}.")
    if by_number and (texts := [line for line in lines if line in tokens.ids]):
        LOGGER.warning(
            f"{path} names tokens by their numbers, since every line is one. The texts {', '.join(texts[:3])} are "
            "tokens, too: to name these, put a token beside them that is no number."
        )
    return {number for number in numbers if number is not None}


def _meant(line: str, by_number: bool) -> str:
    """What a line of a file of tokens was read as, and is not."""
    if by_number:
        return "number of a token; as every line is a whole number, all are read as such"
    is_number = re.fullmatch(WHOLE, line) is not None
    return "token of the model" + ("; only where every line is a whole number are they read as such" * is_number)
