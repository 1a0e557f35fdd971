"""A model folder's `config.json`: read, refused where no model has such sizes, and reduced to its language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.skeleton import build_skeleton
from llmprune_cli.folder.documents import read_json
from llmprune_cli.source.stored_names import outer_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_CONFIG_BYTES = 2 * 2**20
ADAPTER_CONFIG = "adapter_config.json"
NO_ADAPTER = {"subfolder": "none"}  # for `from_pretrained`, which applies one beside the weights where peft is there
MERGE = "Merge it first (merge_and_unload of peft, then save_pretrained)"
# How the names of classes end that do something else than to go on with a text.
OTHER_PURPOSES = (
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    *("ForMaskedLM", "ForNextSentencePrediction", "ForPreTraining", "ForImageClassification"),
)
# Language models of multimodal ones that transformers has no class for, and those whose text they read alike.
READ_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
MOST = {"layer": 2048, "expert": 8192}  # by how the names of settings end


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration in a folder.

    Raises:
        CheckpointError: no `config.json`, or one that transformers refuses.
        UnsupportedError: an unknown kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if not path.exists() and (adapter := describe_adapter(folder)):
        raise CheckpointError(f"{folder} holds {adapter} and no model. {MERGE} and give the merged model.")
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder. Check MODEL.")
    raw = read_json(path, MOST_CONFIG_BYTES)
    _check_counts(path, raw)
    _check_purpose(path, raw)
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


def describe_adapter(folder: Path) -> str:
    """What adapter of peft lies in a folder, in words; empty where none does.

    Raises:
        CheckpointError: its configuration cannot be read.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return ""
    settings = read_json(path, MOST_CONFIG_BYTES)
    base = settings.get("base_model_name_or_path")
    return f"a {settings.get('peft_type', 'PEFT')} adapter{f' of {base}' if base else ''} ({ADAPTER_CONFIG})"


def _check_purpose(path: Path, settings: dict[str, Any]) -> None:
    """Refuse models that do not go on with a text.

    Raises:
        UnsupportedError: see above.
    """
    named = settings.get("architectures")
    for name in named if isinstance(named, list) else ():
        if isinstance(name, str) and name.endswith(OTHER_PURPOSES):
            raise UnsupportedError(
                f"{path} describes a {name}, which is no causal language model. Give the language model that it was "
                "made from."
            )


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


def _as_language_model(text: PretrainedConfig) -> PretrainedConfig:
    """A copy of a nested configuration, where need be under the name of the language model that it is a copy of."""
    from transformers import AutoConfig

    settings = text.to_dict()
    name = READ_AS.get(text.model_type)
    if name is None:
        return type(text).from_dict(settings)
    del settings["model_type"]
    rope = dict(settings.get("rope_parameters") or {})
    rope.pop("mrope_section", None)  # by which the positions of text, alike in all sections, change nothing
    as_text: PretrainedConfig = AutoConfig.for_model(name, **{**settings, "rope_parameters": rope})
    return as_text


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a multimodal model's language model; any other configuration as it is.

    Raises:
        UnsupportedError, CheckpointError: see `build_skeleton`.
    """
    from transformers import PretrainedConfig

    text = getattr(config, "text_config", None)
    if not isinstance(text, PretrainedConfig):
        return config
    text = _as_language_model(text)
    text.tie_word_embeddings = bool(outer_model(config).all_tied_weights_keys)
    text.dtype = text.dtype or config.dtype
    text.architectures = [type(build_skeleton(text)).__name__]
    return text
