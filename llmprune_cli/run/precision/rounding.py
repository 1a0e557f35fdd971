"""Products of float32 matrices that may round what they multiply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def can_round() -> bool:
    """Whether this PyTorch lets a CPU round what float32 matrices multiply, as it does from 2.9 on."""
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) is not None


@contextmanager
def rounding_to(dtype: torch.dtype) -> Iterator[None]:
    """Within it, a CPU may round what float32 matrices multiply to bfloat16, and sums it in float32.

    oneDNN forms the products then, which on AMD's processors takes half as long as what forms them otherwise, without
    any rounding.

    Args:
        dtype: of the computation; for any other than bfloat16 nothing is rounded.
    """
    if dtype != torch.bfloat16 or not can_round():
        yield
        return
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
