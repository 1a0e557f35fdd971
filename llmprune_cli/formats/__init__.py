"""Exports: one module a format, and one line here, from which it gets into `--help` and the docs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from llmprune_cli.folder.tensors import SHORT_DTYPES

if TYPE_CHECKING:
    from llmprune_cli.formats.registry import Format

FLOATS = tuple(SHORT_DTYPES.values())
LEGACY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # blocks of one kind, which the gguf package encodes
MIXES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_m")  # llama.cpp encodes these


@dataclass(frozen=True)
class Entry:
    """What is known of a format before it is loaded."""

    place: str  # of its `Format`, `module:name`
    dtypes: tuple[str, ...]  # that `--dtype` takes


FORMATS = {
    "safetensors": Entry("safetensors:SAFETENSORS", FLOATS),
    "gguf": Entry("gguf.writing:GGUF", (*FLOATS, *MIXES, *LEGACY)),
    "onnx": Entry("onnx_graph:ONNX", ("float32", "float16")),
    "genai": Entry("genai:GENAI", ("float32", "int8", "int4")),
    "torch-export": Entry("torch_export:TORCH_EXPORT", FLOATS),
}


def load_format(name: str) -> Format:
    """A format by name."""
    entry = FORMATS[name]
    module, _, constant = entry.place.partition(":")
    form: Format = getattr(import_module(f"{__name__}.{module}"), constant)
    return replace(form, dtypes=entry.dtypes)
