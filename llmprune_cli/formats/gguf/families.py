"""What llama.cpp knows about the families that it has: names, layouts, and what it takes for granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE = ("default", "linear", "yarn")
SHORTEST = 128  # tokens that are worth to be called a context


@dataclass(frozen=True)
class GgufFamily:
    """How a family is written for llama.cpp, and which of its settings llama.cpp cannot be told."""

    architecture: str  # llama.cpp's name
    activations: tuple[str, ...] = ("silu",)
    settings: Mapping[str, object] = field(default_factory=dict)  # taken for granted
    needed: tuple[str, ...] = ()  # settings that must have a value
    full_width: bool = False  # query heads × head dim has to be the hidden size
    as_llama: bool = False  # where it is not, the family can be written as llama.cpp's `llama`
    interleaved: bool = False  # RoPE turns neighbours, not halves: query and key rows are stored in another order
    rope: tuple[str, ...] = ROPE  # kinds of scaling
    partial_rope: bool = False
    layer_norm: bool = False  # with means; RMS otherwise
    norm_offset: float = 0.0  # what the family adds to a stored norm weight
    transposed: tuple[str, ...] = ()  # matrices stored as [inputs, outputs], by the ends of their names
    fused: bool = False  # query, key and value rows of a group lie together and have to be gathered
    own_head: bool = False  # wants an output matrix even where it is tied to the embedding
    has_head: bool = True
    window_period: int = 0  # in layers, the last of which is full; 0 where sliding windows are ignored
    mlp_width: str = "intermediate_size"
    kv_heads: bool = True  # whether it has fewer key heads than query heads at all
    wide_layers: int = 0  # with so many layers, attention is scaled by hidden size / heads instead of head dim
    swa_rope: bool = False  # full and sliding layers turn at different speeds


LLAMA = GgufFamily("llama", interleaved=True, rope=(*ROPE, "llama3"))
QWEN2 = GgufFamily("qwen2", full_width=True, as_llama=True)
DENSE_EXPERTS = {"mlp_only_layers": [], "decoder_sparse_step": 1}
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")

FAMILIES: dict[str, GgufFamily] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": QWEN2,
    "qwen3": GgufFamily("qwen3", settings={"attention_bias": False}),
    "qwen2_moe": GgufFamily(
        "qwen2moe",
        settings={**DENSE_EXPERTS, "norm_topk_prob": False, "qkv_bias": True},
        full_width=True,
        own_head=True,
    ),
    "qwen3_moe": GgufFamily("qwen3moe", settings={**DENSE_EXPERTS, "norm_topk_prob": True, "attention_bias": False}),
    "phi3": GgufFamily("phi3", full_width=True, as_llama=True, rope=("default", "longrope"), partial_rope=True),
    "gemma2": GgufFamily(
        "gemma2",
        activations=GELU[1:],
        settings={"attention_bias": False, "tie_word_embeddings": True},
        needed=("attn_logit_softcapping", "final_logit_softcapping"),
        norm_offset=1.0,
        has_head=False,
        window_period=2,
        wide_layers=46,
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        activations=GELU[1:],
        settings={
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        norm_offset=1.0,
        window_period=6,
        wide_layers=62,
        swa_rope=True,
    ),
    "gpt2": GgufFamily(
        "gpt2",
        activations=GELU[1:],
        settings={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        full_width=True,
        rope=(),
        layer_norm=True,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        mlp_width="n_inner",
        kv_heads=False,
    ),
    "gpt_neox": GgufFamily(
        "gptneox",
        activations=GELU,
        settings={"attention_bias": True},
        full_width=True,
        partial_rope=True,
        layer_norm=True,
        fused=True,
        own_head=True,
        kv_heads=False,
    ),
    "olmo2": GgufFamily("olmo2", settings={"attention_bias": False}, full_width=True, own_head=True),
    "falcon": GgufFamily(
        "falcon",
        activations=GELU,
        settings={"alibi": False, "parallel_attn": True, "bias": False},
        full_width=True,
        layer_norm=True,
        fused=True,
        mlp_width="ffn_hidden_size",
    ),
    "starcoder2": GgufFamily(
        "starcoder2", activations=GELU[1:], settings={"use_bias": True}, full_width=True, layer_norm=True
    ),
    "granite": GgufFamily("granite", interleaved=True, rope=(*ROPE, "llama3")),
}


@dataclass(frozen=True)
class Heads:
    """The attention of a layer."""

    query: int
    key: int
    size: int  # of one head


def heads_of(config: PretrainedConfig, family: GgufFamily) -> Heads:
    """How many heads of which size a configuration has."""
    query = int(config.num_attention_heads)
    key = int(getattr(config, "num_key_value_heads", None) or query) if family.kv_heads else query
    if config.model_type == "falcon":
        key = 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)
    return Heads(query, key, int(getattr(config, "head_dim", None) or config.hidden_size // query))


def experts_of(config: PretrainedConfig) -> int:
    """How many experts a layer has to choose from; 0 without any."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


def rope_of(config: PretrainedConfig) -> dict[str, object]:
    """How positions turn queries and keys in the layers that see everything."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get("full_attention", parameters))


def sliding_layers(config: PretrainedConfig) -> tuple[bool, ...]:
    """Which layers see a sliding window."""
    layers = int(config.num_hidden_layers)
    if not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", True) is False:
        return (False,) * layers
    types = getattr(config, "layer_types", None)
    return tuple(kind == "sliding_attention" for kind in types) if types else (True,) * layers


def context_length(config: PretrainedConfig, family: GgufFamily) -> int:
    """How many tokens llama.cpp treats as the model does: those of a window where it knows no windows."""
    length = int(config.max_position_embeddings)
    if family.window_period or not any(sliding_layers(config)):
        return length
    return min(length, int(config.sliding_window))


def written_family(config: PretrainedConfig) -> tuple[GgufFamily, str]:
    """The form in which a configuration is written, and what there is to say about it.

    Raises:
        ValueError: llama.cpp does not take it, or llmprune does not write the family for it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"llmprune itself does not write {config.model_type} for llama.cpp; where llama.cpp has this family, "
            "`llmprune export --format gguf --converter PATH/convert_hf_to_gguf.py` does"
        )
    notes = []
    heads, hidden = heads_of(config, family), int(config.hidden_size)
    if family.full_width and heads.query * heads.size != hidden:
        widths = f"{heads.query} query heads × {heads.size} is not the hidden size {hidden}"
        if not family.as_llama:
            raise ValueError(f"llama.cpp's {family.architecture} does not load where {widths}")
        family = replace(LLAMA, own_head=family.own_head)
        notes.append(f"written as llama.cpp's llama, since {widths}")
    if family.architecture == "llama" and (config.model_type == "qwen2" or getattr(config, "attention_bias", False)):
        notes.append("transformers reads this file without its biases; llmprune reads all of it")
    _check_settings(config, family)
    length = context_length(config, family)
    if length < config.max_position_embeddings:
        missing = f"llama.cpp's {family.architecture} has no sliding window"
        if length < SHORTEST:
            raise ValueError(f"{missing}, and without one it would read {length} tokens at most")
        notes.append(f"{missing}, so that the context length is that of the window, {length}")
    if family.swa_rope and not any(sliding_layers(config)):
        raise ValueError(f"llama.cpp's {family.architecture} wants a layer with a sliding window")
    return family, "; ".join(notes)


def _check_settings(config: PretrainedConfig, family: GgufFamily) -> None:
    name = family.architecture
    for setting, value in family.settings.items():
        found = getattr(config, setting, value)
        if (found or None) != (value or None):
            raise ValueError(f"llama.cpp's {name} takes {setting} to be {value}; here it is {found}")
    for setting in family.needed:
        if getattr(config, setting, None) is None:
            raise ValueError(f"llama.cpp's {name} wants a value for {setting}")
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    activation = next((getattr(config, key) for key in names if getattr(config, key, None)), "silu")
    if activation not in family.activations:
        raise ValueError(f"llama.cpp's {name} computes with {family.activations[-1]}, not with {activation}")
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if family.rope and kind not in family.rope:
        raise ValueError(f"llama.cpp's {name} has no RoPE scaling of the kind {kind!r}")
    if kind == "yarn" and any(rope.get(key) is not None for key in ("attention_factor", "mscale", "mscale_all_dim")):
        raise ValueError(f"llama.cpp's {name} computes the attention factor of yarn itself")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial_rope:
        raise ValueError(f"llama.cpp's {name} turns whole heads, not a part of each")
