"""What an Apple GPU refuses, on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, GPU = torch.device("cpu"), torch.device("mps")


class AppleGpu(TorchFunctionMode):
    """While active, tensors are on an Apple GPU until they are moved to the CPU, and refuse float64 there.

    What is made of no tensor, and for no device, is on the CPU. Models have to be loaded before.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on the CPU, wherever it seems to run."""
        given = [args, kwargs or {}]
        tensors = [own for own in tree_leaves(given) if isinstance(own, torch.Tensor)]
        if function == torch.Tensor.device.__get__:
            return CPU if _is_on_cpu(args[0]) else GPU
        named = [own for own in tree_leaves(given) if isinstance(own, torch.device)]
        named += [CPU] if function is torch.Tensor.cpu else []
        args, kwargs = tree_map(lambda own: CPU if own == GPU else own, given)
        result = function(*args, **kwargs)
        is_on_cpu = named[-1] == CPU if named else all(map(_is_on_cpu, tensors))

        def placed(own: Any) -> Any:
            if not isinstance(own, torch.Tensor):
                return own
            if own.dtype == torch.float64 and not is_on_cpu:
                raise TypeError("MPS has no float64")
            if named and any(own is before for before in tensors):
                own = own.view(own.shape)  # as a tensor that is moved is another one
            own.is_on_cpu = is_on_cpu  # type: ignore[attr-defined]
            return own

        return iter(tree_map(placed, [*result])) if isinstance(result, Iterator) else tree_map(placed, result)


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "is_on_cpu", False)
