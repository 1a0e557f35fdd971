"""The weights of a GGUF file: made plain tensor by tensor, or by transformers as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, LlmpruneError, UnsupportedError, first_line
from llmprune_cli.family.skeleton import build_skeleton, on_disk
from llmprune_cli.folder.scratch import scratch_folder, scratch_space
from llmprune_cli.folder.shards import write_shards
from llmprune_cli.folder.tensors import BY_NAME, TensorEntry
from llmprune_cli.progress import LOGGER
from llmprune_cli.source.conversion import CONVERTED_SHARD_BYTES, DEQUANTIZED_DTYPE, save_plain
from llmprune_cli.source.gguf.configuration import read_configuration
from llmprune_cli.source.gguf.header import header_of, read_briefly
from llmprune_cli.source.gguf.splitting import split_as_said

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers' classes that make one of its tensors of each tensor in the file, whatever the others are.
ONE_BY_ONE = {
    "TensorProcessor",
    "LlamaTensorProcessor",
    "BloomTensorProcessor",
    "NemotronTensorProcessor",
    "Gemma2TensorProcessor",
}


def describe_gguf(path: Path, dtype: str | None) -> PretrainedConfig:
    """What a GGUF file's configuration will be once dequantized, from its header alone.

    Raises:
        CheckpointError: missing or unreadable.
        UnsupportedError: something that transformers cannot read from GGUF, or reads wrongly.
    """
    return _describe(path, dtype)[0]


def _describe(path: Path, dtype: str | None) -> tuple[PretrainedConfig, str]:
    """The configuration, and what the file calls the architecture."""
    with _reading_gguf(path), scratch_folder() as folder:
        from gguf import GGUFReader

        header = header_of(path, folder)
        config = read_configuration(header)
        architecture: str = GGUFReader(header).fields["general.architecture"].contents()
    config.dtype = dtype or DEQUANTIZED_DTYPE
    return config, architecture


def convert_gguf(path: Path, dtype: str | None, target: Path) -> None:
    """Dequantize a GGUF file into a safetensors folder, tokenizer included.

    Raises:
        CheckpointError: missing or unreadable.
        UnsupportedError: something that transformers cannot read from GGUF, or reads wrongly.
    """
    from transformers import AutoModelForCausalLM

    config, architecture = _describe(path, dtype)
    if dtype is None:
        LOGGER.warning(
            f"{path} is dequantized: from here on its weights are {DEQUANTIZED_DTYPE} (--dtype names another; "
            "`llmprune export --format gguf --dtype q8_0` quantizes the result again)."
        )
    plain = BY_NAME[dtype or DEQUANTIZED_DTYPE].torch
    with _reading_gguf(path):
        model, processor = build_skeleton(config), _processor(architecture, config)
        names = _stored_names(architecture, model, processor)
        if names is not None:
            _save_settings(model, plain, target)
            _stream(path, model, processor, names, plain, target)
        else:
            with _alone(path) as file:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, config=config, dtype=plain, output_loading_info=True
                )
            save_plain(loaded[0], loaded[1], path, target)
    save_tokenizer(path, target)


def save_tokenizer(path: Path, target: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder.

    Raises:
        CheckpointError, UnsupportedError: see `convert_gguf`.
    """
    with _reading_gguf(path):
        tokenizer = _load_tokenizer(path)
    with scratch_space():
        tokenizer.save_pretrained(target)


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file.

    transformers reads the configuration first, and on the way there the whole vocabulary in a way that takes seconds:
    it gets that from a header without one.
    """
    from transformers import AutoTokenizer, modeling_gguf_pytorch_utils

    library: Any = modeling_gguf_pytorch_utils
    read: Any = library.load_gguf_checkpoint
    with scratch_folder() as folder, _alone(path) as file:
        header = header_of(path, folder)

        def read_header(asked: Any, *arguments: Any, **named: Any) -> Any:
            return read(header if Path(asked) == file else asked, *arguments, **named)

        library.load_gguf_checkpoint = read_header
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        finally:
            library.load_gguf_checkpoint = read
        return split_as_said(tokenizer, read_briefly(header)[0].fields, path)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers takes a tokenizer, settings or an adapter beside it for its own."""
    with scratch_folder() as folder:
        link = folder / path.name
        try:
            link.symlink_to(path.resolve())
        except OSError:  # on Windows, where not every user may make one
            with scratch_space():
                shutil.copyfile(path, link)
        yield link


@contextmanager
def _reading_gguf(path: Path) -> Iterator[None]:
    """Check the file and say in our words what transformers' reader has against it."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file.")
    try:
        yield
    except LlmpruneError as error:
        raise type(error)(f"{path}: {error}") from error
    except ImportError as error:
        raise UnsupportedError(
            f"Reading GGUF needs the gguf package: pip install 'llmprune[gguf]' ({error})."
        ) from error
    except Exception as error:  # the readers raise whatever the bytes lead them to
        kind = UnsupportedError if "not supported" in str(error) else CheckpointError
        raise kind(f"{path} cannot be read by transformers: {first_line(error)}") from error


def _processor(architecture: str, config: PretrainedConfig) -> Any:
    """What transformers does to the tensors of an architecture once they are dequantized."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return kind(config=config.to_dict())


def _stored_names(architecture: str, model: PreTrainedModel, processor: Any) -> dict[str, str] | None:
    """From the names in a file to those that `save_pretrained` writes, by the table that transformers reads with.

    None where a tensor is made of several, is known under another name in memory than on disk, or not in the table.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    exact = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    if type(processor).__name__ not in ONE_BY_ONE or exact:
        return None
    state = model.state_dict()
    expected = on_disk(model, state)
    known = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not known or any(name not in state or expected[name].shape != state[name].shape for name in expected):
        return None
    table = get_tensor_name_map(known[0], model.config.num_hidden_layers)
    names = {}
    for name in expected:
        stem, dot, suffix = name.rpartition(".")
        stored = table.get_name(stem)
        if stored is None or suffix not in ("weight", "bias"):
            return None
        names[f"{stored}{dot}{suffix}"] = name
    return names if len(names) == len(expected) else None


def _stream(
    path: Path, model: PreTrainedModel, processor: Any, names: dict[str, str], dtype: torch.dtype, target: Path
) -> None:
    """Write the weights, one tensor in memory at a time.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    from gguf.quants import dequantize

    family, code = model.config.model_type, BY_NAME[str(dtype).removeprefix("torch.")].code
    stored = {names[tensor.name]: tensor for tensor in read_briefly(path)[0].tensors if tensor.name in names}
    missing = sorted({*names.values()} - stored.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"it lacks {missing[0]}{more}, or has it in another shape ({family}).")
    state = model.state_dict()
    entries = [TensorEntry(name, tuple(state[name].shape), code, None) for name in names.values()]

    def tensors() -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        for entry in entries:
            tensor = stored[entry.name]
            weights = dequantize(tensor.data, tensor.tensor_type)
            made = processor.process(weights=weights, name=tensor.name).weights
            found = torch.from_numpy(made if made.flags.writeable else made.copy()).to(dtype)  # the file itself is not
            if tuple(found.shape) != entry.shape:
                raise CheckpointError(f"it lacks {entry.name}, or has it in another shape ({family}).")
            yield entry, found

    with scratch_space():
        write_shards(target, entries, tensors(), CONVERTED_SHARD_BYTES)


def _save_settings(model: PreTrainedModel, dtype: torch.dtype, target: Path) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    with scratch_space():
        model.config.save_pretrained(target)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(target)
