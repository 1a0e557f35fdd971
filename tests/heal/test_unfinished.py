"""What a teacher predicts in the middle of its own tokens, against all ways to spell a text, summed."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from llmprune_cli.heal.teacher.token_map import TokenMap
from llmprune_cli.heal.teacher.unfinished import Unfinished

Spellings = list[tuple[int, ...]]

SPELLINGS: Spellings = [(0,), (1,), (2,), (0, 1), (0, 1, 2), (1, 2), (0, 0), (2, 0, 1, 1)]  # of the teacher's tokens
LONG: Spellings = [(0,), (1,), (2,), (*([0] * 12), 1)]


def tokens_of(spellings: Spellings) -> TokenMap:
    return TokenMap.of(torch.arange(3), spellings)


def expected(window: list[int], logs: torch.Tensor, place: int, spellings: Spellings) -> torch.Tensor:
    """The chances of the pieces behind a place: of all that the teacher may say which begins so."""

    def chance(pieces: tuple[int, ...]) -> torch.Tensor:
        @cache
        def from_place(start: int) -> torch.Tensor:
            if start >= len(pieces):
                return torch.zeros((), dtype=torch.float64)
            rest = pieces[start:]
            ways = [
                logs[start, number] + from_place(start + len(own))
                for number, own in enumerate(spellings)
                if own[: len(rest)] == rest[: len(own)]
            ]
            return torch.stack(ways).logsumexp(0)

        return from_place(0)

    read = tuple(window[1 : place + 1])
    return torch.stack([chance((*read, piece)) for piece in range(3)]).softmax(0)


def followed(spellings: Spellings, windows: torch.Tensor, logs: torch.Tensor, part: int) -> torch.Tensor:
    """Chances at all places of windows [B, T], from logs [B, T−1, V] in parts of so many: [B, T−1, 3]."""
    unfinished, every = Unfinished(tokens_of(spellings), windows), logs.flatten(0, 1)
    parts = [slice(first, min(first + part, len(every))) for first in range(0, len(every), part)]
    return torch.cat([unfinished.follow(own, every[own]) for own in parts]).view(*logs.shape[:2], 3).exp()


@pytest.mark.parametrize("part", [1, 3, 4, 14])
def test_what_follows_is_what_all_spellings_say(part: int) -> None:
    generator = torch.Generator().manual_seed(1)
    windows = torch.tensor([[0, 0, 1, 2, 0, 1, 1, 2], [2, 0, 1, 1, 0, 0, 1, 0]])
    logs = (2 * torch.randn(2, 7, len(SPELLINGS), generator=generator, dtype=torch.float64)).log_softmax(-1)
    found = followed(SPELLINGS, windows, logs, part)
    for window, log, rows in zip(windows.tolist(), logs, found, strict=True):
        for place in range(7):
            assert torch.allclose(rows[place], expected(window, log, place, SPELLINGS), atol=1e-12), place


def test_text_that_is_hardly_possible_is_followed_to_its_end() -> None:
    generator = torch.Generator().manual_seed(2)
    window = [0, *([0, 1, 2, 0, 1, 1] * 12)]
    logs = (60 * torch.randn(1, 72, len(SPELLINGS), generator=generator, dtype=torch.float64)).log_softmax(-1)
    found = followed(SPELLINGS, torch.tensor([window]), logs, 10)
    for place in range(72):
        assert torch.allclose(found[0, place], expected(window, logs[0], place, SPELLINGS), atol=1e-10), place


@pytest.mark.parametrize("least", [-90.0, -2000.0, -torch.inf])
def test_a_token_that_is_sure_goes_on_to_its_end(least: float) -> None:
    logs = torch.full((1, 20, len(LONG)), least)
    logs[..., 3] = 0.0
    found = followed(LONG, torch.tensor([[2, *([0] * 12), 1, *([2] * 7)]]), logs, 5)[0]
    assert torch.equal(found[:13].argmax(-1), torch.tensor([0] * 12 + [1]))
    assert torch.allclose(found.sum(-1), torch.ones(20)) and bool((found[:13].amax(-1) > 0.99).all())


def test_tokens_that_went_are_counted_by_their_spelling() -> None:
    tokens = tokens_of(SPELLINGS)
    assert tokens.share_that_went(torch.tensor([[1, 1, 0, 2], [2, 1, 1, 1]])) == 0
    assert tokens.share_that_went(torch.tensor([[0, 1, 2, 0, 1, 2, 2]])) == 2 / 3  # abc abc c
    assert tokens.share_that_went(torch.tensor([[2, 0, 1, 0], [0, 0, 0, 1]])) == 3 / 5  # c ab a, aa ab


def test_where_no_token_went_nothing_changes() -> None:
    logs = torch.randn(1, 5, 3, dtype=torch.float64).log_softmax(-1)
    found = followed(SPELLINGS[:3], torch.tensor([[0, 1, 2, 0, 1, 2]]), logs, 5)
    assert torch.allclose(found, logs.exp(), atol=1e-12)
