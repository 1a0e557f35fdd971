"""The shared model-loading service: a MODEL argument becomes what every command needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.architecture import reconfigure
from llmprune_cli.family.skeleton import build_skeleton, expected_index, on_disk
from llmprune_cli.folder.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    TensorEntry,
    check_places,
    is_there,
    open_shard,
    read_index,
    read_json,
    stamp_shards,
    unchanged,
)
from llmprune_cli.folder.staging import scratch_folder
from llmprune_cli.options import ModelReference
from llmprune_cli.processes import Processes
from llmprune_cli.source.conversion import (
    convert_bin,
    convert_gguf,
    dequantize,
    describe_dequantized,
    describe_gguf,
    quantization_of,
)
from llmprune_cli.source.stored_names import Names, outer_model, resolve_names, usual_outer_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_CONFIG_BYTES = 2 * 2**20
MOST_COMPANION_BYTES = 2**28  # the largest tokenizers have 35 MB
MOST = {"layer": 2048, "expert": 8192}  # by how the names of settings end
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = ("F64", *DTYPES.values())
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
BIN_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
SMALL_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "README.md", "LICEN[SC]E*", "NOTICE*"]
# Files that travel with the weights; everything else in a model folder belongs to the weights or to other runtimes.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@contextmanager
def open_checkpoint(reference: ModelReference, need_weights: bool) -> Iterator[Checkpoint]:
    """Resolve a model; what has to be converted lives in a temporary folder while the block runs.

    Args:
        need_weights: without it, a hub id costs its small files only and a `config.json` alone will do.

    Raises:
        CheckpointError: nothing there, or something that contradicts itself.
        UnsupportedError: a model that transformers does not know.
    """
    with scratch_folder() as temporary:
        try:
            checkpoint = _opened(reference, need_weights, temporary)
        except OSError as error:
            place = error.filename or reference.name
            raise CheckpointError(f"{place} cannot be read: {error.strerror or error}.") from error
        yield checkpoint


def _opened(reference: ModelReference, need_weights: bool, temporary: Path) -> Checkpoint:
    """See `open_checkpoint`; an empty folder takes what has to be converted."""
    path = Path(reference.name)
    if path.suffix == ".gguf" and not need_weights:
        return _described(path.parent, reference, None, describe_gguf(path, reference.dtype), True)
    if path.suffix == ".gguf":
        folder, revision = temporary, None
        with unchanged([path]):
            convert_gguf(path, reference.dtype, folder)
    elif is_there(path):
        folder, revision = path, None
    else:
        folder, revision = _resolve_hub(reference, need_weights)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is neither a model folder nor a .gguf file.")
    check_places(folder)
    config = read_config(folder, reference.trust_remote_code)
    small_files_only = revision is not None and not need_weights
    has_weights = not small_files_only and _holds_weights(folder)
    if need_weights and not has_weights:
        raise CheckpointError(f"{folder} has no weights (*.safetensors or pytorch_model*.bin), which this needs.")
    if quantization_of(config) and not need_weights:
        plain = _text_part(describe_dequantized(config, reference.dtype))
        return _described(folder, reference, revision, plain, has_weights)
    place = folder
    if quantization_of(config):
        place = temporary
        with unchanged([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
            dequantize(folder, config, reference.dtype, place, reference.trust_remote_code)
        config = read_config(place, reference.trust_remote_code)
    stamps = stamp_shards(place)
    entries = () if small_files_only else read_index(place)
    if not entries and need_weights:
        place = temporary
        with unchanged(folder.glob("pytorch_model*.bin")):
            entries = convert_bin(folder, place)
    if not entries:
        return _described(folder, reference, revision, _text_part(config), has_weights)
    trusted = reference.trust_remote_code
    return _resolved(
        Checkpoint(
            place, reference.name, revision, config, entries, True, folder, trust_remote_code=trusted, stamps=stamps
        )
    )


def _holds_weights(folder: Path) -> bool:
    names = (SINGLE_NAME, INDEX_NAME)
    return any((folder / name).exists() for name in names) or any(folder.glob("pytorch_model*.bin"))


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration in a folder.

    Raises:
        CheckpointError: no `config.json`, or one that transformers refuses.
        UnsupportedError: an unknown kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder. Check MODEL.")
    raw = read_json(path, MOST_CONFIG_BYTES)
    _check_counts(path, raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has no model_type, so the kind of model is unknown.")
    if "auto_map" in raw and not trust_remote_code and model_type not in CONFIG_MAPPING:
        raise UnsupportedError(f"{folder} brings its own code. Pass --trust-remote-code if you trust it.")
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise UnsupportedError(f"{path} names the model type {model_type!r}, which transformers does not know.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # every configuration class raises its own kind
        reason = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(f"{path} is refused by transformers: {reason[-1]}") from error
    return config


def _check_counts(path: Path, settings: dict[str, Any]) -> None:
    """Refuse numbers of layers and experts that no model has: each of them takes time before any tensor is looked at.

    Raises:
        CheckpointError: see above.
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_counts(path, value)
        for word, most in MOST.items():
            if name.rstrip("s").endswith(word) and isinstance(value, int) and value > most:
                raise CheckpointError(f"{path}: {name} is {value:,}, and models have at most {most:,}.")


def _resolve_hub(reference: ModelReference, need_weights: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    name, revision = reference.name, reference.revision
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} does not exist.")
    disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_PATTERNS))
        if need_weights:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_PATTERNS + WEIGHT_PATTERNS))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_PATTERNS + BIN_PATTERNS))
    except HFValidationError:
        raise CheckpointError(f"{name!r} is neither an existing path nor a hub id.") from None
    except LocalEntryNotFoundError as error:
        where = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}{where} is neither a local path nor in the hub cache, and the hub cannot be reached. "
            "Check the name, the connection and HF_HUB_OFFLINE."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a local path nor a model on the hub that you may read. For a private or gated model, "
            "log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name} could not be fetched from the hub: {reason}") from error
    return folder, folder.name


def _text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a multimodal model's language model; any other configuration as it is.

    Raises:
        UnsupportedError, CheckpointError: see `build_skeleton`.
    """
    from transformers import PretrainedConfig

    text = getattr(config, "text_config", None)
    if not isinstance(text, PretrainedConfig):
        return config
    text = type(text).from_dict(text.to_dict())
    text.tie_word_embeddings = bool(outer_model(config).all_tied_weights_keys)
    text.dtype = text.dtype or config.dtype
    text.architectures = [type(build_skeleton(text)).__name__]
    return text


def _resolved(checkpoint: Checkpoint) -> Checkpoint:
    """Hold the headers against the configuration: rename what has another name, and leave out what is not read.

    Raises:
        CheckpointError: tensors that are missing, unknown, of another shape or quantized.
        UnsupportedError: tensors in a layout that would have to be converted.
    """
    config = _text_part(checkpoint.config)
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
    return replace(checkpoint, config=config, entries=entries, dropped=names.dropped, renamed=renamed)


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
    if expected.is_floating_point() and entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{folder}: {entry.name} is stored as {entry.dtype}, a quantized format, but config.json has no "
            "quantization_config that says how to read it."
        )


def _are_equal(checkpoint: Checkpoint, *stored: str) -> bool:
    one, other = (_read(checkpoint, checkpoint.by_name[name]) for name in stored)
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
    code = DTYPES.get(dtype, "F32")
    entries = tuple(TensorEntry(name, shape, code, None) for name, shape in expected_index(config).items())
    return Checkpoint(folder, reference.name, revision, config, entries, has_weights, folder)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or one of absurd size.
    """
    from transformers import AutoTokenizer

    for name in COMPANIONS:
        _check_size(checkpoint.companions / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.companions, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # tokenizers of every kind raise every kind
        raise CheckpointError(f"{checkpoint.source} has no usable tokenizer, which this needs.") from error
    result: PreTrainedTokenizerBase = tokenizer
    return result


def pick_device(device: str) -> str:
    """`auto` is the first of CUDA, MPS and CPU that is there.

    Raises:
        CheckpointError: the device is not on this machine.
    """
    if device == "auto":
        return "auto" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = device.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False) or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise CheckpointError(f"There is no device {device!r} on this machine. Try --device cpu.")
    return device


def own_device(device: str, processes: Processes) -> str:
    """Where one of several processes runs: on the GPU of its number, if there are any."""
    several = processes.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{processes.local_rank}" if several else device


def load_model(
    checkpoint: Checkpoint, device: str = "auto", dtype: str | None = None, offload_folder: Path | None = None
) -> PreTrainedModel:
    """The full model for evaluation, spread by accelerate's device map.

    Args:
        offload_folder: for weights that fit neither into the devices' memory nor into the machine's, as long as the
            model is used; those that are stored as they are used stay where they are. None refuses such models.

    Raises:
        CheckpointError: transformers cannot load it, or keys are missing or do not fit.
    """
    import psutil
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    size_bytes = checkpoint.parameter_count * getattr(torch, dtype).itemsize if dtype else checkpoint.size_bytes
    may_offload = offload_folder is not None and (device, place) == ("auto", "cpu")
    is_too_large = may_offload and size_bytes > psutil.virtual_memory().available
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=getattr(torch, dtype) if dtype else "auto",
            device_map="auto" if place == "auto" or is_too_large else {"": place},
            offload_folder=offload_folder,
            trust_remote_code=checkpoint.trust_remote_code,
            key_mapping={f"^{re.escape(stored)}$": name for stored, name in checkpoint.renamed} or None,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint.source} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        raise CheckpointError(f"{checkpoint.source} does not fit its config.json: {', '.join(names[:3])}.")
    model.eval()
    return model


def copy_companions(checkpoint: Checkpoint, target: Path) -> None:
    """Copy tokenizer, chat templates and generation config as they are.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    for name in COMPANIONS:
        source = checkpoint.companions / name
        if source.is_file():
            copy_small(source, target / name)
    for source in sorted(checkpoint.companions.glob("additional_chat_templates/*.jinja")):
        (target / source.parent.name).mkdir(exist_ok=True)
        copy_small(source, target / source.parent.name / source.name)


def _check_size(path: Path) -> None:
    size = path.stat().st_size if is_there(path) else 0
    if size > MOST_COMPANION_BYTES:
        most = f"{MOST_COMPANION_BYTES:,}"
        raise CheckpointError(f"{path} has {size:,} bytes, and files of its kind at most {most}. Download it again.")


def copy_small(source: Path, target: Path) -> None:
    """Copy a file that fits into memory.

    Raises:
        CheckpointError: it cannot be read, or has absurd size.
    """
    _check_size(source)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}.") from error
    target.write_bytes(content)
