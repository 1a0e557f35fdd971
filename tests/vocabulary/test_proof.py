"""Before a token goes, a twin of the family proves that its row can be cut, and refuses rows that are cut wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmprune_cli.apply import pruned_folder
from llmprune_cli.apply.vocabulary.proof import changed_logits, prove_rows
from llmprune_cli.apply.vocabulary.rows import Stream
from llmprune_cli.coupling.discovery import trace
from llmprune_cli.coupling.subject import Subject
from llmprune_cli.coupling.twin import settle_head_dim
from llmprune_cli.errors import LlmpruneError
from llmprune_cli.family.architecture import discover
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import TensorEntry
from support.families import FAMILIES, SIZES, model_type
from support.full import examples
from support.tiny import tiny_config

SOME = ("gemma3_text",)  # tied and scaled
NAMES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
PER_LAYER = {  # embeddings for every layer
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 80,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
}
TRIED = {**FAMILIES, **PER_LAYER}


def understood(family: str, **changes: Any) -> Subject:
    config: Any = tiny_config(model_type(family), **{**SIZES, **TRIED[family], **changes})
    index = expected_index(config)
    architecture = settle_head_dim(discover(config, index))
    entries = tuple(TensorEntry(name, shape, "F32", None) for name, shape in index.items())
    nowhere = Path("nowhere")
    checkpoint = Checkpoint(nowhere, "paper", None, config, entries, False, nowhere)
    return Subject(checkpoint, architecture, trace(architecture))


@pytest.mark.parametrize("tied", examples((True, False), (True,)))
@pytest.mark.parametrize("family", examples(TRIED, SOME))
def test_the_logits_of_tokens_that_stay_are_what_they_were(family: str, tied: bool) -> None:
    assert changed_logits(understood(family, tie_word_embeddings=tied)) <= 1e-12


Cut = Callable[[Sequence[TensorEntry], Stream, dict[str, int], Sequence[int]], tuple[tuple[TensorEntry, ...], Stream]]
whole_cut: Cut = pruned_folder.cut_rows


def other_rows(name: str) -> Cut:
    """Of one tensor, the rows before those that it should keep."""

    def cut(
        entries: Sequence[TensorEntry], tensors: Stream, axes: dict[str, int], kept: Sequence[int]
    ) -> tuple[tuple[TensorEntry, ...], Stream]:
        found, right = whole_cut(entries, tensors, axes, kept)
        return found, ((entry, own.roll(1, axes[name]) if entry.name == name else own) for entry, own in right)

    return cut


def without(name: str) -> Cut:
    """All rows of one tensor stay."""

    def cut(
        entries: Sequence[TensorEntry], tensors: Stream, axes: dict[str, int], kept: Sequence[int]
    ) -> tuple[tuple[TensorEntry, ...], Stream]:
        return whole_cut(entries, tensors, {other: axis for other, axis in axes.items() if other != name}, kept)

    return cut


@pytest.mark.parametrize("name", examples(NAMES, ("lm_head.bias",)))
@pytest.mark.parametrize("wrong", [other_rows, without])
def test_rows_that_are_cut_wrongly_are_refused(
    wrong: Callable[[str], Cut], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruned_folder, "cut_rows", wrong(name))
    with pytest.raises(LlmpruneError, match=r"without some tokens|does not load|loads with mismatched"):
        prove_rows(understood("phi"))
