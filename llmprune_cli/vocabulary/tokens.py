"""The tokens of a tokenizer.json: their numbers, what builds them, and which no text can do without."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from llmprune_cli.errors import UnsupportedError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of what has no token, in tokenizers that fall back to bytes
BYTE_LEVEL_SIZE = 256
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")  # of older BPE, which makes other tokens inside words


@dataclass(frozen=True)
class Tokens:
    """All tokens of a tokenizer of a kind that can be cut."""

    document: dict[str, Any]  # of tokenizer.json
    ids: dict[str, int]  # of the model's tokens and the added ones
    merges: dict[tuple[str, str], int]  # pairs that become one token, with their ranks; empty for Unigram
    rowless: tuple[str, ...] = ()  # added tokens that are none of these, see `with_rows`
    _built: dict[int, frozenset[int] | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def model(self) -> dict[str, Any]:
        """What splits words into tokens."""
        model: dict[str, Any] = self.document["model"]
        return model

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all tokens with their numbers."""
        return hashlib.sha256(json.dumps(sorted(self.ids.items())).encode()).hexdigest()

    @cached_property
    def by_id(self) -> dict[int, str]:
        """Tokens by their numbers."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def required(self) -> frozenset[int]:
        """Added and special tokens, the unknown one, and what spells any text: bytes, else all single characters.

        Of Unigram also the worst piece: by its score, unknown characters cost as much as ever beside other pieces.
        """
        model, own = self.model, _model_ids(self.model)
        found = {added["id"] for added in self.document.get("added_tokens") or ()}
        found |= {self.ids[token] for token in _processed(self.document.get("post_processor")) if token in self.ids}
        unknown = model.get("unk_token")
        found |= {own[unknown]} if unknown in own else set()
        found |= {model["unk_id"]} if model.get("unk_id") is not None else set()
        if isinstance(model["vocab"], list):
            scores = [score for _, score in model["vocab"]]
            found.add(scores.index(min(scores)))
        if is_byte_level(self.document):
            return frozenset(found | {own[token] for token in _byte_alphabet() if token in own})
        if model.get("byte_fallback"):
            return frozenset(found | {number for token, number in own.items() if BYTE.fullmatch(token)})
        return frozenset(found | {number for token, number in own.items() if len(token) == 1})

    def builders(self, number: int) -> frozenset[int] | None:
        """The other tokens that a token is made of on the way from its characters to itself.

        Nothing builds a token that no merges reach, where a word that is a token becomes it all the same. Elsewhere no
        text becomes such a token, so that it serves nothing, which is None.
        """
        if number not in self._built:
            token = self.by_id.get(number)
            self._built[number] = self._find_builders(token) if token is not None else None
        return self._built[number]

    def _find_builders(self, token: str) -> frozenset[int] | None:
        if not self.merges:
            return frozenset()
        unmerged: frozenset[int] | None = frozenset() if self.model.get("ignore_merges") else None
        passed: set[int] = set()
        parts = list(token)
        if any(part not in self.ids for part in parts):
            return unmerged
        passed.update(self.ids[part] for part in parts)
        while len(parts) > 1:
            ranks = [(self.merges.get(pair, -1), place) for place, pair in enumerate(pairwise(parts))]
            possible = [ranked for ranked in ranks if ranked[0] >= 0]
            if not possible:
                return unmerged
            place = min(possible)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            passed.add(self.ids[parts[place]])
        return frozenset(passed - {self.ids[token]})

    def closed(self, numbers: Iterable[int]) -> set[int]:
        """Tokens with all that builds them."""
        found = set(numbers)
        for number in [*found]:
            found |= self.builders(number) or frozenset()
        return found


def read_tokens(document: dict[str, Any], source: str) -> Tokens:
    """The tokens of a tokenizer.json.

    Args:
        source: the model, for messages.

    Raises:
        UnsupportedError: the tokenizer is of another kind than BPE and Unigram.
    """
    model = document.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    affixes = [isinstance(model, dict) and model.get(name) for name in AFFIXES]
    if kind not in ("BPE", "Unigram") or any(affixes):
        shown = f"{kind} with a prefix or suffix inside words" if any(affixes) else kind or "an unknown kind"
        raise UnsupportedError(
            f"{source} has a tokenizer of {shown}, whose tokens cannot be removed; BPE and Unigram can. Leave "
            "--vocab-size out."
        )
    assert isinstance(model, dict)
    ids = {added["content"]: added["id"] for added in document.get("added_tokens") or ()}
    merges = {pair: rank for rank, pair in enumerate(map(pair_of, model.get("merges") or ()))}
    return Tokens(document, {**_model_ids(model), **ids}, merges)


def with_rows(tokens: Tokens, rows: int) -> Tokens:
    """The same without added tokens that the model has no rows for, unless they are put around every text.

    Args:
        rows: of the embedding.
    """
    added, around = tokens.document.get("added_tokens") or (), {*_processed(tokens.document.get("post_processor"))}
    rowless = tuple(own["content"] for own in added if own["id"] >= rows and own["content"] not in around)
    document = {**tokens.document, "added_tokens": [own for own in added if own["content"] not in rowless]}
    ids = {token: number for token, number in tokens.ids.items() if token not in rowless}
    return Tokens(document, ids, tokens.merges, rowless) if rowless else tokens


def pair_of(merge: str | list[str]) -> tuple[str, str]:
    """The two parts of a merge, in either spelling."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def is_byte_level(document: dict[str, Any]) -> bool:
    """Whether the tokens are made of bytes, which characters stand for."""
    return any(step.get("type") == "ByteLevel" for step in _steps(document.get("pre_tokenizer"))) or any(
        step.get("type") == "ByteLevel" for step in _steps(document.get("decoder"))
    )


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if isinstance(step, dict):
        yield step
        for name in ("pretokenizers", "decoders", "processors"):
            for inner in step.get(name) or ():
                yield from _steps(inner)


def _processed(post_processor: Any) -> Iterator[str]:
    """The tokens that are put around every text."""
    for step in _steps(post_processor):
        for special in (step.get("special_tokens") or {}).values():
            yield from special["tokens"]
        yield from (step[name][0] for name in ("sep", "cls") if name in step)


def _model_ids(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    return {piece: number for number, (piece, _) in enumerate(vocabulary)}


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == BYTE_LEVEL_SIZE
    return alphabet
