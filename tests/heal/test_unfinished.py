"""What a teacher predicts in the middle of its own tokens, against all ways to spell a text, summed."""

from __future__ import annotations

import pytest
import torch

from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.heal.teacher.unfinished import Unfinished

SPELLINGS = [(0,), (1,), (2,), (0, 1), (0, 1, 2), (1, 2), (0, 0), (2, 0, 1, 1)]  # of the teacher's tokens, by number


def _tokens(spellings: list[tuple[int, ...]]) -> TokenMap:
    ways: dict[tuple[int, ...], list[tuple[int, int | None]]] = {}
    for number, spelling in enumerate(spellings):
        for end, piece in enumerate((*spelling[1:], None), start=1):
            ways.setdefault(spelling[:end], []).append((number, piece))
    return TokenMap(torch.arange(3), torch.tensor([own[0] for own in spellings]), ways)


def _chance(pieces: tuple[int, ...], logs: torch.Tensor, place: int = 0) -> float:
    """That a text which goes on after a place goes on with these pieces, whatever follows them."""
    if not pieces:
        return 1.0
    total = 0.0
    for number, spelling in enumerate(SPELLINGS):
        shared = min(len(spelling), len(pieces))
        if spelling[:shared] == pieces[:shared]:
            total += float(logs[place, number].exp()) * _chance(pieces[shared:], logs, place + shared)
    return total


@pytest.mark.parametrize("part", [1, 3, 4, 14])
def test_what_follows_is_what_all_spellings_say(part: int) -> None:
    generator = torch.Generator().manual_seed(1)
    windows = torch.tensor([[0, 0, 1, 2, 0, 1, 1, 2], [2, 0, 1, 1, 0, 0, 1, 0]])
    logs = (2 * torch.randn(2, 7, len(SPELLINGS), generator=generator, dtype=torch.float64)).log_softmax(-1)
    unfinished = Unfinished(_tokens(SPELLINGS), windows)
    flat = logs.flatten(0, 1)
    parts = [slice(first, min(first + part, 14)) for first in range(0, 14, part)]
    found = torch.cat([unfinished.follow(own, flat[own]) for own in parts]).view(2, 7, 3).exp()
    for window, log, rows in zip(windows.tolist(), logs, found, strict=True):
        for place in range(7):
            read = tuple(window[1 : place + 1])
            chances = torch.tensor([_chance((*read, piece), log) for piece in range(3)], dtype=torch.float64)
            assert torch.allclose(rows[place], chances / chances.sum(), atol=1e-12), place


def test_tokens_that_went_are_counted_by_their_spelling() -> None:
    tokens = _tokens(SPELLINGS)
    assert tokens.share_that_went(torch.tensor([[1, 1, 0, 2], [2, 1, 1, 1]])) == 0
    assert tokens.share_that_went(torch.tensor([[0, 1, 2, 0, 1, 2, 2]])) == 2 / 3  # abc abc c
    assert tokens.share_that_went(torch.tensor([[2, 0, 1, 0], [0, 0, 0, 1]])) == 3 / 5  # c ab a, aa ab


def test_where_no_token_went_nothing_changes() -> None:
    logs = torch.randn(5, 3, dtype=torch.float64).log_softmax(-1)
    unfinished = Unfinished(_tokens(SPELLINGS[:3]), torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert torch.allclose(unfinished.follow(slice(0, 5), logs), logs, atol=1e-12)


def test_chances_that_float32_cannot_hold_together_are_kept() -> None:
    logs = torch.full((400, len(SPELLINGS)), -90.0)
    logs[:, 5] = 0.0  # a token that is not in the text, so that the text becomes ever less probable
    unfinished = Unfinished(_tokens(SPELLINGS), torch.tensor([[0, *([0, 2] * 200)]]))
    found = unfinished.follow(slice(0, 400), logs)
    assert torch.isfinite(found).all() and torch.allclose(found.exp().sum(-1), torch.ones(400))
