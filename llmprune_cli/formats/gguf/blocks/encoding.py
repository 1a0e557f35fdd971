"""Blocks encoded by llama.cpp itself: the xllamacpp package brings its code, and with it ggml's C interface."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmprune_cli.errors import UnsupportedError, VerificationError

if TYPE_CHECKING:
    import numpy
    from gguf import GGMLQuantizationType

POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER]),
    "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, POINTER, ctypes.c_size_t]),
}


def encode_blocks(
    rows: numpy.ndarray, kind: GGMLQuantizationType, name: str, threads: int, weights: numpy.ndarray | None = None
) -> numpy.ndarray:
    """Rows [R, C] in float32 as blocks: bytes [R, C / elements of a block · bytes of a block].

    Args:
        name: of the tensor, for messages.
        threads: that share the rows.
        weights: float32 [C], by which the squares of errors in each column count.

    Raises:
        UnsupportedError: xllamacpp is missing, or does not show ggml's functions.
        VerificationError: elements are too large for the scales of blocks, which are float16.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES

    library, (elements, size_bytes) = _ggml(), GGML_QUANT_SIZES[kind]
    count, columns = rows.shape
    blocks = numpy.empty((count, columns // elements * size_bytes), numpy.uint8)
    share = -(-count // threads)
    given = None if weights is None else weights.ctypes.data

    def encode(first: int) -> None:
        chosen = min(share, count - first)
        start = first * columns
        library.ggml_quantize_chunk(kind, rows.ctypes.data, blocks.ctypes.data, start, chosen, columns, given)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(encode, range(0, count, share)))
    if not library.ggml_validate_row_data(kind, blocks.ctypes.data, blocks.nbytes):
        raise VerificationError(f"{name} has elements that are too large for {kind.name}. Export it as bf16.")
    return blocks


def can_encode() -> bool:
    """Whether llama.cpp's code is there."""
    try:
        _ggml()
    except UnsupportedError:
        return False
    return True


@cache
def _ggml() -> ctypes.CDLL:
    package = find_spec("xllamacpp")
    places = package.submodule_search_locations if package else None
    module = PathFinder.find_spec("xllamacpp", places) if places else None
    if module is None or module.origin is None:
        raise UnsupportedError("Blocks are encoded by llama.cpp: pip install 'llmprune[gguf,llamacpp]'.")
    try:
        library = ctypes.CDLL(module.origin)
        for name, (returned, taken) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returned, taken
    except (OSError, AttributeError) as error:
        raise UnsupportedError(
            f"This build of xllamacpp does not let its encoder be called ({error}). q8_0, q5_0 and q4_0 need none."
        ) from error
    return library
