"""How far one model's predictions are from another's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llmprune_cli.run.divergence import Side, compare, compare_all
from support.opened import Opened


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_the_divergence_is_that_of_all_next_tokens(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune_cli.run.divergence.LOGIT_ELEMENTS", 5 * 99)  # a window in parts
    with torch.inference_mode():
        ends, shape = opened.layered.load_ends(exact=True), (*opened.tokens.shape, 64)
        states = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        logs = [functional.log_softmax(ends.logits(own, 0)[:, :-1].double(), -1) for own in states]
        sides = [Side(ends, own, 0) for own in states]
        found, several = compare(sides[0], sides[1], opened.tokens), compare_all(sides[0], sides[::-1], opened.tokens)
    expected = float(functional.kl_div(logs[1], logs[0], reduction="sum", log_target=True)) / found.tokens
    nats = float(functional.nll_loss(logs[1].flatten(0, 1), opened.tokens[:, 1:].flatten()))
    assert expected > 0.1 and found.kl == pytest.approx(expected, rel=1e-4)
    assert several == [pytest.approx(expected, rel=1e-4), 0.0]
    assert found.perplexity_after == pytest.approx(torch.tensor(nats).exp().item(), rel=1e-4)
