"""The smallest configurations that have their family's features: grouped queries, biases, kinds of layers, experts."""

from __future__ import annotations

import os
from typing import Any

SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
WINDOWED = {"sliding_window": 8, "layer_types": SLIDING_AND_FULL}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-mha": {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "phi": {},
    "phi3": {},
    "phi3-partial": {
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]},
    },
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, **WINDOWED},
    "olmo2": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "falcon-multi-query": {"new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 48},
    "falcon-all-heads": {"new_decoder_architecture": False, "multi_query": False, "ffn_hidden_size": 48},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": 8},
    "cohere": {},
    "cohere2": WINDOWED,
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "smollm3": {},
    "glm4": {"head_dim": 8},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **EXPERTS,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 40, "mlp_only_layers": [1], "head_dim": 16},
    "olmoe": EXPERTS,
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, **WINDOWED},
    "deepseek_v3": {
        "num_key_value_heads": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 40,
        "n_shared_experts": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
NO_ATTENTION = {"num_attention_heads": None, "num_key_value_heads": None}
FAMILIES |= {
    "olmo": {},
    "olmo3": {"sliding_window": 8},
    "biogpt": {},
    "helium": {"head_dim": 8},
    "vaultgemma": {"head_dim": 16, "sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "glm4_moe": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "use_qk_norm": True,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {
        **EXPERTS,
        "layer_types": ["conv", "full_attention"] * 2,
        "moe_intermediate_size": 40,
        "num_dense_layers": 1,
    },
    "mamba": {**NO_ATTENTION, "state_size": 8, "time_step_rank": 4},
    "mamba2": {**NO_ATTENTION, "state_size": 8, "num_heads": 16, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**STATE_SPACE, "mamba_d_ssm": 32, "mamba_d_head": 4, "head_dim": 8},
    "granitemoehybrid": {
        **STATE_SPACE,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 56,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "qwen3_next": {
        **EXPERTS,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
NO_WINDOW = {"sliding_window": None}
ALL_EXPERTS = {"mlp_only_layers": []}
# Families that every export format is tried with, in settings that llama.cpp has.
EXPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": NO_WINDOW,
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "qwen2_moe": ALL_EXPERTS,
    "qwen3_moe": {**ALL_EXPERTS, "norm_topk_prob": True},
    "mixtral": {},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt2": {},
    "gpt_neox": {},
    "olmo2": {},
    "falcon": {},
    "starcoder2": NO_WINDOW,
    "granite": {},
}
# Families that have every layout between them; `make test-all` tries all of the others, too.
CLASSES = (
    "llama",  # grouped queries, biases
    "llama-mha",  # a KV head for each query head, tied embeddings
    "phi3",  # fused query-key-value and gate-up
    "gpt2",  # transposed weights, positions that are learned, hidden size tied to heads
    "gpt_neox",  # attention and MLP in parallel, LayerNorm, query, key and value interleaved
    "gemma3_text",  # norms behind readers, kinds of windows, scaled embeddings, norms of single heads
    "olmo2",  # norms over all heads
    "mixtral",  # experts that are tensors of their own
    "qwen2_moe",  # a shared expert with a gate, dense layers among sparse ones
    "deepseek_v3",  # latent attention, groups of experts, leading dense layers
    "jamba",  # state spaces, attention and experts by rhythms
    "mamba",  # no attention
)
# What differs most of these: for tests that take seconds for each family.
FEW = ("gpt2", "qwen2_moe", "jamba")
EXPORT_CLASSES = ("llama", "gemma2", "qwen3_moe", "gpt2", "phi3")
EVERY = bool(os.environ.get("LLMPRUNE_TEST_ALL"))
TRIED = {family: FAMILIES[family] for family in (FAMILIES if EVERY else CLASSES)}
TRIED_SLOWLY = {family: FAMILIES[family] for family in (FAMILIES if EVERY else FEW)}
TRIED_EXPORTS = {family: EXPORTED[family] for family in (EXPORTED if EVERY else EXPORT_CLASSES)}
HEADS_OF_16 = {"hidden_size": 128}  # with the eight heads of `tiny_config`
SIZES: dict[str, Any] = {"num_hidden_layers": 4, "pad_token_id": None}


def model_type(family: str) -> str:
    """What transformers calls a family: a variant has a suffix."""
    return family.split("-")[0]
