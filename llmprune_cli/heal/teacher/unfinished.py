"""What a teacher predicts in the middle of a token that its student spells with several."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from llmprune_cli.heal.teacher.token_map import TokenMap


class Unfinished:
    """The chances of a student's next token, where what came before may be a part of a teacher's token.

    A teacher that reads "philosoph" as a token never saw "ers" follow, since it would have read "philosophers". So what
    it predicts there says little of the text. What counts is the chance of all texts in its tokens that begin with the
    pieces read so far and go on with piece k (the sum over the covering of arXiv 2412.03719). With p(v | r), what it
    predicts behind piece r, and J(s) = Σ J(r) p(v | r) over all r and all tokens v that pieces r + 1 … s spell, the
    chance of k behind piece n is in proportion to

        J(n) Σ p(v | n), over tokens v that begin with k,  +  Σ J(r) p(v | r), over r < n and v that r + 1 … n, k begin.

    Before each place the teacher has read the pieces, not the tokens that they spell.
    """

    def __init__(self, tokens: TokenMap, windows: torch.Tensor) -> None:
        """Find what may have begun in windows [B, T] of the student's tokens."""
        self._tokens = tokens
        self._predicted = windows.shape[1] - 1  # places of a window
        begun, spelled = [], []
        for token, piece, start, place in _begun(tokens, windows.tolist()):
            if piece is None:
                spelled.append((start, token, place))
            else:
                begun.append((start, token, place, piece))
        device = windows.device
        self._begun = torch.tensor(begun, dtype=torch.long, device=device).view(-1, 4).T
        self._begun_logs = torch.zeros(len(begun), dtype=torch.float64, device=device)  # log p of each
        self._spelled = torch.tensor(spelled, dtype=torch.long, device=device).view(-1, 3).T
        self._spelled_logs = [0.0] * len(spelled)
        self._ends: list[list[int]] = [[] for _ in range(windows.shape[0] * self._predicted)]
        for number, (_, _, place) in enumerate(spelled):
            self._ends[place].append(number)
        self._starts = [start for start, _, _ in spelled]
        self._joint: list[float] = []  # log J of each place, up to what is the same for a window

    def follow(self, places: slice, logs: torch.Tensor) -> torch.Tensor:
        """What the teacher predicts at some places of the windows, which are asked for in their order, each once.

        Args:
            places: of all windows but the last of each, B·(T−1).
            logs: log-probabilities of the teacher's tokens there, [n, V].

        Returns:
            Those of the student's tokens, [n, K].
        """
        assert places.start == len(self._joint)
        self._read(places, logs)
        self._joint.extend(self._summed(places))
        known, here = self._tokens.regroup(logs), _within(self._begun[2], places)
        if not len(here):
            return known
        starts, _, ends, pieces = self._begun[:, here]
        joint = torch.tensor(self._joint, dtype=torch.float64, device=logs.device)
        shares = (joint[starts] + self._begun_logs[here] - joint[ends]).exp()  # beside 1 for what is spelled whole
        rows = ends - places.start
        sums = shares.new_ones(len(logs)).index_add_(0, rows, shares)
        chances = known.exp() / sums[:, None].to(logs.dtype)
        chances.index_put_((rows, pieces), (shares / sums[rows]).to(logs.dtype), accumulate=True)
        return chances.clamp_min_(torch.finfo(logs.dtype).tiny).log_()

    def _read(self, places: slice, logs: torch.Tensor) -> None:
        """Keep log p of the tokens that begin behind some places."""
        here = _within(self._begun[0], places)
        self._begun_logs[here] = logs[self._begun[0, here] - places.start, self._begun[1, here]].double()
        here = _within(self._spelled[0], places)
        found = logs[self._spelled[0, here] - places.start, self._spelled[1, here]].tolist()
        for number, log in zip(here.tolist(), found, strict=True):
            self._spelled_logs[number] = log

    def _summed(self, places: slice) -> Iterator[float]:
        """Log J of some places."""
        joint = list(self._joint)
        for place in range(places.start, places.stop):
            logs = [joint[self._starts[number]] + self._spelled_logs[number] for number in self._ends[place]]
            if place % self._predicted == 0:
                joint.append(0.0)  # where nothing of the window was predicted yet
            elif logs:
                most = max(logs)
                joint.append(most + math.log(sum(math.exp(log - most) for log in logs)))
            else:
                joint.append(joint[-1])  # what no token spells tells nothing
            yield joint[-1]


def _begun(tokens: TokenMap, windows: list[list[int]]) -> Iterator[tuple[int, int | None, int, int]]:
    """Tokens of a teacher that the pieces of a text may begin.

    Yields:
        The token, the piece that follows in its spelling (none where it is whole), the place behind which it began, and
        that of the last piece read.
    """
    for number, window in enumerate(windows):
        first, predicted = number * (len(window) - 1), len(window) - 1
        for start in range(1, predicted):
            for place in range(start, predicted):
                ways = tokens.ways.get(tuple(window[start : place + 1]))
                if ways is None:
                    break
                for token, piece in ways:
                    yield token, piece, first + start - 1, first + place


def _within(numbers: torch.Tensor, places: slice) -> torch.Tensor:
    """Indices of those that are some places."""
    return torch.nonzero((numbers >= places.start) & (numbers < places.stop)).flatten()
