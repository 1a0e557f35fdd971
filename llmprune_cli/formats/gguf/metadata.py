"""The keys of a GGUF file that describe the model, from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.formats.gguf.families import GgufFamily, context_length, experts_of, heads_of, rope_of, sliding_layers

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

NAME = "model"  # readers draw conclusions from the names of models, so that it says nothing


def add_metadata(writer: GGUFWriter, config: PretrainedConfig, family: GgufFamily) -> None:
    """Describe widths, norms, positions, windows, experts and scales."""
    heads, hidden = heads_of(config, family), int(config.hidden_size)
    writer.add_type("model")
    writer.add_name(NAME)
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(int(getattr(config, family.mlp_width) or 4 * hidden))
    writer.add_head_count(heads.query)
    writer.add_head_count_kv(heads.key)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
    if family.layer_norm:
        names = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
        writer.add_layer_norm_eps(next(float(getattr(config, name)) for name in names if hasattr(config, name)))
    else:
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    _add_windows(writer, config, family)
    if family.rope:
        _add_rope(writer, config, family, heads.size)
    _add_experts(writer, config)
    _add_family_settings(writer, config)


def _add_windows(writer: GGUFWriter, config: PretrainedConfig, family: GgufFamily) -> None:
    length, sliding = context_length(config, family), sliding_layers(config)
    writer.add_context_length(length)
    if not family.window_period:
        return
    # llama.cpp wants a window in every file of such a family; one as long as the context hides nothing
    writer.add_sliding_window(min(length, int(config.sliding_window)) if any(sliding) else length)
    if any(sliding) and sliding != usual_windows(len(sliding), family.window_period):
        writer.add_sliding_window_pattern(sliding)


def usual_windows(layers: int, period: int) -> tuple[bool, ...]:
    """The layers that llama.cpp gives a window where a file does not say which."""
    return tuple((layer + 1) % period != 0 for layer in range(layers))


def _add_rope(writer: GGUFWriter, config: PretrainedConfig, family: GgufFamily, head_size: int) -> None:
    from gguf import RopeScalingType

    rope: dict[str, Any] = rope_of(config)
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if family.swa_rope:
        sliding = config.rope_parameters.get("sliding_attention", {})
        writer.add_rope_freq_base_swa(float(sliding.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(_frequencies(config, kind)[1])


def rope_factors(config: PretrainedConfig, family: GgufFamily) -> dict[str, torch.Tensor]:
    """What each frequency is divided by, as tensors of the file; none where a kind of scaling needs none."""
    rope: dict[str, Any] = rope_of(config)
    kind = rope.get("rope_type", "default")
    if not family.rope or kind not in ("llama3", "longrope"):
        return {}
    if kind == "longrope":
        return {f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"]) for length in ("long", "short")}
    scaled = _frequencies(config, kind)[0]
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    return {"rope_freqs.weight": (plain / scaled.double()).float()}


def _frequencies(config: PretrainedConfig, kind: str) -> tuple[torch.Tensor, float]:
    """The frequencies that transformers turns with, and what it multiplies queries and keys by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return frequencies, float(attention_factor)


def _add_experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    experts = experts_of(config)
    if not experts:
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(int(config.num_experts_per_tok))
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(int(config.moe_intermediate_size))
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(int(config.shared_expert_intermediate_size))


def _add_family_settings(writer: GGUFWriter, config: PretrainedConfig) -> None:
    if config.model_type == "granite":
        writer.add_attention_scale(float(config.attention_multiplier))
        writer.add_embedding_scale(float(config.embedding_multiplier))
        writer.add_residual_scale(float(config.residual_multiplier))
        writer.add_logit_scale(float(config.logits_scaling))
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(bool(config.use_parallel_residual))
    if config.model_type == "falcon":
        writer.add_tensor_data_layout("jploski")  # as the gathered query, key and value rows are called
