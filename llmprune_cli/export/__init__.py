"""Exports: one module per format, each a `Format` named in `FORMATS`."""

from __future__ import annotations

from llmprune_cli.export.formats import Format
from llmprune_cli.export.genai import GENAI
from llmprune_cli.export.gguf.writing import GGUF
from llmprune_cli.export.onnx_graph import ONNX
from llmprune_cli.export.safetensors import SAFETENSORS
from llmprune_cli.export.torch_export import TORCH_EXPORT

FORMATS: dict[str, Format] = {
    "safetensors": SAFETENSORS,
    "gguf": GGUF,
    "onnx": ONNX,
    "genai": GENAI,
    "torch-export": TORCH_EXPORT,
}
