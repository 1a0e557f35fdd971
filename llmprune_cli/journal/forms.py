"""How a remembered value lies in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llmprune_cli.folder.documents import replace_file

Value = TypeVar("Value")


class Form(Protocol[Value]):
    """One way to write values of a type."""

    suffix: str  # of the file

    def write(self, path: Path, value: Value) -> None:
        """Write a value, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """

    def read(self, path: Path) -> Value:
        """The value in a file.

        Raises:
            ValueError: it is damaged.
        """


class Json(Generic[Value]):
    """Values of a type as JSON, held to the type when they are read."""

    suffix = ".json"

    def __init__(self, kind: Any) -> None:
        """Of a dataclass, or whatever else pydantic knows."""
        self._adapter: TypeAdapter[Value] = TypeAdapter(kind)

    def write(self, path: Path, value: Value) -> None:
        """See `Form`."""
        plain = self._adapter.dump_python(value, mode="json")
        replace_file(path, [json.dumps(plain).encode()])  # pydantic alone would make null of infinity

    def read(self, path: Path) -> Value:
        """See `Form`."""
        try:
            return self._adapter.validate_json(path.read_bytes(), strict=True)
        except (OSError, ValidationError) as error:
            raise ValueError(str(error)) from error


class Numbers:
    """One tensor as safetensors."""

    suffix = ".safetensors"

    def write(self, path: Path, value: torch.Tensor) -> None:
        """See `Form`."""
        replace_file(path, [save({"numbers": value.contiguous()})])

    def read(self, path: Path) -> torch.Tensor:
        """See `Form`."""
        try:
            return load_file(path)["numbers"]
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(str(error)) from error
