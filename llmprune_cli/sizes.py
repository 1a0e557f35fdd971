"""Values as people write them: `5GB`, `6B`, `80%`, `0.25`, `3,7-9,-1`, `cuda:1`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune_cli.errors import UsageError

PARAMETER_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
WHOLE = r"[0-9]{1,18}"  # digits of a whole number, which fits into 64 bits
DECIMAL = rf"{WHOLE}(?:\.[0-9]+)?"
LEAST_PLAIN = 1000  # a number without a unit that is smaller was meant with one
BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `4GiB`.

    Raises:
        UsageError: the text is not a positive size.
    """
    match = re.fullmatch(rf"\s*({DECIMAL})\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * BYTE_UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size. Write it like 500MB, 5GB or 4GiB.{_meant(text, 'GiB')}")
    if match and not match[2] and size < LEAST_PLAIN:
        raise UsageError(f"{text!r} would be {size} bytes.{_meant(text, 'GiB')}")
    return size


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _meant(text: str, unit: str) -> str:
    """A question after the unit that a bare number lacks, or nothing."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f" Did you mean {number:g}{unit}?" if number > 0 else ""


# What other programs call the dtypes.
DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
}


def parse_dtype(text: str) -> str:
    """A dtype by torch's name, for `bf16` and the like, too; other names as they are, in small letters."""
    return DTYPES.get(text.lower(), text.lower())


def parse_ratio(text: str) -> float:
    """The fraction in `0.25` or `25%`.

    Raises:
        UsageError: neither.
    """
    found = re.fullmatch(r"\s*(-?[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%?)\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"a pruning ratio is a fraction such as 0.25 or 25%, not {text!r}.")
    ratio = float(found[1]) / (100 if found[2] else 1)
    if not found[2] and 1 < ratio < 100:
        raise UsageError(f"a pruning ratio is a fraction such as 0.25, not {text}. Did you mean {ratio:g}%?")
    return ratio


@dataclass(frozen=True)
class Budget:
    """The size that a model must not exceed, or how much faster it has to be."""

    amount: float
    kind: str  # "parameters", "bytes", "share" of the parameters, or "speedup"
    dtype: str | None = None  # that bytes are counted in, by its name for GGUF; None: as stored
    context: int | None = None  # tokens whose keys and values count, too; of a speedup, that are read before it writes

    @property
    def counted(self) -> str:
        """In which form bytes are counted, in words that follow "bytes"."""
        cached = f" with the KV cache of {self.context:,} tokens" if self.context is not None else ""
        return f"{f' as {self.dtype}' if self.dtype is not None else ''}{cached}"

    def to_json(self) -> dict[str, float | str]:
        """What is said of it, as a dictionary."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def limit(self, parameters: int, size_bytes: int) -> float:
        """The limit as a number of parameters, or of bytes, for a model of this size."""
        return self.amount * parameters if self.kind == "share" else self.amount

    def __str__(self) -> str:
        if self.kind == "speedup":
            return f"{self.amount:g} times as fast"
        share = f"{100 * self.amount:g}% of the parameters"
        return share if self.kind == "share" else f"{self.amount:,.0f} {self.kind}{self.counted}"


COUNTED_IN = re.compile(r"(.*?)\s*\bas\b\s*(\w+)\s*|(.*[KMG]i?B)as(\w+)", re.IGNORECASE)  # the latter without blanks


def parse_budget(text: str) -> Budget:
    """`6B` or `80%` of parameters, or `4GiB` of weights, also `4GiB as q4_k_m`.

    Raises:
        UsageError: none of these.
    """
    if re.fullmatch(r"\s*[0-9.]+\s*[KMG]i?B\s*", text, re.IGNORECASE) or COUNTED_IN.fullmatch(text):
        return parse_bytes(text)
    return parse_parameters(text, may_be_bytes=True)


def parse_bytes(text: str) -> Budget:
    """`4GiB` of weights as they are stored, or `4GiB as q4_k_m`.

    Raises:
        UsageError: neither.
    """
    found = COUNTED_IN.fullmatch(text)
    if found is None:
        return Budget(parse_size(text), "bytes")
    size, dtype = (found[1], found[2]) if found[2] else (found[3], found[4])
    return Budget(parse_size(size), "bytes", parse_dtype(dtype))


def parse_speedup(text: str) -> float:
    """How many times as fast: `1.5` or `1.5x`.

    Raises:
        UsageError: no such number.
    """
    found = re.fullmatch(rf"\s*({DECIMAL})\s*[x×]?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is not a number such as 1.5, for a model that is 1.5 times as fast.")
    return float(found[1])


def check_speedup(value: float) -> None:
    """How many times as fast.

    Raises:
        UsageError: that is not faster.
    """
    if not 1 < value < math.inf:
        raise UsageError(f"{value:g} times as fast is not faster. Ask for more than 1, such as 1.5.")


def parse_parameters(text: str, may_be_bytes: bool = False) -> Budget:
    """`6B`, `350M`, `1500000` or `80%`.

    Args:
        may_be_bytes: whether a size in bytes may have been meant by a number without a unit.

    Raises:
        UsageError: none of these, or not positive.
    """
    found = re.fullmatch(rf"\s*({DECIMAL})\s*([KMBT%]?)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UsageError(f"{text!r} is not a number of parameters such as 6B, 350M or 80%, or a size such as 4GiB.")
    amount, unit = float(found[1]), found[2].upper()
    if not unit and amount < LEAST_PLAIN:
        meant = _in_units(amount, may_be_bytes)
        raise UsageError(f"{text!r} would be a model without parameters. Did you mean {meant}?")
    if unit != "%":
        return Budget(amount * PARAMETER_UNITS.get(unit, 1), "parameters")
    if amount > 100:
        raise UsageError(f"{text!r} is more than the whole model.")
    return Budget(amount / 100, "share")


def _in_units(amount: float, may_be_bytes: bool) -> str:
    """What a number without a unit may have been meant as."""
    if amount <= 1:
        return f"{100 * amount:g}%"
    if amount > 100:
        return f"{amount:g}M"
    return ", ".join((f"{amount:g}B", *([f"{amount:g}GiB"] if may_be_bytes else []))) + f" or {amount:g}%"


# What each option for a target makes of its value.
TARGETS: dict[str, Callable[[Any], Budget]] = {
    "target": parse_budget,
    "target_params": parse_parameters,
    "target_size": parse_bytes,
    "target_speedup": lambda times: Budget(times, "speedup"),
}


def parse_count(text: str) -> Budget:
    """A number of tokens: as `parse_parameters`, and small ones, too.

    Raises:
        UsageError: none, or not positive.
    """
    if re.fullmatch(rf"\s*{WHOLE}\s*", text) and int(text):
        return Budget(float(text), "parameters")
    return parse_parameters(text)


def check_ratio(value: float) -> None:
    """A pruning ratio.

    Raises:
        UsageError: it is none.
    """
    if not 0 <= value < 1:
        raise UsageError(
            f"{100 * value:g}% is no pruning ratio: give a fraction from 0 up to, but not including, 1, such as 0.25 "
            "or 25%."
        )


def parse_number(text: str, kind: type[int] | type[float], least: int | None) -> int | float:
    """A number that an option takes.

    Args:
        least: that it has to be; None: any will do.

    Raises:
        UsageError: it is none, or less.
    """
    try:
        number: int | float | None = kind(text)
    except ValueError:
        number = None
    if number is None or (least is not None and number < least):
        what = f"a {'whole ' if kind is int else ''}number{f' from {least} on' if least is not None else ''}"
        raise UsageError(f"give {what}, not {text!r}.")
    return number


def check_seed(value: int) -> None:
    """A seed.

    Raises:
        UsageError: no library takes it.
    """
    if not 0 <= value < 2**32:
        raise UsageError(f"a seed is a whole number from 0 to {2**32 - 1}.")


def check_device(value: str) -> None:
    """The name of a device, wherever it is.

    Raises:
        UsageError: it is none.
    """
    kind, colon, number = value.partition(":")
    if value not in ("auto", "cpu", "cuda", "mps") and not (kind == "cuda" and colon and number.isdecimal()):
        raise UsageError("use auto, cpu, cuda, cuda:N or mps.")


def check_chart(value: Path) -> None:
    """The file of a chart.

    Raises:
        UsageError: it is of no kind that can be drawn.
    """
    if value.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"a chart is a .png or an .svg file, not {value.name!r}.")


MOST_LAYERS = 10_000  # that a range may name


def parse_layers(text: str) -> tuple[int, ...]:
    """Numbers and ranges of layers such as `3,7-9,-1`.

    Raises:
        UsageError: none of these.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(rf"\s*(-?{WHOLE})(?:-(-?{WHOLE}))?\s*", part)
        if found is None:
            raise UsageError(f"give layer numbers such as 3,7,-1 or 20-25, not {text!r}.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first > MOST_LAYERS:
            raise UsageError(f"{part.strip()!r} is no range of layers: write the smaller number first, as in 20-25.")
        numbers += range(first, last + 1)
    return tuple(numbers)


def check_config(value: Path) -> None:
    """The file of a recipe.

    Raises:
        UsageError: it is of no kind that can be written.
    """
    if value.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UsageError(f"a recipe is a .yaml or a .json file, not {value.name!r}.")


def parse_batch(text: str) -> int | None:
    """A number of windows, or `auto`, which is None.

    Raises:
        UsageError: neither.
    """
    if text == "auto":
        return None
    if not re.fullmatch(WHOLE, text) or int(text) < 1:
        raise UsageError(f"give a number of windows from 1, or auto, not {text!r}.")
    return int(text)
