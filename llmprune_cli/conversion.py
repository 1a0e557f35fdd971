"""Make plain safetensors folders of what is stored otherwise: GGUF files, pickles and quantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.checkpoint import TensorEntry, read_index, read_json
from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.writer import write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVERTED_SHARD_BYTES = 5 * 10**9
PLAIN_DTYPE = "bfloat16"  # what quantized weights become unless --dtype says otherwise


def convert_gguf(path: Path, dtype: str | None, target: Path) -> Path:
    """Dequantize a GGUF file into a safetensors folder, tokenizer included.

    Raises:
        CheckpointError: missing or unreadable.
        UnsupportedError: an architecture that transformers cannot read from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading_gguf(path):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, dtype or PLAIN_DTYPE)
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _save_plain(model, target)
    tokenizer.save_pretrained(target)
    return target


def _save_plain(model: PreTrainedModel, target: Path) -> None:
    """Save a dequantized model, without the records of quantization that would make saving fail or quantize again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(hf_quantizer=None, _weight_conversions=None)
    model.save_pretrained(target, max_shard_size=CONVERTED_SHARD_BYTES)


def quantization_of(folder: Path) -> str:
    """The method by which a folder's weights are quantized, "" where they are not.

    Raises:
        CheckpointError: no readable `config.json`.
    """
    quantization = read_json(folder / "config.json").get("quantization_config") if folder.is_dir() else None
    if not quantization:
        return ""
    return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else "unknown"


def convert_quantized(folder: Path, method: str, dtype: str | None, trust_remote_code: bool, target: Path) -> Path:
    """Dequantize a model through transformers into a safetensors folder.

    Raises:
        UnsupportedError: transformers cannot dequantize this method on this machine.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        record = dict(config.quantization_config)
        on_load = hasattr(AutoQuantizationConfig.from_dict(record), "dequantize")
        config.quantization_config = {**record, "dequantize": True} if on_load else record
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype or PLAIN_DTYPE), trust_remote_code=trust_remote_code
        )
        if not on_load:
            model.dequantize()
    except Exception as error:  # every quantizer raises its own kind
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UnsupportedError(
            f"{folder} holds weights quantized by {method}, which transformers cannot dequantize here: {reason} "
            "Install what that names, or give the unquantized model."
        ) from error
    _save_plain(model.to(getattr(torch, dtype or PLAIN_DTYPE)), target)
    return target


@contextmanager
def reading_gguf(path: Path) -> Iterator[None]:
    """Check the file and say in our words what transformers' reader has against it."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file.")
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(
            f"Reading GGUF needs the gguf package: pip install 'llmprune[gguf]' ({error})."
        ) from error
    except Exception as error:  # the readers raise whatever the bytes lead them to
        kind = UnsupportedError if "not supported" in str(error) else CheckpointError
        reason = str(error).strip().splitlines() or [repr(error)]
        raise kind(f"{path} cannot be read by transformers: {reason[0]}") from error


def convert_bin(folder: Path, target: Path) -> tuple[TensorEntry, ...]:
    """Copy `.bin` weights into safetensors shards, tensor by tensor; never executes a pickle.

    Raises:
        CheckpointError: a file that holds more than plain tensors, or less than its bytes should.
    """
    import torch

    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    states = [_load_bin(path) for path in sorted(folder.glob("pytorch_model*.bin"))]
    tensors = {
        name: tensor
        for state in states
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype in codes
    }
    entries = [TensorEntry(name, tuple(tensor.shape), codes[tensor.dtype], None) for name, tensor in tensors.items()]
    write_shards(target, entries, ((entry, tensors[entry.name]) for entry in entries), CONVERTED_SHARD_BYTES)
    return read_index(target)


def _load_bin(path: Path) -> dict[str, Any]:
    """The memory-mapped tensors of one `.bin` file."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(f"{path} is not a plain file of tensors, so it is not opened: {reason[0]}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors.")
    return state
