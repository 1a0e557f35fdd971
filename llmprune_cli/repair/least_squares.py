"""Ridge regression of a weight from second moments of its inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmprune_cli.processes import Processes

DAMPING = 0.5  # of every refit, relative to the mean diagonal of the Gram matrix
PRODUCT_ELEMENTS = 2**25  # of XᵀX that are formed at a time: 128 MiB in float32
ROWS = 512  # of inputs that are copied together
BLOCK = 256  # rows of XₖᵀXₖ that are formed together at least: of fewer, a product takes longer than what it saves


@dataclass
class Moments:
    """Second moments, in float64, of the k inputs of a reader that stay, xₖ, and of what it should make of them, y."""

    kept: torch.Tensor  # indices of the inputs that stay, sorted, [k]
    gram: torch.Tensor  # XₖᵀXₖ, [k, k]
    cross: torch.Tensor  # YᵀXₖ, [O, k]
    total: float = 0.0  # ‖Y‖²

    @classmethod
    def zero(cls, outputs: int, kept: torch.Tensor, device: torch.device | str = "cpu") -> Moments:
        """Of no tokens, on a device that has float64."""
        place = torch.device("cpu" if torch.device(device).type == "mps" else device)
        gram, cross = (torch.zeros(n, len(kept), dtype=torch.float64, device=place) for n in (len(kept), outputs))
        return cls(kept.to(place), gram, cross)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add tokens: x [n, U], and y [n, O].

        Products are in float32, of rows of U numbers at a time, to bound memory; XₖᵀXₖ is symmetric, so that little
        more than half of it is formed.
        """
        count, y = len(self.kept), outputs.float()
        kept = _columns(inputs, self.kept)
        most = max(1, PRODUCT_ELEMENTS // max(1, count))
        size = min(most, max(BLOCK, -(-count // 4)))
        for first in range(0, count, size):
            last = min(first + size, count)
            part = (kept[:, first:last].T @ kept[:, first:]).to(self.gram.device)
            self.gram[first:last, first:] += part
            self.gram[last:, first:last] += part[:, last - first :].T
        self.cross += (y.T @ kept).to(self.cross.device)
        self.total += float(torch.linalg.vector_norm(y.to(self.gram.device), dtype=torch.float64)) ** 2

    def add_up(self, processes: Processes) -> None:
        """Let it be of the tokens of all processes."""
        processes.sum_(*(sums for sums in (self.gram, self.cross) if sums.numel()))
        (self.total,) = processes.add_up(self.total)

    @property
    def is_finite(self) -> bool:
        """Whether no product was NaN or too large for float32."""
        return math.isfinite(self.total) and all(bool(own.sum().isfinite()) for own in (self.gram, self.cross))

    def error(self, matrix: torch.Tensor) -> float:
        """‖Y − WXₖ‖² of what a weight [O, U] makes of the kept inputs."""
        change = 0.0
        for rows in self._slabs():
            wide = self._widened(matrix[rows])
            change += float(((wide @ self.gram - 2 * self.cross[rows]) * wide).sum())
        return max(0.0, change + self.total)

    def _slabs(self) -> Iterator[slice]:
        """The outputs, so many at a time that products of them with all inputs stay small."""
        size = max(1, PRODUCT_ELEMENTS // 4 // max(1, self.cross.shape[1]))
        for first in range(0, len(self.cross), size):
            yield slice(first, first + size)

    def _widened(self, matrix: torch.Tensor) -> torch.Tensor:
        """The columns of a weight for the inputs that stay, where the moments are, in float64."""
        return matrix[:, self.kept.to(matrix.device)].to(self.gram.device).to(self.gram.dtype)

    def solve(self, matrix: torch.Tensor, factor: torch.Tensor, strength: float) -> torch.Tensor:
        """See `solve_reader`; all outputs are solved with L, [k, k], where LLᵀ is XₖᵀXₖ + μI."""
        result = torch.zeros_like(matrix)
        places = self.kept.to(matrix.device)
        for rows in self._slabs():
            goals = self.cross[rows] + strength * self._widened(matrix[rows])
            half = torch.linalg.solve_triangular(factor, goals.T, upper=False)
            solved = torch.linalg.solve_triangular(factor.mT, half, upper=True).T
            result[rows, places] = solved.to(matrix.dtype).to(matrix.device)
        return result


def _columns(inputs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Some of the inputs x [n, U] in float32, [n, k]; few rows at a time, as a copy of all takes memory."""
    if len(kept) == inputs.shape[1]:
        return inputs.float()
    places, found = kept.to(inputs.device), inputs.new_empty(len(inputs), len(kept), dtype=torch.float32)
    for rows, into in zip(inputs.split(ROWS), found.split(ROWS), strict=True):
        torch.index_select(rows.float(), 1, places, out=into)
    return found


def only(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The weight with zeros for the inputs that go."""
    result = torch.zeros_like(matrix)
    result[:, kept] = matrix[:, kept]
    return result


def solve_reader(moments: Moments, matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """The weight that best makes y from the kept inputs, pulled towards the weight that it replaces.

    W = argmin Σ_t ‖y_t − W x_t‖² + μ‖W − W₀‖² over the kept inputs, with μ = damping times the mean of the kept
    diagonal of XᵀX. The normal equations W (XᵀX + μI) = YᵀX + μW₀ are solved in float64 by Cholesky. (Least squares
    for the kept inputs: OSSCAR, arXiv 2403.12983, section 3; the pull is ridge regression towards W₀.) An input that is
    always zero keeps its weight.

    Args:
        matrix: W₀, [O, U].
        damping: relative, above 0.

    Returns:
        [O, U], zero for the inputs that go.
    """
    inputs = moments.gram.clone()
    strength = damping * float(inputs.diagonal().mean())
    if not strength > 0:
        return only(matrix, moments.kept.to(matrix.device))
    inputs.diagonal().add_(strength)
    factor = inputs.mT  # the same, since it is symmetric, in the order in which it is factorised without a copy
    torch.linalg.cholesky(factor, out=factor)
    return moments.solve(matrix, factor, strength)
