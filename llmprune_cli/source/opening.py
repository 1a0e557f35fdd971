"""The shared model-loading service: a MODEL argument becomes what every command needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.architecture import reconfigure
from llmprune_cli.family.skeleton import build_skeleton, expected_index, on_disk
from llmprune_cli.folder.checkpoint import Checkpoint, Surroundings, check_places, stamp_shards, unchanged
from llmprune_cli.folder.documents import is_there
from llmprune_cli.folder.scratch import scratch_folder, scratch_space
from llmprune_cli.folder.shards import open_shard, read_index, weight_sources
from llmprune_cli.folder.tensors import BY_NAME, DTYPES, TensorEntry
from llmprune_cli.options import ModelReference
from llmprune_cli.progress import LOGGER
from llmprune_cli.source.configuration import read_config, text_part
from llmprune_cli.source.conversion import convert_bin, dequantize, describe_dequantized, quantization_of
from llmprune_cli.source.gguf.reading import convert_gguf, describe_gguf, save_tokenizer
from llmprune_cli.source.hub import fetch, read_headers
from llmprune_cli.source.stored_names import Names, outer_model, resolve_names, usual_outer_model
from llmprune_cli.startup.config_checks import MERGE, describe_adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@contextmanager
def open_checkpoint(reference: ModelReference, need_weights: bool, need_tokens: bool = False) -> Iterator[Checkpoint]:
    """Resolve a model; what has to be converted lives in a temporary folder while the block runs.

    Args:
        need_weights: without it, a hub id costs its small files only and a `config.json` alone will do.
        need_tokens: whether the tokenizer is wanted too, which takes seconds to read where it is within a GGUF file.

    Raises:
        CheckpointError: nothing there, or something that contradicts itself.
        UnsupportedError: a model that transformers does not know.
    """
    with scratch_folder() as temporary:
        try:
            checkpoint = _opened(reference, need_weights, need_tokens, temporary)
        except OSError as error:
            place = error.filename or reference.name
            raise CheckpointError(f"{place} cannot be read: {error.strerror or error}.") from error
        yield checkpoint


def source_folder(reference: ModelReference, checkpoint: Checkpoint) -> Path | None:
    """The user's own folder or file that must stay untouched."""
    path = Path(reference.name)
    return path if is_there(path) else checkpoint.folder


def _opened(reference: ModelReference, need_weights: bool, need_tokens: bool, temporary: Path) -> Checkpoint:
    """See `open_checkpoint`; an empty folder takes what has to be converted."""
    path = Path(reference.name)
    if path.suffix == ".gguf" and not need_weights:
        described = _described(path.parent, reference, None, describe_gguf(path, reference.dtype), True)
        if need_tokens:
            save_tokenizer(path, temporary)
        return replace(described, companions=temporary)  # what else lies beside the file may be another model's
    if path.suffix == ".gguf":
        folder, revision = temporary, None
        with unchanged([path]):
            convert_gguf(path, reference.dtype, folder)
    elif is_there(path):
        folder, revision = path, None
    else:
        folder, revision = fetch(reference.name, reference.revision, need_weights)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is neither a model folder nor a .gguf file. Check the path of the model.")
    check_places(folder)
    config = read_config(folder, reference.trust_remote_code)
    small_files_only = revision is not None and not need_weights
    sources = [] if small_files_only else weight_sources(folder)
    has_weights = bool(sources)
    _check_adapter(folder, has_weights or small_files_only)
    if need_weights and not has_weights:
        raise CheckpointError(f"{folder} has no weights (*.safetensors or pytorch_model*.bin), which this needs.")
    if len(sources) > 1:
        others = " and ".join(path.name for path in sources[1:])
        LOGGER.warning(f"{folder} holds {sources[0].name}, which is read as transformers does, and not {others}.")
    if quantization_of(config) and not need_weights:
        plain = describe_dequantized(config, reference.dtype)
        return text_alone(_described(folder, reference, revision, plain, has_weights))
    place = folder
    if quantization_of(config):
        place = temporary
        with unchanged([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
            dequantize(folder, config, reference.dtype, place, reference.trust_remote_code)
        config = read_config(place, reference.trust_remote_code)
    stamps = stamp_shards(place)
    entries = read_headers(reference.name, str(revision), folder) if small_files_only else read_index(place)
    if not entries and need_weights:
        place = temporary
        with unchanged(folder.glob("pytorch_model*.bin")):
            entries = convert_bin(folder, place)
        with scratch_space():
            config.save_pretrained(place)  # without it, transformers loads no model from there
    if not entries:
        return _described(folder, reference, revision, config, has_weights)
    trusted = reference.trust_remote_code
    return _resolved(
        Checkpoint(
            place, reference.name, revision, config, entries, True, folder, trust_remote_code=trusted, stamps=stamps
        )
    )


def _check_adapter(folder: Path, has_weights: bool) -> None:
    """Say that an adapter beside weights is left alone.

    Raises:
        CheckpointError: there is nothing but the adapter.
    """
    adapter = describe_adapter(folder)
    if adapter and not has_weights:
        raise CheckpointError(f"{folder} holds {adapter} and no weights. {MERGE} and give the merged model.")
    if adapter:
        LOGGER.warning(f"{folder} holds {adapter} beside its weights, which is not applied. {MERGE} if you want it.")


def _resolved(checkpoint: Checkpoint) -> Checkpoint:
    """Hold the headers against the configuration: rename what has another name, and leave out what is not read.

    Raises:
        CheckpointError: tensors that are missing, unknown, of another shape or quantized.
        UnsupportedError: tensors in a layout that would have to be converted.
    """
    config = text_part(checkpoint.config)
    expected, names = _find_names(checkpoint, config)
    if not all(_are_equal(checkpoint, *pair) for pair in names.aliases):
        config = reconfigure(config, {"tie_word_embeddings": False})  # as transformers decides when it loads them
        expected, names = _find_names(checkpoint, config)
    missing = sorted(expected.keys() - names.canonical.values())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.folder}: the checkpoint lacks {missing[0]}{more} ({config.model_type}).")
    used = [(entry, names.canonical[entry.name]) for entry in checkpoint.entries if entry.name in names.canonical]
    for entry, name in used:
        _check_stored(checkpoint.folder, entry, expected[name])
    renamed = tuple((entry.name, name) for entry, name in used if entry.name != name)
    entries = tuple(
        entry if entry.name == name else replace(entry, name=name, stored_name=entry.name) for entry, name in used
    )
    around = _surroundings(checkpoint, config, names)
    return replace(checkpoint, config=config, entries=entries, dropped=names.dropped, renamed=renamed, around=around)


def _surroundings(checkpoint: Checkpoint, text: PretrainedConfig, names: Names) -> Surroundings | None:
    """The multimodal model around a text model, if the checkpoint holds one, and holds it whole."""
    if type(text) is type(checkpoint.config):
        return None
    entries = tuple(entry for entry in checkpoint.entries if entry.name in names.around)
    return Surroundings(checkpoint.config, entries, is_written=bool(entries))


def part_to_write(checkpoint: Checkpoint, text_only: bool = False, dtype: str | None = None) -> Checkpoint:
    """Of a multimodal model all of it, where that is there and wanted, or else its language model; either is said.

    Args:
        dtype: that was asked for; that weights stay as they are stored is said, too.
    """
    whole = checkpoint.whole
    if dtype is not None and BY_NAME[dtype].torch != checkpoint.stored_dtype:
        stored = str(checkpoint.stored_dtype).removeprefix("torch.")
        LOGGER.warning(
            f"{checkpoint.source} is stored as {stored}, and so is what is made of it: --dtype {dtype} is for what has "
            f"to be dequantized, and for --eval. `llmprune export --dtype {dtype}` converts the result."
        )
    if text_only or whole is None:
        return text_alone(checkpoint)
    LOGGER.warning(
        f"{checkpoint.source} is a {whole.config.model_type} model: its language model is pruned, its vision or audio "
        "tower and projector go with it as they are. --text-only leaves them out."
    )
    return checkpoint


def text_alone(checkpoint: Checkpoint) -> Checkpoint:
    """The language model without what is around it, which is said aloud; any other model as it is."""
    around = checkpoint.around
    if around is None:
        return checkpoint
    LOGGER.warning(
        f"{checkpoint.source} is a {around.config.model_type} model, of which the language model alone is written: its "
        "vision or audio tower and projector are left out."
    )
    dropped = (*checkpoint.dropped, *(entry.name for entry in around.entries))
    return replace(checkpoint, around=replace(around, entries=(), is_written=False), dropped=dropped)


def _find_names(checkpoint: Checkpoint, config: PretrainedConfig) -> tuple[dict[str, torch.Tensor], Names]:
    """The tensors that a configuration asks for, on `meta`, and which of the stored ones they are."""
    skeleton = build_skeleton(config)
    expected = on_disk(skeleton, skeleton.state_dict())
    outer = None
    if checkpoint.by_name.keys() - expected.keys():
        multimodal = type(config) is not type(checkpoint.config)
        outer = outer_model(checkpoint.config) if multimodal else usual_outer_model(config)
    try:
        return expected, resolve_names(skeleton, outer, expected.keys(), checkpoint.by_name.keys())
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{checkpoint.folder}: {error}") from error


def _check_stored(folder: Path, entry: TensorEntry, expected: torch.Tensor) -> None:
    """Hold one header against what the configuration asks for.

    Raises:
        CheckpointError: another shape, or quantized bytes.
    """
    if entry.shape != tuple(expected.shape):
        shapes = f"has shape {list(entry.shape)}; config.json makes it {list(expected.shape)}"
        raise CheckpointError(f"{folder}: {entry.name} {shapes}.")
    if expected.is_floating_point() and not DTYPES[entry.dtype].is_weight:
        raise CheckpointError(
            f"{folder}: {entry.name} is stored as {entry.dtype}, a quantized format, but config.json has no "
            "quantization_config that says how to read it."
        )


def _are_equal(checkpoint: Checkpoint, *stored: str) -> bool:
    """Whether two tensors hold the same; where only headers are known, config.json is believed."""
    entries = [checkpoint.by_name[name] for name in stored]
    if any(entry.shard is None for entry in entries):
        return True
    one, other = (_read(checkpoint, entry) for entry in entries)
    return torch.equal(one, other)


def _read(checkpoint: Checkpoint, entry: TensorEntry) -> torch.Tensor:
    with open_shard(checkpoint.folder / str(entry.shard)) as handle:
        tensor: torch.Tensor = handle.get_tensor(entry.name)
    return tensor


def _described(
    folder: Path, reference: ModelReference, revision: str | None, config: PretrainedConfig, has_weights: bool
) -> Checkpoint:
    """A checkpoint known from its configuration alone: the tensors that transformers would save for it."""
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    code = BY_NAME[dtype].code if dtype in BY_NAME and BY_NAME[dtype].is_weight else "F32"
    text = text_part(config)
    entries = tuple(TensorEntry(name, shape, code, None) for name, shape in expected_index(text).items())
    around = Surroundings(config) if text is not config else None
    return Checkpoint(folder, reference.name, revision, text, entries, has_weights, folder, around=around)
