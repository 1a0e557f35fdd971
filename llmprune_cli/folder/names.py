"""Tensor names and shapes."""

from __future__ import annotations

Shape = tuple[int, ...]


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor name's template and its numbers: `model.layers.3.mlp.up_proj.weight` gives `…layers.{}.mlp…`, (3,)."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    return ".".join("{}" if part.isdigit() else part for part in parts), numbers
