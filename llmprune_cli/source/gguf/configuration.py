"""The configuration of a GGUF file: as transformers reads it, set right or refused where it passes over the header."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.family.widths import read_widths
from llmprune_cli.source.gguf.header import COUNT

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys of a header (behind the architecture's name) and the field of a configuration that each one sets. transformers
# reads some of them for some families and leaves the rest at the family's default.
SETTINGS = {
    "context_length": ("max_position_embeddings",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "use_parallel_residual": ("use_parallel_residual",),
}
WIDTHS = {
    "embedding_length": ("hidden_size", ("hidden_size",)),
    "block_count": ("num_hidden_layers", ("num_hidden_layers",)),
    "attention.head_count": ("num_attention_heads", ("num_attention_heads",)),
    "attention.head_count_kv": ("num_key_value_heads", ("num_key_value_heads", "num_kv_heads")),
    "attention.key_length": ("head_dim", ("head_dim",)),
    "attention.value_length": ("head_dim", ()),
    "feed_forward_length": ("intermediate_size", ("intermediate_size", "n_inner", "ffn_hidden_size")),
}
ROPE = ("freq_base", "freq_base_swa", "dimension_count", "scaling.type", "scaling.factor")
# Keys that say how the file was made, or nothing that a model computes with.
SILENT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
# Settings beside widths that Llama and Qwen2 share.
SAID_ALIKE = (
    *("vocab_size", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_configuration(path: Path) -> PretrainedConfig:
    """The configuration of a GGUF file, from its header alone.

    Args:
        path: of the file, or of what `header_of` makes of it.

    Raises:
        UnsupportedError: the header or the tensors say something that would be lost.
        Exception: whatever the readers raise for a broken file.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}."
    header = {key.removeprefix(prefix): f.contents() for key, f in reader.fields.items() if key.startswith(prefix)}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if COUNT in reader.fields and not ("vocab_size" in header and "vocab_size" in _mapping_of(config)):
        config.vocab_size = reader.fields[COUNT].contents()
    if config.model_type == "llama":
        config = _with_biases(config, {*tensors})
    _set_widths(config, header)
    for key in sorted(SETTINGS.keys() & header.keys()):
        _set(config, key, SETTINGS[key], header[key])
    _set_rope(config, header)
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is not None:
        _set_llama3_rope(config, [float(factor) for factor in factors.data])
    if architecture in ("gemma2", "gemma3"):
        _set_gemma_scale(config)
    if architecture == "falcon" and header.get("attention.head_count_kv", 1) > 1:
        raise UnsupportedError("GGUF reorders Falcon's query_key_value, which transformers does not undo.")
    _check_all_read(config, architecture, header, {name: int(t.n_elements) for name, t in tensors.items()})
    return config


def _with_biases(config: PretrainedConfig, names: Collection[str]) -> PretrainedConfig:
    """What llama.cpp's llama is with the biases that it may have, none of which transformers reads.

    Without that of the output it is what transformers calls Qwen2.
    """
    from transformers import Qwen2Config

    biased = [f"blk.0.{part}.bias" in names for part in ("attn_q", "attn_k", "attn_v", "attn_output")]
    if all(biased[:3]) and not biased[3]:
        said = config.to_dict()
        settings = {
            name: said[name] for name in (*SAID_ALIKE, *(width for width, _ in WIDTHS.values())) if name in said
        }
        return Qwen2Config(**settings)
    if all(biased):
        config.attention_bias = True
    if "blk.0.ffn_up.bias" in names:
        config.mlp_bias = True
    return config


def _set_widths(config: PretrainedConfig, header: dict[str, Any]) -> None:
    for key, (width, names) in WIDTHS.items():
        value = header.get(key)
        if value is None or isinstance(value, list):
            continue
        present = [name for name in names if hasattr(config, name)]
        for name in present:
            setattr(config, name, value)
        if not present and getattr(read_widths(config), width) != value:
            if width != "head_dim" or not names:
                raise UnsupportedError(f"{key} is {value}, which {config.model_type} cannot have in transformers.")
            config.head_dim = value


def _set(config: PretrainedConfig, key: str, names: tuple[str, ...], value: Any) -> None:
    present = [name for name in names if hasattr(config, name)]
    if not present and value and key != "context_length":
        raise UnsupportedError(f"{key} is {value}, which transformers does not read into {config.model_type}.")
    for name in present:
        setattr(config, name, value)


def _set_rope(config: PretrainedConfig, header: dict[str, Any]) -> None:
    """Base, rotated dimensions and scaling of the rotary embedding; where kinds of layers differ, the global ones."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    if "rope.freq_base_swa" in header:
        rope["sliding_attention"]["rope_theta"] = header["rope.freq_base_swa"]
    rope = rope.get("full_attention", rope)
    if "rope.freq_base" in header:
        rope["rope_theta"] = header["rope.freq_base"]
    rotated, whole = header.get("rope.dimension_count"), read_widths(config).head_dim
    if rotated is not None and rotated != int(whole * rope.get("partial_rotary_factor", 1.0)):
        rope["partial_rotary_factor"] = rotated / whole
    scaling = header.get("rope.scaling.type", "none")
    if scaling == "linear":
        rope.update(rope_type="linear", factor=header["rope.scaling.factor"])
    elif scaling != "none":
        raise UnsupportedError(f"The rotary embedding is scaled by {scaling}, which transformers does not read.")


def _set_llama3_rope(config: PretrainedConfig, factors: list[float]) -> None:
    """Recover Llama 3.1's scaling from the factors that GGUF stores in its place, one for each frequency."""
    rope, factor = config.rope_parameters, max(factors)
    low, high, length = LLAMA3_ROPE.values()
    for number, stored in enumerate(factors):
        turns = length / (2 * math.pi * rope["rope_theta"] ** (number / len(factors)))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(stored, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-3):
            raise UnsupportedError(
                "rope_freqs.weight holds other factors than Llama 3's, which no config.json can say."
            )
    rope.update(rope_type="llama3", factor=factor, **LLAMA3_ROPE)


def _set_gemma_scale(config: PretrainedConfig) -> None:
    """The scale of Gemma's queries, which GGUF leaves to the reader to know: only the 27B models have another one."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type] == config.num_hidden_layers
    per_head = config.hidden_size // config.num_attention_heads
    config.query_pre_attn_scalar = per_head if largest else config.head_dim


def _mapping_of(config: PretrainedConfig) -> dict[str, Any]:
    """The keys of a header that transformers reads for a family, and what it makes of them."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping: Any = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    return dict(mapping)


def _check_all_read(config: PretrainedConfig, architecture: str, header: dict[str, Any], sizes: dict[str, int]) -> None:
    """Refuse what transformers would pass over without a word.

    Raises:
        UnsupportedError: a key that nothing reads, or other numbers of parameters in the file than in the model.
    """
    known = {*SETTINGS, *WIDTHS, *SILENT, *_mapping_of(config), *(f"rope.{key}" for key in ROPE)}
    for key in sorted(header.keys() - known):
        raise UnsupportedError(f"{architecture}.{key} is {header[key]}, which transformers does not read.")
    for name in sizes:
        if name.startswith("rope_factors_"):
            raise UnsupportedError(f"It holds {name}, which transformers does not read.")
    stored, read = sum(sizes.values()), sum(math.prod(shape) for shape in expected_index(config).values())
    if stored != read:
        raise UnsupportedError(
            f"It holds {stored:,} parameters, but a {config.model_type} of its header has {read:,} in transformers, so "
            "some would be lost."
        )
