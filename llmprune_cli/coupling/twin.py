"""A small model of the same architecture, used to find out which indices belong together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune_cli.errors import UnsupportedError, first_line
from llmprune_cli.family.architecture import Architecture, have_own_heads, reconfigure, rotary_changes, rotary_fraction
from llmprune_cli.family.cache import Cached
from llmprune_cli.family.layers import KV_SHARED, layer_changes, sample_layers
from llmprune_cli.family.widths import EXPERT_GROUPS, HEAD_COUNTS, NEURONS, PICKED, Widths, field_changes

TOKENS = 24  # length of the twin's input
WINDOW = 6  # of sliding attention, so that it matters within the input
CAPS = ("logit_softcapping", "logits_soft_cap", "logit_soft_cap")  # how fields end that hold logits below a number
UNCAPPED = 1e4  # what it is in the twin, whose logits would all be that number, and show no difference
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "index_topk")
VOCABULARY = 32
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}
OTHER_TOKEN = 0  # for padding and whatever else a configuration names; none of these is in a twin's input
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)  # of models that do not run
EMPTY_EXPERTS = "zero_expert_num"  # LongCat's experts that pass on their input, and are picked beside the others
GROWING = ("keys", "values", "indexer_keys")  # what a layer's cache calls what it keeps of every token
SEED = 20241  # of the twin's weights; any seed must give the same trace
# Ranks of latent attention in the twin, and how many heads it has there; the sizes of a head are the model's own.
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8}
LATENT_HEADS = 8
# What state-space layers call their expansion, heads, head dim and groups; heads × head dim is expansion × hidden size.
STATE_SPACE_HEADS = (
    ("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("expand", "num_heads", "head_dim", "n_groups"),
    ("mamba_expand", "n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
)


class NoLogitsError(UnsupportedError):
    """A configuration whose models give no numbers, so that nothing can be found out about any width."""


@dataclass(frozen=True)
class TwinSizes:
    """How small a twin is; its heads are as many and as grouped as the model's."""

    head_dim: int
    channels_per_head: int
    neurons: int
    experts: int
    experts_per_token: int
    layers_per_kind: int


@dataclass(frozen=True)
class Twin:
    """A model with real head counts and small everything else, in float64 or what else it computes in."""

    architecture: Architecture  # the twin's own
    model: PreTrainedModel
    tokens: torch.Tensor  # [1, TOKENS]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, a twin's products are formed by one thread: they are so small that several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def trace_sizes(config: PretrainedConfig) -> TwinSizes:
    """Small, and with as many experts as are picked: an expert that no token reaches would look unread."""
    return TwinSizes(_small_head_dims(config)[0], 3, 12, experts=3, experts_per_token=3, layers_per_kind=1)


def proof_sizes(config: PretrainedConfig, drops_layers: bool) -> TwinSizes:
    """Other sizes than those that were traced, large enough to lose half of every width."""
    layers = 3 if drops_layers else 1
    picked = (
        2 if any(getattr(config, name, None) for name in EXPERT_GROUPS) else 3
    )  # of half of 8, so that every token reaches nearly all
    return TwinSizes(_small_head_dims(config)[1], 8, 24, experts=8, experts_per_token=picked, layers_per_kind=layers)


def build_twin(architecture: Architecture, sizes: TwinSizes) -> Twin:
    """Build a twin with random weights that has layers of every kind.

    Raises:
        UnsupportedError: transformers cannot build it.
    """
    real = architecture.widths
    layers = sample_layers(architecture.config, architecture.layer_kinds, sizes.layers_per_kind)
    config = reconfigure(architecture.config, layer_changes(architecture.config, layers))
    latent = architecture.own_heads and real.heads_per_group == 1 and not have_own_heads(architecture.config)
    if latent and real.num_attention_heads:
        real = replace(real, num_attention_heads=LATENT_HEADS, num_key_value_heads=LATENT_HEADS)
    heads = real.num_attention_heads or LATENT_HEADS
    hidden_per_head = (
        sizes.head_dim if architecture.hidden_follows_heads else _channels_per_head(architecture, heads, sizes)
    )
    widths = replace(
        real,
        hidden_size=heads * hidden_per_head,
        head_dim=real.head_dim if architecture.own_heads else sizes.head_dim,
        num_hidden_layers=len(layers),
        num_experts=sizes.experts if real.num_experts else 0,
        **{width: sizes.neurons + 2 * n for n, width in enumerate(NEURONS) if getattr(real, width)},
    )
    changes: dict[str, Any] = {}
    for width in ("hidden_size", "num_attention_heads", "num_key_value_heads", *NEURONS, "num_experts"):
        if getattr(real, width) and (width not in HEAD_COUNTS or latent):
            changes.update(field_changes(config, width, getattr(widths, width)))
    changes.update(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        **({"head_dim": sizes.head_dim} if writes_head_dim(architecture) else {}),
        **_small_fields(config, sizes, widths.hidden_size),
    )
    try:
        small = _accepted(config, changes)
        torch_state = torch.random.get_rng_state()
        model = (
            AutoModelForCausalLM.from_config(small, attn_implementation="eager", experts_implementation="eager")
            .double()
            .eval()
        )
        torch.random.set_rng_state(torch_state)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"No small twin of {config.model_type} can be built ({error}).") from error
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        embedding = next(model.get_input_embeddings().parameters())
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                is_bias = name.endswith("bias")  # large ones would make all tokens alike, and send them to few experts
                parameter.copy_(0.1 * noise if is_bias else 1 + 0.2 * noise)
            else:
                parameter.copy_(noise if parameter is embedding else noise / parameter.shape[-1] ** 0.5)
        _fill_buffers(model, max(2, widths.num_experts), generator)
    tokens = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
    model = _in_runnable_precision(model, tokens)
    own_kinds = tuple(layers.index(architecture.layer_kinds[layer]) for layer in layers)
    return Twin(replace(architecture, config=small, widths=widths, layer_kinds=own_kinds), model, tokens)


def _channels_per_head(architecture: Architecture, heads: int, sizes: TwinSizes) -> int:
    """Fewer where there are many heads of the model's own size, which would make a twin too large for its purpose."""
    usual = sizes.channels_per_head
    return min(usual, max(usual // 3, usual * LATENT_HEADS // heads)) if architecture.own_heads else usual


def _accepted(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """The small configuration; where a family knows one number of experts for a token alone, with that one.

    Raises:
        ValueError: the configuration refuses the changes.
    """
    try:
        return reconfigure(config, changes)
    except ValueError:
        return reconfigure(config, {name: value for name, value in changes.items() if name not in PICKED})


def _in_runnable_precision(model: PreTrainedModel, tokens: torch.Tensor) -> PreTrainedModel:
    """The model in float32 where its code, which mixes precisions or masks by the least number of one, wants that."""
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except FAILURES:
        model.float()
        try:
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)
        except FAILURES:
            model.double()
    return model


def _fill_buffers(model: PreTrainedModel, numbers: int, generator: torch.Generator) -> None:
    """Give what is stored beside the weights values as trained models have them: no two alike, and none zero.

    Args:
        numbers: below which whole numbers are drawn, as they are those of experts.
    """
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in stored or buffer.dtype == torch.bool:
            continue
        if buffer.is_floating_point():
            noise = 0.1 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
            buffer.copy_(buffer * (1 + noise) if buffer.any() else noise)
        else:
            buffer.copy_(torch.randint(numbers, buffer.shape, generator=generator))


def writes_head_dim(architecture: Architecture) -> bool:
    """Whether `head_dim` has to be set: where it is free, or must be hidden size / heads and is written out."""
    written = architecture.hidden_follows_heads and architecture.config.to_dict().get("head_dim")
    return architecture.explicit_head_dim or bool(written)


def _small_head_dims(config: PretrainedConfig) -> tuple[int, int]:
    """Two small head dims of which the position encoding turns a whole number of pairs, at least one."""
    fraction = rotary_fraction(config)
    fits = [size for size in range(4, 257, 2) if int(size * fraction) >= 2 and int(size * fraction) % 2 == 0]
    return fits[0], fits[1]


def _small_fields(config: PretrainedConfig, sizes: TwinSizes, hidden_size: int) -> dict[str, Any]:
    """Fields that must follow the small sizes: token ids, per-dimension RoPE factors, routing, dead activations."""
    changes: dict[str, Any] = rotary_changes(config, sizes.head_dim)
    for names in STATE_SPACE_HEADS:
        expand, heads, head_dim, groups = (getattr(config, name, None) for name in names)
        if heads and head_dim and expand and heads * head_dim == expand * config.hidden_size:
            changes.update({names[1]: groups or 1, names[2]: expand * hidden_size // (groups or 1)})
    for name, value in config.to_dict().items():
        if name.endswith("_token_id"):
            changes[name] = TOKEN_IDS.get(name, None if value is None else OTHER_TOKEN)
        elif name in LATENT and isinstance(value, int) and hasattr(config, "kv_lora_rank"):
            changes[name] = LATENT[name]
        elif name in PICKED and isinstance(value, int):
            changes[name] = sizes.experts_per_token + min(2, getattr(config, EMPTY_EXPERTS, None) or 0)
        elif name == EMPTY_EXPERTS and value:
            changes[name] = min(2, value)
        elif name in EXPERT_GROUPS and value:
            changes.update({name: min(value, 2 if sizes.experts % 2 == 0 else 1), "topk_group": 1})
        elif name in WINDOWS and isinstance(value, int) and value > WINDOW:
            changes[name] = WINDOW
        elif name.endswith(CAPS) and value:
            changes[name] = UNCAPPED
        elif value in ("relu", "relu2") and ("act" in name):
            changes[name] = "gelu"  # a neuron that never fires would look like one that nothing reads
        elif name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"):
            changes[name] = 0.0
    return changes


def settle_head_dim(architecture: Architecture) -> Architecture:
    """Take back that query heads need not fill the hidden size where a twin of such sizes does not run.

    Raises:
        UnsupportedError: no twin can be built, or none runs.
    """
    try:
        run_twin(build_twin(architecture, trace_sizes(architecture.config)))
    except NoLogitsError:
        raise
    except UnsupportedError:
        if not architecture.explicit_head_dim:
            raise
        architecture = replace(architecture, explicit_head_dim=False, hidden_follows_heads=True)
        run_twin(build_twin(architecture, trace_sizes(architecture.config)))
    return architecture


def run_twin(twin: Twin) -> None:
    """Run a twin on its tokens.

    Raises:
        NoLogitsError: nothing comes of it.
        UnsupportedError: it does not run.
    """
    family = twin.architecture.config.model_type
    try:
        with torch.no_grad():
            logits = twin.model(input_ids=twin.tokens, use_cache=False).logits
    except FAILURES as error:
        raise UnsupportedError(f"A small twin of {family} does not run ({first_line(error)}).") from error
    if not logits.isfinite().all():
        raise NoLogitsError(
            f"A small {family} model of this config.json gives no finite logits, so that nothing can be proven of it. "
            "Download config.json again."
        )


def cached_by(architecture: Architecture) -> tuple[Cached, ...] | None:
    """What every layer of a model keeps of a token, by what a twin has in its cache; None where that does not say it.

    Raises:
        UnsupportedError: no twin can be built.
    """
    config, kinds = architecture.config, architecture.layer_kinds
    if not architecture.widths.num_attention_heads:
        return (Cached(),) * len(kinds)
    twin = build_twin(architecture, trace_sizes(config))
    try:
        with torch.no_grad():
            cache = twin.model(input_ids=twin.tokens, use_cache=True).past_key_values
        places = [_cached_in(place, twin, architecture) for place in getattr(cache, "layers", ())]
    except Exception:  # caches raise every kind, and a figure is worth no command
        return None
    known, sampled = [place for place in places if place is not None], sample_layers(config, kinds, 1)
    times, rest = divmod(len(known), len(sampled))
    if known != places or not times or rest or (times > 1 and len(set(known)) > 1):  # whose they are, is not said
        return None
    shared = range(len(kinds) - (getattr(config, KV_SHARED, 0) or 0), len(kinds))  # which keep none of their own
    found = [known[sampled.index(kind)].times(times) for kind in kinds]
    return tuple(Cached() if layer in shared else own for layer, own in enumerate(found))


def _cached_in(place: Any, twin: Twin, architecture: Architecture) -> Cached | None:
    """What one place of a twin's cache would keep of a token in the model itself; None where that is not known."""
    found, is_latent = Cached(), False
    small, config = twin.architecture.config, architecture.config
    for tensor in (getattr(place, name, None) for name in GROWING):
        if not isinstance(tensor, torch.Tensor):
            continue
        heads, numbers = tensor.shape[1] if tensor.ndim == 4 else None, tensor.shape[-1]
        is_shared = heads == 1 < twin.architecture.widths.num_key_value_heads
        if heads is None or (is_shared and getattr(config, "kv_lora_rank", None)):
            own: Cached | None = Cached(fixed=numbers)
            is_latent = is_latent or heads is not None
        else:
            own = _cached_of_heads(heads, numbers, twin.architecture.widths, architecture)
        if own is None:
            return None
        found += own
    return found + Cached(fixed=config.kv_lora_rank - small.kv_lora_rank) if is_latent else found


def _cached_of_heads(heads: int, numbers: int, small: Widths, architecture: Architecture) -> Cached | None:
    """What so many heads of so many numbers in a twin are in the model itself; None where that is not known.

    Args:
        small: the twin's widths.
    """
    config, real = architecture.config, architecture.widths
    if have_own_heads(config) or architecture.kv_heads:  # which a twin has, too
        return Cached(fixed=heads * numbers)
    if getattr(config, "kv_lora_rank", None) is None:  # otherwise heads have sizes of their own, which a twin has, too
        if numbers not in (small.head_dim, real.head_dim):
            return None
        numbers = real.head_dim
    if heads == small.num_key_value_heads:
        return Cached(of_group=numbers)
    return Cached(of_head=numbers) if heads == small.num_attention_heads else None
