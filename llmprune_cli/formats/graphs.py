"""A model as a graph: loaded whole, wrapped so that only tensors go in and come out, and traced."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmprune_cli.errors import UnsupportedError, first_line
from llmprune_cli.family.written import write_config
from llmprune_cli.folder.checkpoint import Checkpoint
from llmprune_cli.folder.shards import check_finite
from llmprune_cli.formats.registry import Fit
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.tokenizer import copy_companions

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

EXAMPLE = (2, 3, 4)  # sequences, tokens of the cache, new tokens; no two alike, none 1, so that all stay dynamic
# Kinds of layers and families of state spaces, linear attention and compressed caches, whose loops or chunks a trace
# unrolls for the length of its example. Families of which configurations say these kinds of layers need no mention.
SCANNING_KINDS = ("linear_attention", "mamba", "compressed_sparse_attention", "heavily_compressed_attention")
SCANNING = (
    *("bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h", "recurrent_gemma", "rwkv"),
    *("xlstm", "zamba", "zamba2"),
)
CACHED_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "attention")  # they keep keys and values
Past = list[tuple["torch.Tensor", "torch.Tensor"]]  # keys and values of each layer, [B, K, T, P]


def fit_graph(config: PretrainedConfig) -> Fit:
    """Whether a graph holds a model for texts of any length."""
    if config.model_type in SCANNING or any(kind in SCANNING_KINDS for kind in layer_kinds(config)):
        note = f"a graph of {config.model_type} is fixed to the number of steps that it takes through its example"
        return Fit(loads=False, note=note)
    return Fit(loads=True)


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """The kind of each layer; empty where the configuration says none."""
    return tuple(getattr(config, "layer_types", None) or ())


def load_traceable(checkpoint: Checkpoint, dtype: str | None) -> PreTrainedModel:
    """The whole model on the CPU, experts computed as one product that a graph can hold."""
    model = load_model(checkpoint, "cpu", dtype)
    if hasattr(model.config.get_text_config(), "num_experts_per_tok"):
        model.set_experts_implementation("batched_mm")
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)
    return model.requires_grad_(False)


def without_cache(model: PreTrainedModel) -> torch.nn.Module:
    """Token ids [B, T] → logits [B, T, V]."""

    class WithoutCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            """Logits."""
            return self.model(input_ids=input_ids, use_cache=False).logits

    return WithoutCache().eval()


def with_cache(model: PreTrainedModel) -> torch.nn.Module:
    """Token ids [B, T], mask [B, cached + T], positions [B, T] and a cache → logits [B, T, V] and the longer cache."""
    from transformers import DynamicCache

    extra = {"position_ids"} & {*inspect.signature(model.forward).parameters}

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Past
        ) -> tuple[Any, Past]:
            """Logits, and the cache with the new tokens in it."""
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(past):
                cache.update(keys, values, layer)
            given = dict.fromkeys(extra, position_ids)
            output: Any = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
            )
            return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    return WithCache().eval()


def example_past(model: PreTrainedModel) -> Past:
    """A cache of some tokens.

    Raises:
        UnsupportedError: the model keeps another kind of state than keys and values.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    sequences, cached, _ = EXAMPLE
    with torch.no_grad():
        output: Any = model(input_ids=torch.zeros(sequences, cached, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    plain = (DynamicLayer, DynamicSlidingWindowLayer)  # others, derived from them, keep more
    past = [(layer.keys, layer.values) for layer in layers if type(layer) in plain]
    if len(past) != model.config.get_text_config().num_hidden_layers:
        raise UnsupportedError(
            f"{model.config.model_type} keeps more than keys and values between tokens. Pass --no-kv-cache."
        )
    return past


@contextmanager
def traced_quietly(checkpoint: Checkpoint) -> Iterator[None]:
    """Keep what exporters warn of to their developers from the user, and say what they could not do.

    Raises:
        UnsupportedError: the model has no graph.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            yield
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        reason = first_line(error)
        raise UnsupportedError(
            f"{checkpoint.source} has no graph that can be exported ({type(error).__name__}: {reason})."
        ) from error
    finally:
        logger.setLevel(level)


def write_beside(checkpoint: Checkpoint, model: PreTrainedModel, folder: Path) -> None:
    """Configuration, tokenizer, chat template and generation config, which a graph does not hold."""
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config.dtype = model.dtype
    write_config(config, folder)
    copy_companions(checkpoint, folder)
