"""Tensors by what a header says of them: name, shape and the kind of their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dtype:
    """One kind of numbers that a tensor is stored in."""

    code: str  # safetensors' name, for example "BF16"
    name: str  # what torch, transformers and `--dtype` call it, for example "bfloat16"
    size_bytes: int  # of one number
    is_weight: bool = False  # whether a model computes with it as it is; otherwise it counts, or is quantized
    short: str = ""  # what other tools call it, of those that weights can be converted to

    @property
    def torch(self) -> torch.dtype:
        """The same in torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


# By safetensors' names.
DTYPES = {
    dtype.code: dtype
    for dtype in (
        Dtype("F64", "float64", 8, is_weight=True),
        Dtype("F32", "float32", 4, is_weight=True, short="f32"),
        Dtype("F16", "float16", 2, is_weight=True, short="f16"),
        Dtype("BF16", "bfloat16", 2, is_weight=True, short="bf16"),
        Dtype("F8_E4M3", "float8_e4m3fn", 1),
        Dtype("F8_E5M2", "float8_e5m2", 1),
        Dtype("F8_E8M0", "float8_e8m0fnu", 1),
        Dtype("I64", "int64", 8),
        Dtype("I32", "int32", 4),
        Dtype("I16", "int16", 2),
        Dtype("I8", "int8", 1),
        Dtype("U64", "uint64", 8),
        Dtype("U32", "uint32", 4),
        Dtype("U16", "uint16", 2),
        Dtype("U8", "uint8", 1),
        Dtype("BOOL", "bool", 1),
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


# Lists whose items do other work than each other, or are none of layers: their numbers are part of a template.
UNLIKE = frozenset(("ffn", "altup_projections", "altup_unembed_projections"))

TOWERS = frozenset(("embed_tokens_extend",))  # parts of a name under which numbers are none of decoder layers


@lru_cache(maxsize=2**16)  # more than any model has
def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor name's template and its numbers: `model.layers.3.mlp.up_proj.weight` gives `…layers.{}.mlp…`, (3,)."""
    parts: list[str] = name.split(".")
    numbers: list[int] = []
    if not TOWERS.isdisjoint(parts):
        return name, ()
    for place, part in enumerate(parts):
        if part.isdigit() and (not place or parts[place - 1] not in UNLIKE):
            numbers.append(int(part))
            parts[place] = "{}"
    return ".".join(parts), tuple(numbers)
