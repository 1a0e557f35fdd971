"""Tokens are ranked by their use in a text and by what the model itself expects there."""

import json

import pytest
import torch

from llmprune_cli.vocabulary.choice import choose_tokens, rank_tokens
from llmprune_cli.vocabulary.tokens import read_tokens
from support.opened import Opened
from support.tokenizers_of_kinds import UNMERGED, learn, spelled


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_token_is_worth_its_use_and_what_the_model_expects_of_it(opened: Opened) -> None:
    rows = opened.subject.checkpoint.config.vocab_size
    texts = [(opened.tokens[:1], 0.75), (opened.tokens[1:], 0.25)]  # what they count for is not what they are long
    found = rank_tokens(opened.layered, texts, 100 * opened.tokens.numel(), rows, lambda _: None)
    shares = [torch.bincount(own.flatten(), minlength=rows).double() / own.numel() for own, _ in texts]
    used = 0.75 * shares[0] + 0.25 * shares[1]
    with torch.no_grad():
        expected = opened.model(opened.tokens).logits[:, :-1].softmax(-1).double().mean((0, 1))
    torch.testing.assert_close(found, used + expected, rtol=0, atol=1e-5)
    assert float(expected[used == 0].max()) > 0.005  # which use alone would not tell from any other


@pytest.mark.parametrize(("kind", "stays"), [("whole words", True), ("byte-level", False)])
def test_a_used_token_that_no_merges_make_stays_where_words_that_are_tokens_become_them(kind: str, stays: bool) -> None:
    document = json.loads(learn("whole words").to_str())
    document["model"]["ignore_merges"] = kind == "whole words"
    tokens = read_tokens(document, "a model")
    number = tokens.ids[spelled(UNMERGED)]
    assert tokens.builders(number) == (frozenset() if stays else None)
    scores = torch.zeros(len(tokens.ids)).index_fill(0, torch.tensor([number]), 1.0)
    kept = choose_tokens(tokens, scores, tokens.required, len(tokens.required) + 8)
    assert (number in kept) == stays
