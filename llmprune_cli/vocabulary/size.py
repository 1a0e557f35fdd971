"""The vocabulary as a width: which tensors have a row for each token, and how many of the rows must stay."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune_cli.errors import UnsupportedError
from llmprune_cli.family.architecture import Architecture, reconfigure
from llmprune_cli.family.layers import layer_changes, sample_layers
from llmprune_cli.family.skeleton import expected_index
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.tensors import TensorEntry
from llmprune_cli.source.stored_names import outer_model
from llmprune_cli.vocabulary.choice import must_stay
from llmprune_cli.vocabulary.numbering import named_tokens, new_numbers, renumbered
from llmprune_cli.vocabulary.request import STEP
from llmprune_cli.vocabulary.rewriting import open_tokens
from llmprune_cli.vocabulary.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
    tokens, rows = open_tokens(checkpoint), int(checkpoint.config.vocab_size)
    beyond = min((number for number in tokens.required if number >= rows), default=None)
    if beyond is not None:
        raise UnsupportedError(
            f"{checkpoint.source} has no row for the token {tokens.by_id[beyond]!r}, whose number is {beyond:,}: the "
            f"model has {rows:,}. Take it out of tokenizer.json, or give the model that many rows with transformers."
        )
    config = one_of_each_kind(architecture)
    check_rows(config, max(1, rows // 2), checkpoint)
    if checkpoint.whole is not None:
        _check_whole(checkpoint.whole.config, rows, config)
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


def cut_whole(whole: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The configuration of a multimodal model with these tokens."""
    settings, text = whole.to_dict(), cut_config(whole.text_config, kept)
    sizes = {"vocab_size": text.vocab_size} if settings.get("vocab_size") == whole.text_config.vocab_size else {}
    changed = {**renumbered(settings, new_numbers(kept).get), **sizes, "text_config": text.to_dict()}
    return type(whole).from_dict({**settings, **changed})


def _check_whole(whole: PretrainedConfig, rows: int, text: PretrainedConfig) -> None:
    """Hold that fewer tokens change nothing of a multimodal model but its language model.

    Args:
        text: the language model's configuration.

    Raises:
        UnsupportedError: they do, or parts of it know tokens in a way of their own.
    """
    remedy = "--text-only writes the language model alone."
    settings = whole.to_dict()
    speaking = next(_speaking_of_tokens(settings), None)
    if speaking is not None:
        raise UnsupportedError(f"{speaking} of a {whole.model_type} speaks of tokens in a way of its own. {remedy}")
    beyond = sorted(number for number in named_tokens(settings) if number >= rows)
    if beyond:
        raise UnsupportedError(
            f"A {whole.model_type} names the token {beyond[0]:,} of {rows:,}, which has no row, so that none can go. "
            f"{remedy}"
        )
    named = named_tokens(settings) | named_tokens(whole.text_config.to_dict())
    kept = sorted({*range(rows // 2), *(number for number in named if number < rows)})
    before, after = (_stored_shapes(outer_model(config)) for config in (whole, cut_whole(whole, kept)))
    changed = [name for name, shape in before.items() if after.get(name) != shape]
    if len(changed) != len(vocabulary_axes(text)):
        raise UnsupportedError(
            f"With fewer tokens, {', '.join(changed) or 'nothing'} of a {whole.model_type} would change, which is not "
            f"what changes of its language model. {remedy}"
        )


def _speaking_of_tokens(settings: dict[str, Any]) -> Iterator[str]:
    """Fields of a multimodal model that know tokens otherwise than by their numbers in it, or in a part of it.

    A `vocab_size` beside the language model's says nothing of these tokens: LLaVA's vision tower has one.
    """
    for name, value in settings.items():
        if "vocab" in name and name != "vocab_size" and value:
            yield name
        if isinstance(value, dict) and name != "text_config":
            own = {str(inner): said for inner, said in value.items() if said and not str(inner).endswith("vocab_size")}
            yield from (
                f"{name}.{inner}" for inner, said in own.items() if "vocab" in inner or named_tokens({inner: said})
            )


def _stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors but the second names of tied ones."""
    tied = model.all_tied_weights_keys.keys()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


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
