"""Exports: one module a format, and one line here, from which it gets into `--help` and the docs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune_cli.formats.format import Format

# `module:name` of each `Format`, loaded when it is wanted.
FORMATS = {
    "safetensors": "safetensors:SAFETENSORS",
    "gguf": "gguf.writing:GGUF",
    "onnx": "onnx_graph:ONNX",
    "genai": "genai:GENAI",
    "torch-export": "torch_export:TORCH_EXPORT",
}


def load_format(name: str) -> Format:
    """A format by name."""
    module, _, constant = FORMATS[name].partition(":")
    form: Format = getattr(import_module(f"{__name__}.{module}"), constant)
    return form
