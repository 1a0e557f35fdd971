"""Ridge regression of a weight from second moments of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmprune_cli.processes import Processes

DAMPING = 0.5  # of every refit, relative to the mean diagonal of the Gram matrix
PRODUCT_ELEMENTS = 2**25  # of XᵀX that are formed at a time: 128 MiB in float32


@dataclass
class Moments:
    """Second moments, in float64, of a reader's inputs x and of what it should make of them, y."""

    gram: torch.Tensor  # XᵀX, [U, U]
    cross: torch.Tensor  # YᵀX, [O, U]
    total: float = 0.0  # ‖Y‖²

    @classmethod
    def zero(cls, outputs: int, inputs: int, device: torch.device | str = "cpu") -> Moments:
        """Of no tokens, on a device that has float64."""
        place = torch.device("cpu" if torch.device(device).type == "mps" else device)
        gram, cross = (torch.zeros(n, inputs, dtype=torch.float64, device=place) for n in (inputs, outputs))
        return cls(gram, cross)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor | None) -> None:
        """Add tokens: x [n, U] and y [n, O]; products in float32, of rows of U numbers at a time, to bound memory."""
        inputs = inputs.float()
        rows = max(1, PRODUCT_ELEMENTS // inputs.shape[1])
        for first in range(0, inputs.shape[1], rows):
            part = inputs[:, first : first + rows]
            self.gram[first : first + rows] += (part.T @ inputs).to(self.gram.device)
        if outputs is not None:
            self.cross += (outputs.T @ inputs).to(self.cross.device)
            self.total += float(outputs.cpu().double().square().sum())

    def add_up(self, processes: Processes) -> None:
        """Let it be of the tokens of all processes."""
        processes.sum_(self.gram, self.cross)
        (self.total,) = processes.add_up(self.total)

    def aim_at(self, matrix: torch.Tensor) -> None:
        """Let y be what this weight [O, U] makes of x, plus the y that were added."""
        for rows in self._slabs():
            wide = self.widened(matrix[rows])
            own = wide @ self.gram
            self.total += float(((own + 2 * self.cross[rows]) * wide).sum())
            self.cross[rows] += own

    @property
    def is_finite(self) -> bool:
        """Whether no product was NaN or too large for float32."""
        return bool(self.gram.sum().isfinite() and self.cross.sum().isfinite())

    def error(self, matrix: torch.Tensor, kept: torch.Tensor) -> float:
        """‖Y − WX‖² of a weight [O, U] that is zero but for the kept inputs [k]."""
        change, kept = 0.0, kept.to(self.gram.device)
        gram = self.gram[kept[:, None], kept]
        for rows in self._slabs():
            wide = self.widened(matrix[rows])[:, kept]
            change += float(((wide @ gram - 2 * self.cross[rows][:, kept]) * wide).sum())
        return max(0.0, change + self.total)

    def _slabs(self) -> Iterator[slice]:
        """The outputs, so many at a time that products of them with all inputs stay small."""
        size = max(1, PRODUCT_ELEMENTS // 4 // self.cross.shape[1])
        for first in range(0, len(self.cross), size):
            yield slice(first, first + size)

    def widened(self, matrix: torch.Tensor) -> torch.Tensor:
        """A weight where the moments are, in float64."""
        return matrix.to(self.gram.device).to(self.gram.dtype)

    def solve(self, matrix: torch.Tensor, kept: torch.Tensor, factor: torch.Tensor, strength: float) -> torch.Tensor:
        """See `solve_reader`; all outputs are solved with L, [k, k], where LLᵀ is the kept part of XᵀX + μI."""
        result = torch.zeros_like(matrix)
        places = kept.to(matrix.device)
        for rows in self._slabs():
            goals = self.cross[rows][:, kept] + strength * self.widened(matrix[rows][:, places])
            half = torch.linalg.solve_triangular(factor, goals.T, upper=False)
            solved = torch.linalg.solve_triangular(factor.mT, half, upper=True).T
            result[rows, places] = solved.to(matrix.dtype).to(matrix.device)
        return result


def only(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The weight with zeros for the inputs that go."""
    result = torch.zeros_like(matrix)
    result[:, kept] = matrix[:, kept]
    return result


def solve_reader(moments: Moments, matrix: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """The weight that best makes y from the kept inputs, pulled towards the weight that it replaces.

    W = argmin Σ_t ‖y_t − W x_t‖² + μ‖W − W₀‖² over the kept inputs, with μ = damping times the mean of the kept
    diagonal of XᵀX. The normal equations W (XᵀX + μI) = YᵀX + μW₀ are solved in float64 by Cholesky. (Least squares
    for the kept inputs: OSSCAR, arXiv 2403.12983, section 3; the pull is ridge regression towards W₀.) An input that is
    always zero keeps its weight.

    Args:
        matrix: W₀, [O, U].
        kept: indices of the inputs that stay, sorted, [k].
        damping: relative, above 0.

    Returns:
        [O, U], zero for the inputs that go.
    """
    kept = kept.to(moments.gram.device)
    inputs = moments.gram[kept[:, None], kept]
    strength = damping * float(inputs.diagonal().mean())
    if not strength > 0:
        return only(matrix, kept.to(matrix.device))
    inputs.diagonal().add_(strength)
    factor = inputs.mT  # the same, since it is symmetric, in the order in which it is factorised without a copy
    torch.linalg.cholesky(factor, out=factor)
    return moments.solve(matrix, kept, factor, strength)
