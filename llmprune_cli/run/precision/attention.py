"""Attention of a computation in bfloat16, on a CPU that is faster in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from llmprune_cli.run.precision.rounding import rounding_to


class Float32Attention(TorchFunctionMode):
    """While active, attention without gradients is formed in float32, of products that may round, see `rounding_to`.

    On an AMD processor with AVX-512 BF16 that takes two thirds of the time that PyTorch's kernel takes in bfloat16,
    whose products are MKL's. What comes out is rounded to bfloat16, as that kernel's is.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention or torch.is_grad_enabled():
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, _with_all_digits, (args, kwargs))
        with torch.autocast("cpu", enabled=False), rounding_to(torch.bfloat16):
            return function(*args, **kwargs).to(torch.bfloat16)


def _with_all_digits(tensor: torch.Tensor) -> torch.Tensor:
    """The same in float32; a mask that says yes or no stays."""
    return tensor.float() if tensor.is_floating_point() else tensor
