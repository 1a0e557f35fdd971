"""The export formats, one line each, from which they get into `--help` and the docs; and what a format has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llmprune_cli.folder.tensors import DTYPES, SHORT_DTYPES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from llmprune_cli.folder.checkpoint import Checkpoint

FLOATS = tuple(SHORT_DTYPES.values())
LEGACY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # blocks of one kind, which the gguf package encodes
MIXES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_m")  # llama.cpp encodes these


@dataclass(frozen=True)
class ExportOptions:
    """What every format is told."""

    dtype: str | None = None  # one of the format's; None keeps that of each tensor, in formats that can
    max_shard_bytes: int = 5 * 10**9
    converter: Path | None = None  # llama.cpp's convert_hf_to_gguf.py, which then writes instead
    kv_cache: bool = True  # whether a graph takes and gives keys and values
    importance: Mapping[str, torch.Tensor] | None = None  # of the inputs of matrices, see `measure_importance`


@dataclass(frozen=True)
class Fit:
    """Whether a runtime takes a model of some configuration."""

    loads: bool
    note: str = ""  # why not, or in which form


@dataclass(frozen=True)
class Continuation:
    """What a runtime makes of a prompt: the tokens that it chooses greedily, and what it chose them by."""

    tokens: torch.Tensor  # ids, [n]
    log_probs: torch.Tensor  # of the vocabulary at each of these places, float32 [n, V]; -inf where it was not said


class Runtime(Protocol):
    """Stock software with an exported model loaded."""

    def continue_greedily(self, prompt: torch.Tensor, tokens: int) -> Continuation:
        """Go on with a prompt (ids, [T]) by as many tokens, always the likeliest, ends of text included."""


@runtime_checkable
class Tokenizes(Protocol):
    """A runtime that has the tokenizer too."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens around it."""


@dataclass(frozen=True)
class Limits:
    """How far a runtime may be from transformers in float32."""

    kl: float  # mean KL(transformers ‖ runtime) of the next token, nats
    same_tokens: bool = True  # whether it has to choose the same tokens, near ties aside


@dataclass(frozen=True)
class Verification:
    """How an exported model compares with transformers in float32."""

    runtime: str  # its package and version
    prompts: int
    tokens: int  # that were chosen and compared
    kl: float  # mean KL(transformers ‖ runtime) of the next token, nats
    kl_limit: float  # larger for a model that transformers itself computes otherwise in bfloat16
    largest_difference: float  # of a log-probability, where transformers gives 1e-4 or more or nothing likelier
    same_tokens: float  # share of the tokens that transformers would have chosen too


# What a format may be from transformers in plain dtypes.
FLOAT_LIMITS = {"float32": Limits(1e-5), **dict.fromkeys(("float16", "bfloat16"), Limits(1e-3, same_tokens=False))}

Write = Callable[["Checkpoint", Path, ExportOptions, Callable[[int], None]], dict[str, str]]


@dataclass(frozen=True)
class Format:
    """One way to write a model."""

    runs_in: str  # the software that takes it, as users call it
    write: Write  # into a staging folder; progress is in bytes of the checkpoint; gives the SHA-256 of files it knows
    fit: Callable[[PretrainedConfig], Fit]  # known before anything is written
    loading: str  # how to load it, in Markdown, where FILE stands for the file and PATH for the folder
    dtypes: tuple[str, ...] = ()  # that `--dtype` takes, as the registry says
    file: str = ""  # pattern of the file's name
    package: str = ""  # that has to be importable to verify; none where nothing runs the result but transformers itself
    extra: str = ""  # of llmprune that installs it
    runtime: Callable[[Path], AbstractContextManager[Runtime]] | None = None  # opens what was written
    limits: Mapping[str, Limits] = field(default_factory=dict)  # by dtype
    keeps_dtypes: bool = False  # whether tensors may stay in different ones

    def dtype_for(self, checkpoint: Checkpoint) -> str:
        """The dtype for a checkpoint where none is asked for: that of its largest tensor, or else float32."""
        stored = DTYPES[max(checkpoint.entries, key=lambda entry: entry.numel).dtype].name
        return stored if stored in self.dtypes else "float32"


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
    form: Format = getattr(import_module(f"{__package__}.{module}"), constant)
    return replace(form, dtypes=entry.dtypes)
