"""What a teacher predicts in the middle of a token that its student spells with several."""

from __future__ import annotations

import math

import torch

from llmprune_cli.heal.loss import LEAST
from llmprune_cli.heal.teacher.token_map import WHOLE, TokenMap


class Unfinished:
    """The chances of a student's next token, where what came before may be a part of a teacher's token.

    A teacher that reads "philosoph" as a token never saw "ers" follow, since it would have read "philosophers". So what
    it predicts there says little of the text. What counts is the chance of all texts in its tokens that begin with the
    pieces read so far and go on with piece k (the sum over the covering of arXiv 2412.03719). With p(v | r), what it
    predicts behind piece r, and J(s) = Σ J(r) p(v | r) over all r and all tokens v that pieces r + 1 … s spell, the
    chance of k behind piece n is in proportion to

        J(n) Σ p(v | n), over tokens v that begin with k,  +  Σ J(r) p(v | r), over r < n and v that r + 1 … n, k begin.

    Before each place the teacher has read the pieces, not the tokens that they spell; before a window, nothing.
    """

    def __init__(self, tokens: TokenMap, windows: torch.Tensor) -> None:
        """Find what may have begun in windows [B, T] of the student's tokens."""
        self._tokens = tokens
        self._predicted = windows.shape[1] - 1  # places of a window
        starts, ends, token, piece = _begun(tokens, windows.tolist())
        whole = piece == WHOLE
        self._begun = torch.stack((starts, ends, token, piece))[:, ~whole]
        self._spelled = torch.stack((starts, ends, token))[:, whole]
        self._begun_logs = torch.zeros(self._begun.shape[1], dtype=torch.float64)  # log p of each
        self._ways: list[list[tuple[int, int]]] = [[] for _ in range(len(windows) * self._predicted)]
        for number, (start, end) in enumerate(zip(*self._spelled[:2].tolist(), strict=True)):
            self._ways[end].append((start, number))
        self._spelled_logs = [0.0] * self._spelled.shape[1]
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
        for place in range(places.start, places.stop):
            self._joint.append(self._summed(place))
        chances, here = self._tokens.regroup(logs), _within(self._begun[1], places)
        if len(here):
            self._spread(chances, here, places.start)
        return chances.clamp_min_(torch.finfo(logs.dtype).tiny).log_()

    def _spread(self, chances: torch.Tensor, here: torch.Tensor, first: int) -> None:
        """Give the pieces that go on with what was begun their part, at places from the first one on."""
        starts, ends, _, pieces = self._begun[:, here]
        joint, rows = torch.tensor(self._joint, dtype=torch.float64), ends - first
        shares = joint[starts] + self._begun_logs[here] - joint[ends]  # logs, beside 0 for what is spelled whole
        most = shares.new_zeros(len(chances)).scatter_reduce_(0, rows, shares, "amax")
        shares, whole = (shares - most[rows]).exp(), (-most).exp()
        sums = whole.index_add(0, rows, shares)
        chances *= (whole / sums).to(chances.dtype).to(chances.device)[:, None]
        places_in = rows.to(chances.device), pieces.to(chances.device)
        chances.index_put_(places_in, (shares / sums[rows]).to(chances.dtype).to(chances.device), accumulate=True)

    def _read(self, places: slice, logs: torch.Tensor) -> None:
        """Keep log p of the tokens that begin behind some places."""
        here = _within(self._begun[0], places)
        self._begun_logs[here] = _gathered(logs, self._begun[0, here] - places.start, self._begun[2, here])
        here = _within(self._spelled[0], places)
        found = _gathered(logs, self._spelled[0, here] - places.start, self._spelled[2, here])
        for number, log in zip(here.tolist(), found.tolist(), strict=True):
            self._spelled_logs[number] = log

    def _summed(self, place: int) -> float:
        """Log J of a place."""
        if place % self._predicted == 0:
            return 0.0  # nothing of the window was predicted yet
        logs = [self._joint[start] + self._spelled_logs[number] for start, number in self._ways[place]]
        if not logs:
            return self._joint[-1]  # a row without a token, which no text has
        most = max(logs)
        return most + math.log(sum(math.exp(log - most) for log in logs))


def _begun(tokens: TokenMap, windows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of a teacher that the pieces of windows may begin: all of the same length, on the CPU.

    Returns:
        The places behind which they began, those of the last pieces read, the tokens, and the pieces that follow.
    """
    found: list[tuple[int, int, int, int]] = []
    for number, window in enumerate(windows):
        first, predicted = number * (len(window) - 1), len(window) - 1
        for start in range(1, predicted):
            for place in range(start, predicted):
                ways = tokens.ways.get(tuple(window[start : place + 1]))
                if ways is None:
                    break
                found.append((first + start - 1, first + place, ways.start, ways.stop - ways.start))
    starts, ends, firsts, counts = torch.tensor(found, dtype=torch.long).view(-1, 4).T
    each = torch.repeat_interleave(torch.arange(len(found)), counts)
    before = counts.cumsum(0) - counts
    numbers = firsts[each] + torch.arange(len(each)) - before[each]
    return starts[each], ends[each], *tokens.continued[:, numbers]


def _gathered(logs: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Some of the logs, in float64, which not every device has."""
    return logs[rows.to(logs.device), tokens.to(logs.device)].cpu().double().clamp_min(LEAST)


def _within(numbers: torch.Tensor, places: slice) -> torch.Tensor:
    """Indices of those that are some places."""
    return torch.nonzero((numbers >= places.start) & (numbers < places.stop)).flatten()
