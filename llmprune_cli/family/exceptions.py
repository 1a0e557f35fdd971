"""What shapes, gradients and the configuration do not say about a family: one short entry each.

A family that needs nothing here has no entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What pruning has to make up for."""

    scaled_embedding: str = ""  # the embedding that the model multiplies by √(hidden size), tied to the output
    final_norm: str = ""  # the module of the norm before the output projection
    norm_offset: float = 0.0  # what the model adds to the stored weights of its norms
    rounds_neurons: str = ""  # the field by which the model has another intermediate size than the configuration says
    neurons: str = ""  # the tensor that has the true intermediate size along its first axis
    layers: str = ""  # the field that counts the layers, where num_hidden_layers counts how often attention runs


GEMMA = Family(scaled_embedding="model.embed_tokens.weight", final_norm="model.norm", norm_offset=1.0)
GEMMA_4 = Family(scaled_embedding="model.embed_tokens.weight", final_norm="model.norm")
BIOGPT = Family(scaled_embedding="biogpt.embed_tokens.weight", final_norm="biogpt.layer_norm")
HRM = Family(layers="num_layers_per_stack")
LONGCAT = Family(layers="num_layers")
LFM2 = Family(rounds_neurons="block_auto_adjust_ff_dim", neurons="model.layers.0.feed_forward.w1.weight")

FAMILIES: dict[str, Family] = {
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "vaultgemma": GEMMA,
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "biogpt": BIOGPT,
    "lfm2": LFM2,
    "hrm_text": HRM,
    "longcat_flash": LONGCAT,
}
