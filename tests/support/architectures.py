"""Architectures on paper: a configuration and its rules, with no model built from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.trace import Binding, Trace
from llmprune_cli.family.architecture import Architecture
from llmprune_cli.family.cache import Cached
from llmprune_cli.family.widths import Widths, read_widths
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import TensorEntry
from support import families
from support.tiny import tiny_config

# Whether the model reads `head_dim`, whether the hidden size is heads × head dim, and whether it is a multiple of them.
RULES = {
    "llama": (True, False, True),
    "llama-mha": (True, False, True),
    "qwen3_moe": (True, False, False),
    "gpt2": (False, True, True),
    "deepseek_v3": (False, False, False),
    "jamba": (True, False, False),
    "mamba": (False, False, False),
}
REFUSED = {"deepseek_v3": {"num_attention_heads": "latent", "num_key_value_heads": "latent"}}


def architecture_of(family: str, **changes: Any) -> Architecture:
    """A family of the tests with four layers: hidden size 64, 8 query heads for 2 KV heads, 48 neurons."""
    own_groups = {"num_key_value_heads": 8} if family == "gpt2" else {}
    settings = {**families.SIZES, **families.FAMILIES[family], **own_groups, **changes}
    config: Any = tiny_config(families.model_type(family), **settings)
    return Architecture(config, read_widths(config), *RULES[family], layer_kinds=(0,) * config.num_hidden_layers)


LAYER = "model.layers.{}."
# Tensors of a plain Llama: the width along each axis.
LAYOUT = {
    "model.embed_tokens.weight": ("", "hidden_size"),
    "lm_head.weight": ("", "hidden_size"),
    "model.norm.weight": ("hidden_size",),
    LAYER + "input_layernorm.weight": ("hidden_size",),
    LAYER + "post_attention_layernorm.weight": ("hidden_size",),
    LAYER + "self_attn.q_proj.weight": ("num_attention_heads", "hidden_size"),
    LAYER + "self_attn.k_proj.weight": ("num_key_value_heads", "hidden_size"),
    LAYER + "self_attn.v_proj.weight": ("num_key_value_heads", "hidden_size"),
    LAYER + "self_attn.o_proj.weight": ("hidden_size", "num_attention_heads"),
    LAYER + "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    LAYER + "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    LAYER + "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}


def count_llama(widths: Widths, vocabulary: int = 96) -> int:
    """Parameters of a plain Llama with embeddings of its own at both ends, by the formula that everybody knows."""
    hidden, head_dim = widths.hidden_size, widths.head_dim
    attention = 2 * hidden * head_dim * (widths.num_attention_heads + widths.num_key_value_heads)
    layer = attention + 3 * hidden * widths.intermediate_size + 2 * hidden
    return 2 * vocabulary * hidden + hidden + widths.num_hidden_layers * layer


def llama_on_paper(refused: tuple[str, ...] = (), **changes: Any) -> Subject:
    """A Llama in bfloat16 of which only names and shapes exist."""
    architecture = architecture_of("llama", attention_bias=False, mlp_bias=False, **changes)
    widths = architecture.widths
    keys_and_values = (Cached(of_group=2 * widths.head_dim),) * widths.num_hidden_layers
    architecture = replace(architecture, cached=keys_and_values)
    bindings, entries = [], []
    for template, along in LAYOUT.items():
        sizes = []
        for axis, width in enumerate(along):
            heads = tuple(range(getattr(widths, width))) if width.startswith("num_") else ()
            sizes.append(len(heads) * widths.head_dim or (getattr(widths, width) if width else 96))
            bindings += [Binding(template, axis, width, heads=heads)] if width else []
        numbers = range(widths.num_hidden_layers) if "{}" in template else (0,)
        entries += [TensorEntry(template.format(number), tuple(sizes), "BF16", None) for number in numbers]
    trace = Trace(
        tuple(bindings), (), (), frozenset(LAYOUT), frozenset(), frozenset(), dict.fromkeys(refused, "it is of no use")
    )
    nowhere = Path("nowhere")
    return Subject(
        Checkpoint(nowhere, "paper", None, architecture.config, tuple(entries), False, nowhere), architecture, trace
    )
