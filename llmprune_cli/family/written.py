"""The `config.json` that is written: it describes the written tensors to every reader, older ones included."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llmprune_cli.family.layers import FURTHER_LAYERS, every_nth
from llmprune_cli.family.skeleton import is_remote
from llmprune_cli.folder.documents import read_json, write_json

# Fields by which some readers place every n-th layer: the list that says the same, and what it says of these layers.
EVERY_NTH = {
    "sliding_window_pattern": ("layer_types", "full_attention"),
    "_sliding_window_pattern": ("layer_types", "full_attention"),
    "full_attention_interval": ("layer_types", "full_attention"),
    "no_rope_layer_interval": ("no_rope_layers", 0),
}
# Families of which mlx-lm knows nothing else, so that it takes an n of its own where none is written.
NTH_ALONE = {
    "gemma3_text": "sliding_window_pattern",
    "cohere2": "sliding_window_pattern",
    "exaone4": "sliding_window_pattern",
    "qwen3_next": "full_attention_interval",
}
# What transformers 4 calls kinds of layers, and settings of rotary embeddings, where it has names of its own.
OLDER_KINDS = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
    "zamba": {"linear_attention": "mamba"},
    "zamba2": {"linear_attention": "mamba"},
}
OLDER_ROPE = {"gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}}
OF_WHOLE = {"architectures", "tie_word_embeddings", "transformers_version"}  # what a nested configuration leaves out
LISTS = frozenset(("layer_types", "layers_block_type"))  # of kinds of layers
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")  # what is no part of `rope_scaling`


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """Write `config.json`, with what transformers 4, llama.cpp's converter, vLLM and mlx-lm read beside today's fields.

    Whatever would change how transformers reads the others is left out.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    settings = read_json(path)
    settings.pop("allow_global_per_layer_attribute_access", None)  # is for this program alone
    if not is_remote(config):
        settings.pop("auto_map", None)  # it names code that is not written
    nth = nth_layers(config.model_type, settings)
    fitting = {name: value for name, value in nth.items() if value is not None}
    settings = {name: value for name, value in settings.items() if name in fitting or name not in nth}
    none = dict.fromkeys(settings.keys() & FURTHER_LAYERS, 0)
    for more in (none, fitting, older_rope(config.model_type, settings), older_names(config, settings)):
        if _reads_alike(config, settings, {**settings, **more}, ignored={*more} - LISTS):
            settings |= more
    write_json(path, settings)


def write_whole_config(
    whole: PretrainedConfig, before: PretrainedConfig, after: PretrainedConfig, folder: Path
) -> None:
    """Write the `config.json` of a multimodal model whose language model was pruned.

    Args:
        whole: the multimodal model's.
        before: the language model's, as it was read from there.
        after: the pruned language model's.
    """
    path, texts = folder / "config.json", []
    for config in (before, after):
        write_config(config, folder)
        texts.append(read_json(path))
    old, new = texts
    whole.save_pretrained(folder)
    settings = read_json(path)
    text = {name: value for name, value in settings["text_config"].items() if name in new or name not in old}
    is_own = old["model_type"] == text.get("model_type")
    changed = {n: value for n, value in new.items() if old.get(n) != value or (is_own and n not in text)}
    settings["text_config"] = text | {name: value for name, value in changed.items() if name not in OF_WHOLE}
    if not is_remote(whole):
        settings.pop("auto_map", None)
    if settings.get("dtype"):
        settings["torch_dtype"] = settings["dtype"]
    write_json(path, settings)


def nth_layers(model_type: str, settings: dict[str, Any]) -> dict[str, int | None]:
    """The fields by which readers place every n-th layer: the n that fits the list of all layers, None for none."""
    found = {}
    for name, (list_name, special) in EVERY_NTH.items():
        kinds = settings.get(list_name)
        if isinstance(kinds, list) and (settings.get(name) or NTH_ALONE.get(model_type) == name):
            found[name] = every_nth([kind == special for kind in kinds])
    return found


def older_rope(model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 4 wrote it: `rope_theta`, `rope_scaling` and so on.

    Where full and sliding layers turn at different speeds, the older names are those of Gemma 3.
    """
    rope = settings.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention") or rope, rope.get("sliding_attention") or {}
    older = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "partial_rotary_factor": full.get("partial_rotary_factor"),
    }
    older |= {name: full.get(today) for name, today in OLDER_ROPE.get(model_type, {}).items()}
    older = {name: value for name, value in older.items() if value is not None}
    if not rope:
        return {}
    kind = full.get("rope_type", "default")
    if kind == "default":
        return {**older, "rope_scaling": None}  # without which GPT-OSS would have one
    scaling = {name: value for name, value in full.items() if name not in BESIDE_SCALING}
    if kind == "longrope":
        scaling = {name: full[name] for name in ("short_factor", "long_factor")}  # and no more, says Phi-3
    else:
        scaling["rope_type"] = kind
    return {**older, "rope_scaling": {**scaling, "type": kind}}


def older_names(config: PretrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under every name that they have or had: the dtype, counts of experts, kinds of layers."""
    older = {"torch_dtype": settings["dtype"]} if settings.get("dtype") else {}
    for alias, name in config.attribute_map.items():
        for one, other in ((alias, name), (name, alias)):
            if "expert" in one and other in settings and one not in settings:
                older[one] = settings[other]
    kinds = OLDER_KINDS.get(config.model_type, {})
    for name in LISTS:
        if kinds and isinstance(settings.get(name), list):
            older[name] = [kinds.get(kind, kind) for kind in settings[name]]
    return older


def _reads_alike(
    config: PretrainedConfig, settings: dict[str, Any], changed: dict[str, Any], ignored: Collection[str]
) -> bool:
    """Whether transformers reads the same from both, whatever it makes of the fields to ignore."""
    try:
        one, other = (type(config).from_dict(_with_floats(each)).to_dict() for each in (settings, changed))
    except Exception:  # every configuration refuses in its own way
        return False
    return all(_plain(name, other.get(name)) == _plain(name, own) for name, own in one.items() if name not in ignored)


def _plain(name: str, value: Any) -> Any:
    """A setting without the older name of a RoPE's kind, which may stand beside today's."""
    if name != "rope_parameters" or not isinstance(value, dict):
        return value
    return {key: _plain(name, own) for key, own in value.items() if key != "type"}


def _with_floats(settings: Any) -> Any:
    """A copy with the floats that JSON lacks, which transformers writes as objects."""
    if isinstance(settings, dict):
        special = settings.get("__float__")
        return float(special) if special else {name: _with_floats(value) for name, value in settings.items()}
    return [_with_floats(value) for value in settings] if isinstance(settings, list) else settings
