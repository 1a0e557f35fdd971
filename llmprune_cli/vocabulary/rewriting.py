"""A tokenizer without some of its tokens: tokenizer.json and all that names tokens by number beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from llmprune_cli.errors import CheckpointError, PlanError, UnsupportedError, VerificationError, first_line
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.documents import read_json, write_json
from llmprune_cli.source.tokenizer import MOST_COMPANION_BYTES, PROCESSORS, vocabulary_files
from llmprune_cli.vocabulary.numbering import is_naming, new_numbers, renumbered
from llmprune_cli.vocabulary.tokens import Tokens, pair_of, read_tokens, with_rows


def cut_tokens(tokens: Tokens, kept: tuple[int, ...]) -> dict[str, Any]:
    """The tokenizer.json of the tokens that stay, under their new numbers.

    Args:
        kept: numbers of the tokens that stay, in their order.

    Raises:
        PlanError: a token that must stay is missing, or what builds one.
        VerificationError: the tokenizer gives other numbers than it should.
    """
    numbers, stays = new_numbers(kept), set(kept)
    missing = (tokens.required | tokens.closed(number for number in kept if number in tokens.by_id)) - stays
    if missing:
        raise PlanError(
            f"The plan's vocabulary lacks {tokens.by_id[min(missing)]!r}, without which others cannot be built. Make "
            "the plan anew."
        )
    model = {**tokens.model, **_cut_model(tokens.model, numbers)}
    added = [
        {**own, "id": numbers[own["id"]]} for own in tokens.document.get("added_tokens") or () if own["id"] in numbers
    ]
    changed = {"model": model, "added_tokens": added}
    for name in ("post_processor", "padding"):
        if name in tokens.document:
            changed[name] = _renumber_steps(tokens.document[name], numbers)
    document = {**tokens.document, **changed}
    _check(document, tokens, numbers)
    return document


def _cut_model(model: dict[str, Any], numbers: dict[int, int]) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if not isinstance(vocabulary, dict):
        pieces = [piece for number, piece in enumerate(vocabulary) if number in numbers]
        return {"vocab": pieces, "unk_id": numbers.get(model.get("unk_id", -1))}
    stays = {token: numbers[number] for token, number in vocabulary.items() if number in numbers}
    merges = []
    for merge in model["merges"]:
        first, second = pair_of(merge)
        if first in stays and second in stays and first + second in stays:
            merges.append(merge)
    return {"vocab": stays, "merges": merges}


def _renumber_steps(step: Any, numbers: dict[int, int]) -> Any:
    """A post-processor or the padding with new numbers in the places of old ones."""
    if isinstance(step, list):
        return [_renumber_steps(inner, numbers) for inner in step]
    if not isinstance(step, dict):
        return step
    found = {name: _renumber_steps(inner, numbers) for name, inner in step.items()}
    if "tokens" in step and "ids" in step:
        found["ids"] = [numbers[number] for number in step["ids"]]
    for name in ("sep", "cls"):
        if isinstance(step.get(name), list):
            found[name] = [step[name][0], numbers[step[name][1]]]
    if "pad_id" in step:
        return {**found, "pad_id": numbers[step["pad_id"]]} if step["pad_id"] in numbers else None
    return found


def _check(document: dict[str, Any], tokens: Tokens, numbers: dict[int, int]) -> None:
    """Hold the numbers that the `tokenizers` library gives against those of the rows."""
    from tokenizers import Tokenizer

    built = Tokenizer.from_str(json.dumps(document)).get_vocab()
    wanted = {tokens.by_id[old]: new for old, new in numbers.items() if old in tokens.by_id}
    wrong = [token for token in built.keys() | wanted.keys() if built.get(token) != wanted.get(token)]
    if wrong:
        raise VerificationError(
            f"The token {wrong[0]!r} would have the number {built.get(wrong[0])} and the row "
            f"{wanted.get(wrong[0])}. Nothing was kept; please report this."
        )


def open_tokens(checkpoint: Checkpoint) -> Tokens:
    """The tokens of a checkpoint's tokenizer that have a row, and those that every text has.

    Raises:
        UnsupportedError: it has no tokenizer.json, or one of another kind.
        CheckpointError: the file cannot be read.
    """
    from tokenizers import Tokenizer

    path = checkpoint.companions / "tokenizer.json"
    if not path.is_file() and checkpoint.source.endswith(".gguf"):
        raise UnsupportedError("the tokenizer within a GGUF file is read where --vocab-size N asks for it")
    if not path.is_file():
        raise UnsupportedError(
            f"{checkpoint.source} has no tokenizer.json, and no other tokenizer can be cut. Save its fast tokenizer "
            "with transformers, or leave --vocab-size out."
        )
    document = read_json(path, MOST_COMPANION_BYTES)
    try:
        tokens = with_rows(read_tokens(document, checkpoint.source), int(checkpoint.config.vocab_size))
        Tokenizer.from_file(str(path))
    except UnsupportedError:
        raise
    except Exception as error:  # what the library has against a file is of no kind of its own
        raise CheckpointError(f"{path} is no tokenizer that can be read: {first_line(error)}.") from error
    return tokens


def write_tokenizer(checkpoint: Checkpoint, folder: Path, kept: tuple[int, ...]) -> None:
    """Write the tokenizer of the tokens that stay over the copies of the old one's files.

    Raises:
        PlanError, VerificationError: see `cut_tokens`.
    """
    tokens = open_tokens(checkpoint)
    document, numbers, rowless = cut_tokens(tokens, kept), new_numbers(kept), tokens.rowless
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for path in vocabulary_files(checkpoint.companions):  # tokenizer.json says all that they say, and they more tokens
        (folder / path.name).unlink(missing_ok=True)
    _rewrite(folder / "tokenizer_config.json", lambda own: _without(_renumber_decoder(own, numbers), rowless))
    _rewrite(folder / "added_tokens.json", lambda own: {t: numbers[i] for t, i in own.items() if i in numbers})
    for name in ("generation_config.json", *PROCESSORS):
        _rewrite(folder / name, lambda own: {**own, **renumbered(own, numbers.get)})
    if rowless:
        _rewrite(folder / "special_tokens_map.json", lambda own: _without(own, rowless))


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.is_file():
        write_json(path, change(read_json(path, MOST_COMPANION_BYTES)))


def _renumber_decoder(settings: dict[str, Any], numbers: dict[int, int]) -> dict[str, Any]:
    found = {**settings, **renumbered(settings, numbers.get)}
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict):
        found["added_tokens_decoder"] = {
            str(numbers[int(number)]): token for number, token in added.items() if int(number) in numbers
        }
    return found


def _without(settings: dict[str, Any], tokens: Collection[str]) -> dict[str, Any]:
    """Settings that name none of these tokens, which transformers would add behind the last row again."""
    left = _unnamed({name: value for name, value in settings.items() if is_naming(name)}, tokens)
    return {name: left.get(name, value) for name, value in settings.items() if name in left or not is_naming(name)}


def _unnamed(value: Any, tokens: Collection[str]) -> Any:
    """What is left of a list or an object, however deep, without the texts of tokens and what describes one."""

    def is_one(inner: Any) -> bool:
        return (inner.get("content") if isinstance(inner, dict) else inner) in tokens

    if isinstance(value, list):
        return [_unnamed(inner, tokens) for inner in value if not is_one(inner)]
    if isinstance(value, dict):
        return {name: _unnamed(inner, tokens) for name, inner in value.items() if not is_one(inner)}
    return value
