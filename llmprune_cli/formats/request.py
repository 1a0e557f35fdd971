"""What an export is asked for, refused in a moment where it cannot be had: nothing large is loaded for that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from llmprune_cli.errors import MissingPackageError, UsageError
from llmprune_cli.folder.documents import is_there
from llmprune_cli.folder.tensors import SHORT_DTYPES
from llmprune_cli.formats.registry import FORMATS, MIXES
from llmprune_cli.options import EVALUATION, METHOD, OUTPUT, Option
from llmprune_cli.sizes import parse_dtype, parse_size
from llmprune_cli.text.names import check_texts

NEEDED = {"onnx": ("onnx", "onnxscript"), "genai": ("onnxruntime_genai",)}  # to write a format, by module
FILES = (".gguf", ".onnx", ".pt2", ".safetensors")


@dataclass(frozen=True)
class Conversion:
    """What an export writes."""

    format: Annotated[str, Option("What to write.", OUTPUT, is_common=True)] = "safetensors"
    dtype: Annotated[
        str | None,
        Option(
            "Dtype to write; for gguf also q4_k_m and the like, for genai int4 and int8.",
            OUTPUT,
            left_out="as stored",
            is_common=True,
            parse=parse_dtype,
        ),
    ] = None
    verify: Annotated[
        bool | None,
        Option(
            "Compare with transformers in the runtime of the format.",
            EVALUATION,
            left_out="where it is installed",
            is_common=True,
        ),
    ] = None
    converter: Annotated[Path | None, Option("llama.cpp's convert_hf_to_gguf.py, to write gguf with.", METHOD)] = None
    imatrix: Annotated[
        str | None,
        Option(
            "Text (a file, a folder or a hub dataset) on which a gguf mix measures where to round with more care.",
            METHOD,
        ),
    ] = None
    compat: Annotated[
        bool, Option("Changes nothing: config.json is always written for readers of older ones too.", METHOD)
    ] = False
    kv_cache: Annotated[bool, Option("Whether an onnx graph has a key-value cache.", METHOD)] = True
    max_shard_size: Annotated[str, Option("Largest shard, such as 500MB or 5GB.", OUTPUT, check=parse_size)] = "5GB"


def check_conversion(conversion: Conversion, output: Path) -> None:
    """Refuse what a format does not have, or cannot be written in without a package that is missing.

    Raises:
        UsageError: options that it does not have.
        MissingPackageError: see above.
        CheckpointError: no such text.
    """
    name = conversion.format
    if conversion.dtype is not None and conversion.dtype not in FORMATS[name].dtypes:
        raise UsageError(f"--format {name} has no --dtype {conversion.dtype}.{_other(conversion.dtype, name)}")
    if output.suffix in FILES:
        raise UsageError(f"--output names a folder, and {output} looks like a file.")
    if conversion.converter is not None and name != "gguf":
        raise UsageError("--converter writes gguf; give --format gguf with it.")
    if conversion.converter is not None and not (is_there(conversion.converter) and conversion.converter.is_file()):
        raise UsageError(f"--converter: {conversion.converter} is not a file.")
    if conversion.imatrix is not None and (conversion.dtype not in MIXES or conversion.converter is not None):
        raise UsageError(f"--imatrix is about gguf in {', '.join(MIXES)}; give one of them as --dtype.")
    if not conversion.kv_cache and name != "onnx":
        raise UsageError("--no-kv-cache is about onnx; give --format onnx with it.")
    for package in NEEDED.get(name, ()):
        if find_spec(package) is None:
            raise MissingPackageError(f"--format {name} needs the {package} package: pip install 'llmprune[{name}]'.")
    if name == "gguf":
        _check_packages(conversion)
    check_texts(conversion.imatrix)


def check_counted(dtype: str) -> None:
    """Refuse a type that a size is to be counted in and that GGUF does not have.

    Raises:
        UsageError: see above.
        MissingPackageError: the package that knows the sizes of its blocks is missing.
    """
    if dtype not in FORMATS["gguf"].dtypes:
        raise UsageError(f"a size is counted as one of GGUF's types, not as {dtype}.{_other(dtype, 'gguf')}")
    if find_spec("gguf") is None:
        raise MissingPackageError(f"Counting as {dtype} needs the gguf package: pip install 'llmprune[gguf]'.")


def suggested_gguf() -> str | None:
    """The type of GGUF to suggest: a mix where its encoder is installed, blocks of one kind, or none at all."""
    if find_spec("gguf") is None:
        return None
    return "q4_k_m" if find_spec("xllamacpp") is not None else "q8_0"


def _other(dtype: str, form: str) -> str:
    """Which dtype may have been meant, and which there are."""
    shown = {long: short for short, long in SHORT_DTYPES.items()} if form == "gguf" else {}
    names = [shown.get(known, known) for known in FORMATS[form].dtypes]
    near = [known for known in names if known.startswith(dtype)] or get_close_matches(dtype, names, 1)
    if not near and (bits := re.search("[0-9]+", dtype)) is not None:
        near = [known for known in names if bits[0] in known]
    return (f" Did you mean {near[0]}?" if near else "") + f" It has {', '.join(names)}."


def _check_packages(conversion: Conversion) -> None:
    if find_spec("gguf") is None:
        raise MissingPackageError("Writing GGUF needs the gguf package: pip install 'llmprune[gguf]'.")
    if conversion.dtype in MIXES and conversion.converter is None and find_spec("xllamacpp") is None:
        raise MissingPackageError(
            f"{conversion.dtype} is encoded by llama.cpp, which the xllamacpp package brings: pip install "
            "'llmprune[gguf,llamacpp]'. q8_0, q5_0 and q4_0 do without."
        )
