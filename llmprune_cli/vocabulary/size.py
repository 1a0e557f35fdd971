"""The vocabulary as a width: which tensors have a row for each token, and how many of the rows must stay."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture, reconfigure
from llmprune_cli.family.layers import layer_changes, sample_layers
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.vocabulary.choice import must_stay
from llmprune_cli.vocabulary.numbering import new_numbers, renumbered
from llmprune_cli.vocabulary.request import STEP
from llmprune_cli.vocabulary.rewriting import open_tokens
from llmprune_cli.vocabulary.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Rows of the embeddings that Gemma 3n and 4 have for every layer; the tokens behind them share the first of these rows.
PER_LAYER = "vocab_size_per_layer_input"


@dataclass(frozen=True)
class VocabularyWidth:
    """The rows of tokens that a model has, and those of them that must stay."""

    rows: int  # of the embedding
    axes: dict[str, int]  # see `vocabulary_axes`
    tokens: Tokens
    stays: frozenset[int]  # see `must_stay`

    @property
    def least(self) -> int:
        """The smallest size that it can have."""
        return -(-len(self.stays) // STEP) * STEP


def find_width(checkpoint: Checkpoint, architecture: Architecture, keep_file: Path | None = None) -> VocabularyWidth:
    """The vocabulary of a model, some of whose tokens can go.

    Args:
        keep_file: names tokens that stay.

    Raises:
        UnsupportedError: none can.
        UsageError: see `must_stay`.
    """
    if checkpoint.whole is not None:
        raise UnsupportedError(f"{checkpoint.source} is multimodal, whose tokens cannot go. Give --text-only with it.")
    tokens, rows = open_tokens(checkpoint), int(checkpoint.config.vocab_size)
    config = one_of_each_kind(architecture)
    check_rows(config, max(1, rows // 2), checkpoint)
    stays = must_stay(tokens, checkpoint, rows, keep_file)
    if getattr(config, PER_LAYER, None):
        stays |= {0}
    return VocabularyWidth(rows, vocabulary_axes(config), tokens, stays)


def one_of_each_kind(architecture: Architecture) -> PretrainedConfig:
    """The configuration with one layer of each kind: outside of the layers it is the same, and sooner found out."""
    config = architecture.config
    return reconfigure(config, layer_changes(config, sample_layers(config, architecture.layer_kinds, 1)))


def vocabulary_axes(config: PretrainedConfig) -> dict[str, int]:
    """The axes that have a row for each token, by tensor: those that grow when the configuration has more tokens."""
    before = expected_index(config)
    more = {name: getattr(config, name) + STEP for name in ("vocab_size", PER_LAYER) if getattr(config, name, None)}
    after = expected_index(reconfigure(config, more))
    return {
        name: next(axis for axis, size in enumerate(shape) if size != after[name][axis])
        for name, shape in before.items()
        if shape != after[name]
    }


def rows_left(rows: int, kept: Sequence[int]) -> int:
    """How many of the first rows are those of tokens that stay.

    Args:
        kept: numbers of the tokens that stay, in their order.
    """
    return bisect_left(kept, rows)


def rows_weight(entries: Iterable[TensorEntry], axes: dict[str, int]) -> tuple[int, int]:
    """Parameters and bytes of all tensors that have a row for each token."""
    found = [entry for entry in entries if entry.name in axes]
    return sum(entry.numel for entry in found), sum(entry.size_bytes for entry in found)


def cut_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with these tokens, which it names by their new numbers."""
    return reconfigure(config, {**renumbered(config.to_dict(), new_numbers(kept).get), **_sizes(config, kept)})


def with_rows(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """The configuration of a model of the same shapes with so many tokens, of which it names none."""
    names = dict.fromkeys(name for name, value in config.to_dict().items() if name.endswith("token_id") and value)
    return reconfigure(config, {**names, **_sizes(config, range(rows))})


def _sizes(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    names = (name for name in ("vocab_size", PER_LAYER) if getattr(config, name, None))
    return {name: rows_left(getattr(config, name), kept) for name in names}


def check_rows(config: PretrainedConfig, size: int, checkpoint: Checkpoint) -> None:
    """Hold that a configuration with fewer tokens describes the tensors that are cut, and no other difference.

    Raises:
        UnsupportedError: it does not.
    """
    family, axes, kept = config.model_type, vocabulary_axes(config), range(size)
    fewer = expected_index(with_rows(config, size))
    for name, shape in expected_index(config).items():
        cut = tuple(rows_left(length, kept) if axes.get(name) == axis else length for axis, length in enumerate(shape))
        if fewer.get(name) != cut:
            raise UnsupportedError(
                f"{name} of {checkpoint.source} would become {cut}, but a config.json with {size:,} tokens makes it "
                f"{fewer.get(name)}, by a rule of {family} that is not known here. Leave --vocab-size out."
            )
