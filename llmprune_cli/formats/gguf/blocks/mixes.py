"""Which kind of blocks each matrix of a mix gets: those that llama-quantize chooses.

A mix has one kind for most matrices, and finer ones where rounding does most harm: the output, the values of attention
and the way down from the MLP, these in some layers only. The rules are those of `llama_tensor_get_type_impl` and
`tensor_type_fallback` in llama.cpp's src/llama-quant.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune_cli.family.widths import read_widths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

USUAL = {
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q5_k_s": "Q5_K",
    "q4_k_m": "Q4_K",
    "q4_k_s": "Q4_K",
    "iq4_nl": "IQ4_NL",
    "iq4_xs": "IQ4_XS",
    "q3_k_m": "Q3_K",
}  # by mix
# What rows get that blocks of 256 do not divide.
SHORTER = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}
NON_LINEAR = ("iq4_nl", "iq4_xs")
LEAST_BLOCK = 32  # elements of a row that are quantized together at least
EIGHT = 8  # experts of Mixtral, with which llama.cpp spares attention


@dataclass(frozen=True)
class Model:
    """What the choice looks at beside a matrix."""

    architecture: str  # by llama.cpp's name
    layers: int
    queries_per_key: int  # heads
    experts: int
    is_weighted: bool  # whether it is known how much each input matters
    is_tied: bool  # whether the file has no output matrix beside the embedding

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70 billion parameters."""
        grouped = self.queries_per_key > 1 or self.architecture == "qwen2"
        return self.layers == 80 and self.architecture in ("llama", "qwen2") and grouped


def mixed_kind(mix: str, name: str, columns: int, model: Model) -> str:
    """ggml's name for the blocks of a matrix.

    Args:
        name: of the matrix in the file.
        columns: elements of a row.
    """
    role = name.removesuffix(".weight").rpartition(".")[2]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if role == "output" or (model.is_tied and role == "token_embd"):
        is_whole = columns % elements_of(USUAL[mix]) == 0
        return fitting(columns, "Q6_K" if is_whole and model.architecture != "falcon" else "Q8_0")
    if role in ("attn_v", "attn_qkv"):
        return fitting(columns, _of_values(mix, layer, model))
    if role == "attn_k" and model.experts == EIGHT:
        return fitting(columns, "Q8_0")
    if role == "attn_output":
        return fitting(columns, _of_attention_output(mix, model))
    if role.startswith("ffn_down"):
        return fitting(columns, _of_way_down(mix, layer, model))
    return fitting(columns, USUAL[mix])


def fitting(columns: int, wanted: str) -> str:
    """The kind that is wanted, or the one that comes nearest and divides the rows."""
    if columns % elements_of(wanted) == 0:
        return wanted
    shorter = SHORTER.get(wanted)
    return shorter if shorter and columns % elements_of(shorter) == 0 else "F16"


def unpacked(config: PretrainedConfig) -> str:
    """Which matrices no quantized type packs, as no blocks divide their rows; empty where all are packed."""
    widths = read_widths(config)
    sizes = {
        "neurons": 0 if widths.moe_intermediate_size else widths.intermediate_size,  # which no layer has beside experts
        "neurons of an expert": widths.moe_intermediate_size,
        "neurons of the shared expert": widths.shared_expert_intermediate_size,
        "hidden channels": widths.hidden_size,
    }
    odd = [f"{size:,} {name}" for name, size in sizes.items() if size % LEAST_BLOCK]
    if not odd:
        return ""
    return f"they leave what reads {' and '.join(odd)} in 16 bits; prune with --round-to {LEAST_BLOCK} to pack it"


def elements_of(kind: str) -> int:
    """Elements of a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def _of_values(mix: str, layer: int, model: Model) -> str:
    kind = USUAL[mix]
    if model.experts == EIGHT:
        return "Q8_0"
    if mix == "q3_k_m":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif mix in NON_LINEAR and model.queries_per_key >= 4:
        kind = "Q5_K"
    elif mix in ("q4_k_m", "q5_k_m") and _deserves_more(layer, model.layers):
        kind = "Q6_K"
    elif mix == "q4_k_s" and layer < 4:
        kind = "Q5_K"
    return "Q5_K" if model.is_70b and kind in ("Q3_K", "Q4_K") else kind


def _of_attention_output(mix: str, model: Model) -> str:
    if model.architecture == "falcon":
        return USUAL[mix]
    if model.experts == EIGHT:
        return USUAL[mix] if mix in ("q6_k", "q5_k_m", "q5_k_s") else "Q5_K"
    return "Q4_K" if mix == "q3_k_m" else USUAL[mix]


def _of_way_down(mix: str, layer: int, model: Model) -> str:
    layers, is_falcon, deserves = model.layers, model.architecture == "falcon", _deserves_more(layer, model.layers)
    if mix == "q3_k_m" and layer < layers // 16:
        return "Q5_K"
    if mix == "q3_k_m":
        return "Q3_K" if is_falcon and not deserves else "Q4_K"
    if mix == "q4_k_m" and is_falcon:
        return "Q6_K" if layer < layers // 16 else "Q5_K" if deserves else "Q4_K"
    if mix in ("q4_k_m", "q5_k_m") and deserves:
        return "Q6_K"
    if layer < layers // 8 and ((mix in NON_LINEAR and not model.is_weighted) or (mix == "q4_k_s" and not is_falcon)):
        return "Q5_K"
    return USUAL[mix]


def _deserves_more(layer: int, layers: int) -> bool:
    """Whether a layer is one of the first or last eighth, or a third one between them."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
