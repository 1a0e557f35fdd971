"""Sizes as people write them: `5GB`, `6B`, `80%`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmprune_cli.errors import UsageError

PARAMETER_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `4GiB`.

    Raises:
        UsageError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * BYTE_UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size. Write it like 500MB, 5GB or 4GiB.")
    return size


@dataclass(frozen=True)
class Budget:
    """The size that a model must not exceed."""

    amount: float
    kind: str  # "parameters", "bytes" or "share" of the parameters

    def limit(self, parameters: int, size_bytes: int) -> float:
        """The limit as a number of parameters, or of bytes, for a model of this size."""
        return self.amount * parameters if self.kind == "share" else self.amount

    def __str__(self) -> str:
        share = f"{100 * self.amount:g}% of the parameters"
        return share if self.kind == "share" else f"{self.amount:,.0f} {self.kind}"


def parse_parameters(text: str) -> Budget:
    """`6B`, `350M`, `1500000` or `80%`.

    Raises:
        UsageError: none of these, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMBT%]?)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UsageError(f"{text!r} is not a number of parameters such as 6B, 350M or 80%.")
    amount, unit = float(found[1]), found[2].upper()
    if unit != "%":
        return Budget(amount * PARAMETER_UNITS.get(unit, 1), "parameters")
    if amount > 100:
        raise UsageError(f"{text!r} is more than the whole model.")
    return Budget(amount / 100, "share")
