"""Tokens are ranked by their use in a text and by what the model itself expects there."""

import pytest
import torch

from llmprune_cli.vocabulary.choice import rank_tokens
from support.opened import Opened


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
