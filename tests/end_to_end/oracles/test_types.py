"""Types of models whose layers, MLP or heads were once refused: one of each reason that this had."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.full import examples
from tools.families import families

LAYERS, NEURONS, HEADS = "num_hidden_layers", "intermediate_size", "num_attention_heads"
TYPES: dict[str, tuple[str, ...]] = {
    "bert": (LAYERS, NEURONS, HEADS),  # norms behind the residual: a layer of zeros is no identity
    "bart": (LAYERS, NEURONS),  # a decoder's fields beside those of an encoder
    "gemma4_text": (LAYERS, NEURONS, HEADS),  # heads of several sizes, and one table with a share for each layer
    "ctrl": (LAYERS, NEURONS),  # a list of two layers that do other work than each other
    "doge": (LAYERS, NEURONS, HEADS),  # a residual with a weight, and a mask that is made of all heads
    "hrm_text": (LAYERS, NEURONS),  # two stacks of layers, each of which runs several times
    "kimi_linear": (LAYERS, NEURONS, "moe_intermediate_size"),  # heads of two layouts under one name
    "longcat_flash": (LAYERS, NEURONS, HEADS),  # two attentions in each layer, of which num_hidden_layers counts both
    "mimo_v2_flash": (LAYERS, NEURONS, HEADS),  # twice as many KV heads in some layers
    "minicpm3": (LAYERS, NEURONS, HEADS),  # a scale by the number of layers
    "modernbert-decoder": (LAYERS, NEURONS, HEADS),  # token ids that must be numbers
    "persimmon": (LAYERS, NEURONS, HEADS),  # a norm of single heads where hidden size and heads go together
    "prophetnet": (LAYERS, NEURONS),  # a number of layers that is the encoder's, and may not be set
    "xglm": (LAYERS, NEURONS),  # a mask that exists in float32 alone
    "zaya": ("moe_intermediate_size",),  # a router that knows one expert for each token
}


@pytest.mark.parametrize("name", examples(TYPES, ["bert"]))
def test_what_was_once_refused_is_pruned_as_the_oracle_of_the_survey_says(name: str, tmp_path: Path) -> None:
    row = families.tried(name, tmp_path, by_text=False)
    assert not row.state and not [fault for fault in row.faults if "takes" not in fault], (row.state, row.faults)
    assert [width for width in TYPES[name] if row.widths.get(width) != "proven"] == [], row.widths
