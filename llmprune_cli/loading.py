"""The shared model-loading service: a MODEL argument becomes what every command needs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.architecture import build_skeleton, expected_index, on_disk
from llmprune_cli.checkpoint import Checkpoint, TensorEntry, read_index, read_json
from llmprune_cli.conversion import (
    PLAIN_DTYPE,
    convert_bin,
    convert_gguf,
    convert_quantized,
    quantization_of,
    reading_gguf,
)
from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.naming import outer_config, outer_model, resolve_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
BIN_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
SMALL_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*"]
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


@dataclass(frozen=True)
class ModelReference:
    """What the user said about a model."""

    name: str  # folder, .gguf file or hub id
    revision: str | None = None  # of a hub id
    trust_remote_code: bool = False
    dtype: str | None = None  # for loading and for converting GGUF; None keeps the checkpoint's


@contextmanager
def open_checkpoint(reference: ModelReference, need_weights: bool) -> Iterator[Checkpoint]:
    """Resolve a model; what has to be converted lives in a temporary folder while the block runs.

    Args:
        need_weights: without it, a hub id costs its small files only and a `config.json` alone will do.

    Raises:
        CheckpointError: nothing there, or something that contradicts itself.
        UnsupportedError: a model that transformers does not know.
    """
    with tempfile.TemporaryDirectory(prefix="llmprune-model-") as temporary:
        path = Path(reference.name)
        if path.suffix == ".gguf" and not need_weights:
            yield _describe_gguf(path, reference)
            return
        if path.suffix == ".gguf":
            folder, revision = convert_gguf(path, reference.dtype, Path(temporary)), None
        elif path.exists():
            folder, revision = path, None
        else:
            folder, revision = _resolve_hub(reference, need_weights)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is neither a model folder nor a .gguf file.")
        origin, method = folder, quantization_of(folder)
        if method and need_weights:
            folder = convert_quantized(folder, method, reference.dtype, reference.trust_remote_code, Path(temporary))
        from_hub_without_weights = (revision is not None or bool(method)) and not need_weights
        entries = () if from_hub_without_weights else read_index(folder)
        if not entries and need_weights and any(folder.glob("pytorch_model*.bin")):
            entries = convert_bin(folder, Path(temporary))
            folder_of_weights = Path(temporary)
        else:
            folder_of_weights = folder
        config, outer = _text_part(read_config(folder, reference.trust_remote_code))
        checkpoint = Checkpoint(folder_of_weights, reference.name, revision, config, entries, bool(entries), origin)
        if entries:
            checkpoint = _with_names_of_today(checkpoint, outer)
        elif need_weights:
            raise CheckpointError(f"{folder} has no weights (*.safetensors or pytorch_model*.bin), which this needs.")
        else:
            checkpoint = replace(checkpoint, entries=_entries_from_config(config), has_weights=bool(method))
        yield checkpoint


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration in a folder.

    Raises:
        CheckpointError: no `config.json`, or one that transformers refuses.
        UnsupportedError: a kind of model that transformers does not know.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder. Check MODEL.")
    raw = read_json(path)
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
    if getattr(config, "quantization_config", None):  # what it will be once it is dequantized
        del config.quantization_config
        config.dtype = PLAIN_DTYPE
    return config


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


def _describe_gguf(path: Path, reference: ModelReference) -> Checkpoint:
    """What a GGUF file will be once dequantized, from its header alone."""
    from transformers import AutoConfig

    with reading_gguf(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.dtype = reference.dtype or PLAIN_DTYPE
    return Checkpoint(path.parent, reference.name, None, config, _entries_from_config(config), True, path.parent)


def _with_names_of_today(checkpoint: Checkpoint, outer: PretrainedConfig | None) -> Checkpoint:
    """Give stored tensors the names of today, leave out what no current model reads, and check every shape.

    Args:
        outer: the multimodal configuration that the checkpoint has, if it has one.

    Raises:
        CheckpointError: tensors that are missing, unknown or of another shape.
        UnsupportedError: a tensor that would have to be converted, not just renamed.
    """
    config, stored = checkpoint.config, checkpoint.by_name
    skeleton = build_skeleton(config)
    expected = {name: tuple(tensor.shape) for name, tensor in on_disk(skeleton, skeleton.state_dict()).items()}
    around = None
    if not stored.keys() <= expected.keys():
        outer = outer or outer_config(config)
        around = outer_model(outer) if outer is not None else None
    names = resolve_names(skeleton, around, expected, stored)
    missing = sorted(expected.keys() - set(names.canonical.values()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.folder}: the checkpoint lacks {missing[0]}{more} ({config.model_type}).")
    entries = []
    for entry in checkpoint.entries:
        name = names.canonical.get(entry.name)
        if name is None:
            continue
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{checkpoint.folder}: {entry.name} has shape {list(entry.shape)}; config.json makes it "
                f"{list(expected[name])}."
            )
        entries.append(entry if name == entry.name else replace(entry, name=name, stored_name=entry.name))
    renamed = tuple((entry.stored_name, entry.name) for entry in entries if entry.stored_name)
    return replace(checkpoint, entries=tuple(entries), dropped=names.dropped, renamed=renamed)


def _text_part(config: PretrainedConfig) -> tuple[PretrainedConfig, PretrainedConfig | None]:
    """The configuration of a multimodal model's text model, and the whole one; any other as it is, and None."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text: Any = config.get_text_config()
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, None
    text = type(text).from_dict(text.to_dict())
    text.dtype = text.dtype or config.dtype
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    text.architectures = [causal.__name__]
    return text, config


def _entries_from_config(config: PretrainedConfig) -> tuple[TensorEntry, ...]:
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    code = DTYPES.get(dtype, "F32")
    return tuple(TensorEntry(name, shape, code, None) for name, shape in expected_index(config).items())


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.companions, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers of every kind raise every kind
        raise CheckpointError(f"{checkpoint.source} has no usable tokenizer, which this needs.") from error
    result: PreTrainedTokenizerBase = tokenizer
    return result


def pick_device(device: str) -> str:
    """`auto` is the first of CUDA, MPS and CPU that is there.

    Raises:
        CheckpointError: the device is not on this machine.
    """
    import torch

    if device == "auto":
        return "auto" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = device.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False) or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise CheckpointError(f"There is no device {device!r} on this machine. Try --device cpu.")
    return device


def load_model(
    checkpoint: Checkpoint, device: str = "auto", dtype: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The full model for evaluation, spread by accelerate's device map.

    Raises:
        CheckpointError: transformers cannot load it, or keys are missing or do not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=getattr(torch, dtype) if dtype else "auto",
            device_map="auto" if place == "auto" else {"": place},
            trust_remote_code=trust_remote_code,
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
    """Copy tokenizer, chat template and generation config as they are."""
    import shutil

    for name in COMPANIONS:
        source = checkpoint.companions / name
        if source.is_file():
            shutil.copyfile(source, target / name)
    templates: Any = checkpoint.companions / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
