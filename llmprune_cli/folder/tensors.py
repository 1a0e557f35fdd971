"""Tensors by what a header says of them: name, shape and the kind of their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dtype:
    """One kind of numbers that a tensor is stored in."""

    code: str  # safetensors' name, for example "BF16"
    torch: torch.dtype
    is_weight: bool = False  # whether a model computes with it as it is; otherwise it counts, or is quantized
    short: str = ""  # what other tools call it, of those that weights can be converted to

    @property
    def name(self) -> str:
        """What torch, transformers and `--dtype` call it, for example "bfloat16"."""
        return str(self.torch).removeprefix("torch.")

    @property
    def size_bytes(self) -> int:
        """Bytes of one number."""
        return self.torch.itemsize


# By safetensors' names.
DTYPES = {
    dtype.code: dtype
    for dtype in (
        Dtype("F64", torch.float64, is_weight=True),
        Dtype("F32", torch.float32, is_weight=True, short="f32"),
        Dtype("F16", torch.float16, is_weight=True, short="f16"),
        Dtype("BF16", torch.bfloat16, is_weight=True, short="bf16"),
        Dtype("F8_E4M3", torch.float8_e4m3fn),
        Dtype("F8_E5M2", torch.float8_e5m2),
        Dtype("F8_E8M0", torch.float8_e8m0fnu),
        Dtype("I64", torch.int64),
        Dtype("I32", torch.int32),
        Dtype("I16", torch.int16),
        Dtype("I8", torch.int8),
        Dtype("U64", torch.uint64),
        Dtype("U32", torch.uint32),
        Dtype("U16", torch.uint16),
        Dtype("U8", torch.uint8),
        Dtype("BOOL", torch.bool),
    )
}
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
SHORT_DTYPES = {dtype.short: dtype.name for dtype in DTYPES.values() if dtype.short}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, known from a header."""

    name: str  # as `save_pretrained` writes it today
    shape: Shape
    dtype: str  # safetensors' name, for example "BF16"
    shard: str | None  # file name inside the folder; None where there are no weights
    stored_name: str | None = None  # what the shard calls it, where that is another name

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.numel * DTYPES[self.dtype].size_bytes


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor name's template and its numbers: `model.layers.3.mlp.up_proj.weight` gives `…layers.{}.mlp…`, (3,)."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    return ".".join("{}" if part.isdigit() else part for part in parts), numbers
