"""A model folder's configuration as transformers reads it, reduced to its language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmprune_cli.errors import CheckpointError, UnsupportedError
from llmprune_cli.family.skeleton import build_skeleton
from llmprune_cli.source.stored_names import outer_model
from llmprune_cli.startup.config_checks import read_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NO_ADAPTER = {"subfolder": "none"}  # for `from_pretrained`, which applies one beside the weights where peft is there
# Language models of multimodal ones that transformers has no class for, and those whose text they read alike.
READ_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration in a folder.

    Raises:
        CheckpointError: no `config.json`, or one that transformers refuses.
        UnsupportedError: an unknown kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path, raw = folder / "config.json", read_settings(folder)
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
        return _with_sizes_of_all(config)
    text = _as_language_model(text)
    try:
        build_skeleton(text)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"The language model within {config.model_type} does not stand alone: {error}"
        ) from error
    text.tie_word_embeddings = bool(outer_model(config).all_tied_weights_keys)
    text.dtype = text.dtype or config.dtype
    text.architectures = [type(build_skeleton(text)).__name__]
    return _with_sizes_of_all(text)


def _with_sizes_of_all(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration, of which sizes can be read that single layers have otherwise; see `varied_widths`."""
    if getattr(config, "is_heterogeneous", False):
        config.allow_global_per_layer_attribute_access = True
    return config
