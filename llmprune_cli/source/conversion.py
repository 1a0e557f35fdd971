"""Quantized and pickled (`.bin`) weights made into a folder of plain safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, UnsupportedError, first_line
from llmprune_cli.folder.scratch import scratch_space
from llmprune_cli.folder.shards import read_index, weight_files, weight_sources, write_shards
from llmprune_cli.folder.tensors import BY_NAME, DTYPES, TensorEntry
from llmprune_cli.source.configuration import NO_ADAPTER

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEQUANTIZED_DTYPE = "bfloat16"  # unless --dtype says otherwise
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
CONVERTED_SHARD_BYTES = 5 * 10**9


# --- quantized weights ---------------------------------------------------------------------------------------------


def quantization_of(config: PretrainedConfig) -> dict[str, Any]:
    """The record of quantization in a configuration; empty where the weights are plain."""
    record = getattr(config, "quantization_config", None) or {}
    return dict(record) if isinstance(record, dict) else dict(record.to_dict())


def describe_dequantized(config: PretrainedConfig, dtype: str | None) -> PretrainedConfig:
    """What a quantized model's configuration will be once its weights are plain.

    Raises:
        UnsupportedError: transformers cannot dequantize this method.
    """
    _check_method(config)
    plain = type(config).from_dict(config.to_dict())
    vars(plain).pop("quantization_config", None)
    plain.dtype = dtype or DEQUANTIZED_DTYPE
    return plain


def dequantize(
    folder: Path, config: PretrainedConfig, dtype: str | None, target: Path, trust_remote_code: bool
) -> None:
    """Load quantized weights, make them plain and save them into a folder.

    Raises:
        UnsupportedError: transformers cannot dequantize this method, here or at all.
        CheckpointError: weights that are missing or unreadable.
    """
    from transformers import AutoModelForCausalLM

    record = quantization_of(config)
    method = _check_method(config)
    _check_scales(folder, record)
    config = type(config).from_dict({**config.to_dict(), "quantization_config": {**record, "dequantize": True}})
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=BY_NAME[dtype or DEQUANTIZED_DTYPE].torch,
            trust_remote_code=trust_remote_code,
            adapter_kwargs=NO_ADAPTER,
            output_loading_info=True,
        )
        model = loaded[0].dequantize() if getattr(loaded[0], "is_quantized", False) else loaded[0]
    except ImportError as error:
        raise UnsupportedError(
            f"{folder} holds weights quantized by {method}, and dequantizing them needs a package that is missing: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:  # every quantizer raises its own kind
        raise CheckpointError(
            f"{folder}: weights quantized by {method} cannot be loaded: {first_line(error)}"
        ) from error
    _cast(model, BY_NAME[dtype or DEQUANTIZED_DTYPE].torch)
    save_plain(model, loaded[1], folder, target)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights that were stored plain: beside quantized ones, transformers leaves them as they are."""
    exact = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(module in name for module in exact):
            parameter.data = parameter.data.to(dtype)


def _check_method(config: PretrainedConfig) -> str:
    """The name of a quantization method that transformers can undo.

    Raises:
        UnsupportedError: it cannot.
    """
    from inspect import signature

    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    record = quantization_of(config)
    method = str(getattr(record.get("quant_method"), "value", record.get("quant_method", "an unnamed method")))
    key = f"{method}_{'8bit' if record.get('load_in_8bit') else '4bit'}" if method == "bitsandbytes" else method
    quantizer: Any = AUTO_QUANTIZER_MAPPING.get(key)
    if quantizer is None:
        raise UnsupportedError(f"The weights are quantized by {method}, which transformers does not know.")
    while_loading = "dequantize" in signature(AUTO_QUANTIZATION_CONFIG_MAPPING[key]).parameters
    if not while_loading and quantizer._dequantize is HfQuantizer._dequantize:
        raise UnsupportedError(
            f"The weights are quantized by {method}, which transformers cannot dequantize. Give the unquantized model "
            "instead, or dequantize it with the tool that made it."
        )
    return method


def _check_scales(folder: Path, record: dict[str, Any]) -> None:
    """Refuse FP8 weights that transformers would load wrongly without a word.

    Raises:
        CheckpointError: one without its scale, which would be read as if its scale were 1.
        UnsupportedError: one whose last block is cut short: the scales would be spread evenly over its rows.
    """
    if record.get("quant_method") != "fp8":
        return
    entries = {entry.name: entry for entry in read_index(folder)}
    for name, entry in entries.items():
        if entry.dtype not in FP8_DTYPES:
            continue
        stem = name.removesuffix("weight")
        names = (f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight")
        scales = [entries[scale] for scale in names if scale in entries]
        if not scales:
            raise CheckpointError(f"{folder}: {name} is stored as {entry.dtype} without its scale ({name}_scale_inv).")
        block, grid = record.get("weight_block_size"), scales[0].shape
        if block and len(grid) > 1 and entry.shape[-2:] != (grid[-2] * block[0], grid[-1] * block[1]):
            raise UnsupportedError(
                f"{folder}: {name} has shape {list(entry.shape)}, which does not fill its FP8 blocks of {block}; "
                "transformers cannot dequantize that. Give the unquantized model instead."
            )


def save_plain(model: PreTrainedModel, info: dict[str, Any], source: Path, target: Path) -> None:
    """Save a model that was converted while loading, without the record of it.

    Raises:
        CheckpointError: something was missing or did not fit, so the model holds random weights.
    """
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{source} lacks {wrong[0]}{more}, or has it in another shape ({model.config.model_type})."
        )
    vars(model.config).pop("quantization_config", None)
    vars(model)["hf_quantizer"] = None  # its record of quantization would make saving fail
    vars(model)["_weight_conversions"] = None  # save as a model that was never quantized
    with scratch_space():
        model.save_pretrained(target)


# --- .bin ----------------------------------------------------------------------------------------------------------


def convert_bin(folder: Path, target: Path) -> tuple[TensorEntry, ...]:
    """Copy `.bin` weights into safetensors shards, tensor by tensor; never executes a pickle.

    Raises:
        CheckpointError: a file that holds more than plain tensors, or less than its bytes should; a missing shard.
    """
    codes = {dtype.torch: code for code, dtype in DTYPES.items()}
    states = [_load_bin(path) for path in weight_files(weight_sources(folder)[0])]
    tensors = {
        name: tensor
        for state in states
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype in codes
    }
    entries = [TensorEntry(name, tuple(tensor.shape), codes[tensor.dtype], None) for name, tensor in tensors.items()]
    with scratch_space():
        write_shards(target, entries, ((entry, tensors[entry.name]) for entry in entries), CONVERTED_SHARD_BYTES)
    return read_index(target)


def _load_bin(path: Path) -> dict[str, Any]:
    """The memory-mapped tensors of one `.bin` file."""
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a plain file of tensors, so it is not opened: {first_line(error)}"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors.")
    return state
