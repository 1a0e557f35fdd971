"""Products of float32 matrices that may round what they multiply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def rounding_to(dtype: torch.dtype) -> Iterator[None]:
    """Within it, a CPU may round what float32 matrices multiply to bfloat16, and sums it in float32.

    oneDNN forms the products then, which on AMD's processors takes half as long as what forms them otherwise, without
    any rounding.

    Args:
        dtype: of the computation; for any other than bfloat16 nothing is rounded.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)  # of a CPU; not there before PyTorch 2.9
    before = getattr(products, "fp32_precision", None)
    if dtype != torch.bfloat16 or products is None or before is None:
        yield
        return
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
