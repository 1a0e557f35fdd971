"""Exports: one module per format, each a `Format` named in `FORMATS`."""

from __future__ import annotations

from llmprune_cli.export.formats import Format
from llmprune_cli.export.gguf import GGUF
from llmprune_cli.export.safetensors import SAFETENSORS

FORMATS: dict[str, Format] = {"safetensors": SAFETENSORS, "gguf": GGUF}
