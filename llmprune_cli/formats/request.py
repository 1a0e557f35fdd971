"""What an export is asked for, refused in a moment where it cannot be had: nothing large is loaded for that."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from llmprune_cli.errors import MissingPackageError, UsageError
from llmprune_cli.folder.tensors import SHORT_DTYPES
from llmprune_cli.options import Conversion

FLOATS = tuple(SHORT_DTYPES.values())
LEGACY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # blocks of one kind, which the gguf package encodes
MIXES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_m")  # llama.cpp encodes these
# What `--dtype` takes in each format.
FORMAT_DTYPES = {
    "safetensors": FLOATS,
    "gguf": (*FLOATS, *MIXES, *LEGACY),
    "onnx": ("float32", "float16"),
    "genai": ("float32", "int8", "int4"),
    "torch-export": FLOATS,
}
FILES = (".gguf", ".onnx", ".pt2", ".safetensors")


def check_conversion(conversion: Conversion, output: Path) -> None:
    """Refuse what a format does not have, or cannot be written in without a package that is missing.

    Raises:
        UsageError: options that it does not have.
        MissingPackageError: see above.
    """
    name = conversion.format
    if conversion.dtype is not None and conversion.dtype not in FORMAT_DTYPES[name]:
        raise UsageError(f"--format {name} has no --dtype {conversion.dtype}.{_other(conversion.dtype, name)}")
    if output.suffix in FILES:
        raise UsageError(f"--output names a folder, and {output} looks like a file.")
    if conversion.converter is not None and name != "gguf":
        raise UsageError("--converter writes gguf; give --format gguf with it.")
    if conversion.converter is not None and not conversion.converter.is_file():
        raise UsageError(f"--converter: {conversion.converter} is not a file.")
    if not conversion.kv_cache and name != "onnx":
        raise UsageError("--no-kv-cache is about onnx; give --format onnx with it.")
    if name == "gguf":
        _check_packages(conversion)


def _other(dtype: str, form: str) -> str:
    """Which dtype may have been meant, and which there are."""
    shown = {long: short for short, long in SHORT_DTYPES.items()} if form == "gguf" else {}
    names = [shown.get(known, known) for known in FORMAT_DTYPES[form]]
    near = [known for known in names if known.startswith(dtype)] or get_close_matches(dtype, names, 1)
    return (f" Did you mean {near[0]}?" if near else "") + f" It has {', '.join(names)}."


def _check_packages(conversion: Conversion) -> None:
    if find_spec("gguf") is None:
        raise MissingPackageError("Writing GGUF needs the gguf package: pip install 'llmprune[gguf]'.")
    if conversion.dtype in MIXES and conversion.converter is None and find_spec("xllamacpp") is None:
        raise MissingPackageError(
            f"{conversion.dtype} is encoded by llama.cpp, which the xllamacpp package brings: pip install "
            "'llmprune[gguf,llamacpp]'. q8_0, q5_0 and q4_0 do without."
        )
