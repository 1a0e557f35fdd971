"""See every product of values with a model's weights as it is computed, whatever module computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MATMULS: tuple[Any, ...] = (torch.matmul, torch.mm, torch.bmm)
MATMULS += (torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__)


@dataclass(frozen=True)
class Product:
    """Values times a weight, plus a bias where the same operation adds one."""

    parameter: str  # name of the weight
    axis: int  # of the parameter that is summed over
    expert: int | None  # which slice of a stacked parameter took part; None for a matrix
    values: Tensor  # [..., size of the axis]; rounded already where `QuickerAutocast` does that
    bias: Tensor | None
    result: Tensor  # [..., outputs]


Watcher = Callable[[Product], "Tensor | None"]  # told of a product; what it returns replaces the result
Collector = Callable[["Tensor", "Tensor"], None]  # told the tokens [n] and the results [n, outputs] of an expert


class Products(TorchFunctionMode):
    """While active, tells a watcher of every product with one of the given weights.

    Knows `linear`, `addmm` and `matmul` in all its spellings, of whole parameters and of slices along the first axis
    of stacked ones, transposed or not.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        watcher: Watcher,
        collected: Collector | None = None,
    ) -> None:
        """Watch these parameters, by name.

        Args:
            collected: told where `index_add_` adds what, which is how experts hand in their weighted results.
        """
        super().__init__()
        self._weights = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in weights}
        self._watcher = watcher
        self._collected = collected

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is functional.linear:
            return self._seen(args[0], args[1], -1, args[2] if len(args) > 2 else kwargs.get("bias"), result)
        if function is torch.addmm:
            return self._seen(args[1], args[2], -2, args[0], result)
        if function in MATMULS:
            return self._seen(args[0], args[1], -2, None, result)
        if function is torch.Tensor.index_add_ and self._collected is not None:
            self._collected(args[2], args[3])
        return result

    def _seen(self, values: Tensor, weight: Tensor, summed: int, bias: Tensor | None, result: Tensor) -> Tensor:
        found = self._weights.get(weight.untyped_storage().data_ptr())
        if found is None or weight.ndim != 2:
            return result
        name, whole = found
        if weight.stride() != whole.stride()[-2:]:
            summed = -3 - summed  # transposed
        expert = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0) if whole.ndim == 3 else None
        replaced = self._watcher(Product(name, whole.ndim + summed, expert, values, bias, result))
        return result if replaced is None else replaced
