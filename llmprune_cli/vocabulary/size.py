"""How many rows an embedding keeps, and which tensors have a row for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import reconfigure
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.vocabulary.numbering import new_numbers, renumbered
from llmprune_cli.vocabulary.request import STEP

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def vocabulary_axes(config: PretrainedConfig) -> dict[str, int]:
    """The axes that have a row for each token, by tensor: those that grow when the configuration has more tokens."""
    before = expected_index(config)
    after = expected_index(reconfigure(config, {"vocab_size": config.vocab_size + STEP}))
    return {
        name: next(axis for axis, size in enumerate(shape) if size != after[name][axis])
        for name, shape in before.items()
        if shape != after[name]
    }


def cut_config(config: PretrainedConfig, kept: tuple[int, ...]) -> PretrainedConfig:
    """The configuration of a model with these tokens, which it names by their new numbers."""
    return reconfigure(config, {**renumbered(config.to_dict(), new_numbers(kept).get), "vocab_size": len(kept)})


def check_rows(config: PretrainedConfig, size: int, checkpoint: Checkpoint) -> None:
    """Hold that a configuration with fewer tokens describes the tensors that are cut, and no other difference.

    Raises:
        UnsupportedError: it does not, or the model has embeddings of another vocabulary as well.
    """
    family = config.model_type
    if getattr(config, "vocab_size_per_layer_input", None):
        raise UnsupportedError(
            f"{family} has embeddings in every layer, whose tokens cannot go. Leave --vocab-size out."
        )
    axes = vocabulary_axes(config)
    names = dict.fromkeys(name for name, value in config.to_dict().items() if name.endswith("token_id") and value)
    fewer = expected_index(reconfigure(config, {**names, "vocab_size": size}))
    for name, shape in expected_index(config).items():
        cut = tuple(size if axes.get(name) == axis else length for axis, length in enumerate(shape))
        if fewer.get(name) != cut:
            raise UnsupportedError(
                f"{name} of {checkpoint.source} would become {cut}, but a config.json with {size:,} tokens makes it "
                f"{fewer.get(name)}, by a rule of {family} that is not known here. Leave --vocab-size out."
            )
