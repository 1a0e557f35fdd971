"""Export to GGUF for llama.cpp, streamed: each stored tensor is written where it belongs in the file."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.shards import check_finite
from llmprune_cli.folder.staging import check_room
from llmprune_cli.folder.tensors import SHORT_DTYPES, TensorEntry
from llmprune_cli.formats.gguf.blocks.encoding import can_encode, encode_blocks
from llmprune_cli.formats.gguf.families import GgufFamily, written_family
from llmprune_cli.formats.gguf.llamacpp import open_llamacpp
from llmprune_cli.formats.gguf.metadata import add_metadata, rope_factors
from llmprune_cli.formats.gguf.tensors import FileTensor, Layout, lay_out
from llmprune_cli.formats.gguf.vocabulary import add_vocabulary
from llmprune_cli.formats.registry import FLOAT_LIMITS, LEGACY, ExportOptions, Fit, Format, Limits
from llmprune_cli.formats.safetensors import write_safetensors

if TYPE_CHECKING:
    import numpy
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

FLOAT_KINDS = {dtype: short for short, dtype in SHORT_DTYPES.items()}
CHUNK = 2**22  # elements converted at a time


def fit_llamacpp(config: PretrainedConfig) -> Fit:
    """Whether llama.cpp loads a model, and in which form it is written."""
    try:
        return Fit(loads=True, note=written_family(config)[1])
    except ValueError as error:
        return Fit(loads=False, note=str(error))


def write_gguf(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write weights, configuration, tokenizer and chat template as one file into a staging folder.

    Raises:
        UnsupportedError: a model or tokenizer that llama.cpp does not know.
        CheckpointError: no tokenizer.
        OutputError: the disk has no room for the file.
    """
    from gguf import GGUFWriter

    assert options.dtype is not None
    kind = FLOAT_KINDS.get(options.dtype, options.dtype)
    path = folder / f"model-{kind}.gguf"
    if options.converter is not None:
        _convert(checkpoint, path, kind, options.converter, progress)
        return {}
    family, _ = written_family(checkpoint.config)
    writer = GGUFWriter(path, family.architecture)
    try:
        _describe(writer, checkpoint, family, kind)
        layout = _declare(writer, checkpoint, family, kind, options.importance is not None)
        _write_header(writer)
        assert writer.fout is not None
        check_room(path, sum(map(_size, layout.tensors)))
        extra = rope_factors(checkpoint.config, family)
        _write_tensors(writer.fout[0], checkpoint, layout, extra, options.importance or {}, progress)
    finally:
        writer.close()
    return {}


def weights_bytes(entries: Iterable[TensorEntry], config: PretrainedConfig, dtype: str) -> int:
    """Bytes of the weights of a model in a file of some dtype; tokenizer and configuration come on top.

    Raises:
        UnsupportedError: llmprune does not write such a model for llama.cpp.
    """
    try:
        family, _ = written_family(config)
    except ValueError as error:
        raise UnsupportedError(f"Its size as {dtype} is unknown: {error}. Give a size without a type.") from error
    layout = lay_out(entries, config, family, FLOAT_KINDS.get(dtype, dtype), is_weighted=False)
    return sum(map(_size, layout.tensors)) + sum(4 * own.numel() for own in rope_factors(config, family).values())


def _describe(writer: GGUFWriter, checkpoint: Checkpoint, family: GgufFamily, kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    add_vocabulary(writer, checkpoint)
    add_metadata(writer, checkpoint.config, family)
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[name])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _declare(writer: GGUFWriter, checkpoint: Checkpoint, family: GgufFamily, kind: str, is_weighted: bool) -> Layout:
    """Say which tensors will follow, those that no stored one gives first."""
    import numpy
    from gguf import GGMLQuantizationType

    single = GGMLQuantizationType.F32
    extra = [FileTensor(n, tuple(t.shape), single) for n, t in rope_factors(checkpoint.config, family).items()]
    layout = lay_out(checkpoint.entries, checkpoint.config, family, kind, is_weighted)
    layout = replace(layout, tensors=(*extra, *layout.tensors))
    for tensor in layout.tensors:
        dtype = numpy.dtype(numpy.float32)  # any but bytes: the shape is one of elements
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, _size(tensor), raw_dtype=tensor.kind)
    return layout


def _write_header(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _size(tensor: FileTensor) -> int:
    from gguf import GGML_QUANT_SIZES

    elements, size_bytes = GGML_QUANT_SIZES[tensor.kind]
    return math.prod(tensor.shape) // elements * size_bytes


def _write_tensors(
    file: IO[bytes],
    checkpoint: Checkpoint,
    layout: Layout,
    extra: dict[str, torch.Tensor],
    importance: Mapping[str, torch.Tensor],
    progress: Callable[[int], None],
) -> None:
    """Read every tensor once, in the order of the checkpoint, and write it at its place."""
    from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter

    offsets, end = {}, GGUFWriter.ggml_pad(file.tell(), GGUF_DEFAULT_ALIGNMENT)
    for tensor in layout.tensors:
        offsets[tensor.name] = end
        end += GGUFWriter.ggml_pad(_size(tensor), GGUF_DEFAULT_ALIGNMENT)
    file.truncate(end)
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    for name, values in extra.items():
        file.seek(offsets[name])
        _write_rows(file, values, by_name[name], None)
    for entry, stored in checkpoint.tensors():
        for part in layout.parts[entry.name]:
            target, values = by_name[part.target], part.change(stored)
            skipped = 0 if part.expert is None else _size(target) // target.shape[0] * part.expert
            file.seek(offsets[part.target] + skipped)
            _write_rows(file, values, target, importance.get(entry.name))
        progress(entry.size_bytes)


def _write_rows(file: IO[bytes], tensor: torch.Tensor, target: FileTensor, weights: torch.Tensor | None) -> None:
    rows = tensor.reshape(-1, tensor.shape[-1])
    for some in rows.split(max(1, CHUNK // rows.shape[-1])):
        file.write(encode(some, target, weights).data)


def encode(rows: torch.Tensor, target: FileTensor, weights: torch.Tensor | None) -> numpy.ndarray:
    """Rows of a tensor as the bytes that llama.cpp reads.

    Args:
        weights: how much each column matters; None where all do alike.

    Raises:
        VerificationError: they hold NaN or infinity, or what blocks cannot hold.
    """
    from gguf import GGMLQuantizationType, quantize

    halves = {GGMLQuantizationType.BF16: torch.bfloat16, GGMLQuantizationType.F16: torch.float16}
    plain = rows.contiguous().to(halves.get(target.kind, torch.float32))  # the weights of a Conv1D come transposed
    check_finite(target.name, plain)
    if target.kind == GGMLQuantizationType.BF16:
        return plain.view(torch.int16).numpy()
    if target.kind in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        return plain.numpy()
    if target.kind.name.lower() in LEGACY and not can_encode():
        return quantize(plain.numpy(), target.kind)  # the same bits, more slowly
    given = weights.numpy() if weights is not None else None
    return encode_blocks(plain.numpy(), target.kind, target.name, torch.get_num_threads(), given)


# --- llama.cpp's own converter -------------------------------------------------------------------------------------


def _convert(checkpoint: Checkpoint, path: Path, kind: str, converter: Path, progress: Callable[[int], None]) -> None:
    """Let llama.cpp's script write the file.

    Raises:
        CheckpointError: it fails.
    """
    with _complete_folder(checkpoint) as folder:
        command = [sys.executable, str(converter), str(folder), "--outfile", str(path), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not path.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise CheckpointError(f"{converter} did not convert {checkpoint.source}: {last}")
    progress(checkpoint.size_bytes)


@contextmanager
def _complete_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder that holds weights and tokenizer together, under the names that are written today."""
    if checkpoint.folder == checkpoint.companions and not checkpoint.renamed:
        yield checkpoint.folder
        return
    with scratch_folder() as folder:
        write_safetensors(checkpoint, folder, ExportOptions(), lambda size_bytes: None)
        yield folder


GGUF = Format(
    runs_in="llama.cpp",
    write=write_gguf,
    fit=fit_llamacpp,
    loading="`llama-cli -m FILE`, and whatever else is built on llama.cpp.",
    file="*.gguf",
    package="xllamacpp",
    extra="llamacpp",
    runtime=open_llamacpp,
    limits={
        **FLOAT_LIMITS,
        "q8_0": Limits(1e-2, same_tokens=False),
        "q6_k": Limits(0.1, same_tokens=False),
        **dict.fromkeys(("q5_1", "q5_0", "q5_k_m", "q5_k_s"), Limits(0.25, same_tokens=False)),
        **dict.fromkeys(("q4_1", "q4_0", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs"), Limits(0.5, same_tokens=False)),
        "q3_k_m": Limits(1.0, same_tokens=False),
    },
)
