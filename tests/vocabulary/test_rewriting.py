"""A tokenizer without some of its tokens gives back what the whole one gives back, under the numbers of the rows."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.families import EVERY
from support.tokenizers_of_kinds import SCRIPTS, UNMERGED, learn, spelled, strings

KINDS = ("byte-level", "whole words", "byte fallback", "unigram")


@functools.cache
def cut(kind: str) -> tuple[Any, Any, tuple[int, ...]]:
    """A whole tokenizer, one with every third of the tokens that may go, and the numbers of these."""
    from tokenizers import Tokenizer

    from llmprune_cli.vocabulary.rewriting import cut_tokens
    from llmprune_cli.vocabulary.tokens import read_tokens

    whole = learn(kind)
    tokens = read_tokens(json.loads(whole.to_str()), "a model")
    free = [number for number in sorted(tokens.ids.values()) if number not in tokens.required]
    unmerged = {tokens.ids[spelled(UNMERGED)]} if kind == "whole words" else set()
    kept = tuple(sorted(tokens.closed({*tokens.required, *free[::5], *unmerged})))
    assert len(tokens.required) < len(kept) < len(tokens.ids) - 20
    return whole, Tokenizer.from_str(json.dumps(cut_tokens(tokens, kept))), kept


def assert_alike(kind: str, text: str) -> None:
    whole, part, kept = cut(kind)
    for with_special in (True, False):
        before, after = (t.encode(text, add_special_tokens=with_special) for t in (whole, part))
        assert all(0 <= number < len(kept) for number in after.ids)
        assert part.decode(after.ids, False) == whole.decode(before.ids, False)
        special = {"<s>", "</s>", "<pad>"}
        assert [t for t in after.tokens if t in special] == [t for t in before.tokens if t in special]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10_000 if EVERY else 150, deadline=None)
@given(text=st.text())
def test_any_text_is_given_back_as_the_whole_tokenizer_gives_it_back(kind: str, text: str) -> None:
    assert_alike(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_eight_scripts_is_given_back(kind: str) -> None:
    for text in (*strings(), *(line[:end] for line in SCRIPTS for end in range(1, len(line) + 1, 7))):
        assert_alike(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_kept_tokens_gets_the_same_tokens(kind: str) -> None:
    whole, part, kept = cut(kind)
    by_number = {number: token for token, number in whole.get_vocab().items()}
    for new, old in enumerate(kept):
        assert part.id_to_token(new) == by_number[old]
    found = 0
    for line in SCRIPTS:
        for word in line.split():
            before, after = (t.encode(word, add_special_tokens=False) for t in (whole, part))
            if set(before.ids) <= set(kept):
                found += 1
                assert after.tokens == before.tokens
    assert found > 10


def test_a_word_that_is_a_token_without_merges_is_read_as_before_and_builds_on_nothing() -> None:
    whole, part, _ = cut("whole words")
    assert not any(spelled(UNMERGED) == "".join(merge) for merge in json.loads(whole.to_str())["model"]["merges"])
    for text in (f" {UNMERGED}", f"Ξεσκεπάζω την {UNMERGED} βδελυγμία"):
        before, after = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (whole, part))
        assert spelled(UNMERGED) in before.tokens and spelled(UNMERGED) in after.tokens
        assert part.decode(after.ids) == whole.decode(before.ids)


@pytest.mark.parametrize("has_bytes", [True, False])
def test_unknown_characters_cost_what_they_did_beside_unigram_pieces(has_bytes: bool) -> None:
    from tokenizers import Tokenizer, models

    from llmprune_cli.vocabulary.rewriting import cut_tokens
    from llmprune_cli.vocabulary.tokens import read_tokens

    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256 * has_bytes))]
    pieces += [("ab", -20.0), ("cd", -20.0), ("bcd", -1.0), ("zz", -100.0)]
    whole = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=has_bytes))
    tokens = read_tokens(json.loads(whole.to_str()), "a model")
    kept = tuple(sorted({*tokens.required, *(tokens.ids[token] for token in ("ab", "cd", "bcd"))}))
    part = Tokenizer.from_str(json.dumps(cut_tokens(tokens, kept)))
    assert part.encode("abcd").tokens == whole.encode("abcd").tokens == ["ab", "cd"]


def test_a_plan_without_what_builds_a_token_is_refused() -> None:
    from llmprune_cli.errors import PlanError
    from llmprune_cli.vocabulary.rewriting import cut_tokens
    from llmprune_cli.vocabulary.tokens import read_tokens

    tokens = read_tokens(json.loads(learn("byte-level").to_str()), "a model")
    last = max(number for number in tokens.ids.values() if number not in tokens.required)
    assert tokens.builders(last)
    with pytest.raises(PlanError, match="lacks"):
        cut_tokens(tokens, tuple(sorted({*tokens.required, last})))
    with pytest.raises(PlanError, match="lacks"):
        cut_tokens(tokens, tuple(sorted(tokens.required))[1:])
